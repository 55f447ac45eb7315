"""The `nbd` driver: a node whose bytes are another server's export."""

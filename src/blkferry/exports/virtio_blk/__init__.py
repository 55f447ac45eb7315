"""A node as a virtio block device, whatever the transport: the device, its queues, and how requests are served."""

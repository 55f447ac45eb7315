"""The qcow2 format: its structures on disk, and the driver."""

"""What every virtio device has, however its driver reaches it: feature bits, guest memory and rings (virtio 1.3)."""

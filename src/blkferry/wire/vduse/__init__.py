"""VDUSE, the kernel's interface for vDPA devices in user space (Linux Documentation/userspace-api/vduse.rst)."""

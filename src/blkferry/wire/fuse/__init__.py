"""The FUSE protocol of the Linux kernel (include/uapi/linux/fuse.h), sans-IO: messages to values and back.

`constants` are its numbers, `requests` what the kernel asks, `replies` what it is answered and told, `init` what both
sides agree on at first.
"""

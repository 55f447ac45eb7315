"""The vhost-user protocol, back-end side: what front ends say over the socket, as values.

The specification is QEMU's docs/interop/vhost-user.rst; section names in this package are its.
"""

"""Who may come in (`authz-simple`, `authz-list`, `authz-listfile`, `authz-pam`), as of QEMU's qapi/authz.json."""

from blkferry.objects.authz.base import Authz

__all__ = ["Authz"]

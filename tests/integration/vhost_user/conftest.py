import pytest
from vhost_user_host import Host

from blkferry.testing.daemon import DaemonThread


@pytest.fixture
def host(sockets):
    with DaemonThread() as daemon:
        yield Host(daemon, sockets)

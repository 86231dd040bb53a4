"""The address that a server listens on, and the error if it cannot."""

from __future__ import annotations

import os
import socket

import pytest

from tokabatch.errors import UsageError
from tokabatch.serve.server import _listen


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_a_port_that_is_taken_is_refused_by_name(host: str) -> None:
    if host == "::1" and not os.path.exists("/proc/net/if_inet6"):
        pytest.skip("needs IPv6")
    with _listen(host, 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(
            UsageError, match=rf"server\.port: {host}:{port} cannot be listened on: Address already in use; choose"
        ):
            _listen(host, port)
        with socket.create_connection((host, port), 5):
            pass


def test_a_host_of_another_machine_is_refused() -> None:
    with pytest.raises(UsageError, match=r"192\.0\.2\.1:0 cannot be listened on: Cannot assign requested address"):
        _listen("192.0.2.1", 0)

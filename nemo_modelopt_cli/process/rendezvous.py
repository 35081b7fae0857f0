"""Let ranks of one machine meet where other machines cannot reach them.

PyTorch's store listens on all interfaces, whatever ``MASTER_ADDR`` is. Everybody who reaches its port can write what
ranks read there.
"""

from __future__ import annotations

import contextlib
import importlib
import ipaddress
import os
import socket
from collections.abc import Mapping
from typing import Any

_BACKLOG = 512


def is_loopback(host: str) -> bool:
    """Return whether a name or address is this machine's loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def on_one_node(environment: Mapping[str, str]) -> bool:
    """Return whether the variables of a rank, or of a process without ranks, describe a job on this machine alone."""
    count = environment.get("WORLD_SIZE", "1")
    return environment.get("LOCAL_WORLD_SIZE", count) == count and is_loopback(
        environment.get("MASTER_ADDR", "127.0.0.1")
    )


def keep_gloo_on_loopback() -> None:
    """Let gloo connect the ranks of one machine over loopback, unless an interface is chosen already."""
    names = {name for _, name in socket.if_nameindex()}
    if on_one_node(os.environ) and "lo" in names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def store(host_name: str, port: int, world_size: int | None = None, is_master: bool = False, *rest: Any, **more: Any):
    """Return a ``torch.distributed.TCPStore``, with the same arguments; on a loopback address it listens there only."""
    from torch.distributed import TCPStore

    if is_master and is_loopback(host_name) and more.get("master_listen_fd") is None:
        # A port that is taken may be that of another store of this process, which PyTorch then shares.
        with contextlib.suppress(OSError):
            more["master_listen_fd"] = _listening(host_name, port)
    return TCPStore(host_name, port, world_size, is_master, *rest, **more)


def _listening(host: str, port: int) -> int:
    """Return the descriptor of a socket that listens on a loopback address; the store closes it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
        return listener.detach()


def keep_on_loopback() -> None:
    """Let the process groups of this process meet on loopback only, if ``MASTER_ADDR`` is a loopback address.

    PyTorch has no setting for it: its rendezvous looks the class of its store up in its module.
    """
    # By name: the package has a function of the module's name.
    importlib.import_module("torch.distributed.rendezvous").TCPStore = store  # type: ignore[attr-defined]

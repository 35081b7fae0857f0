"""Where ranks of one machine meet: no port is open to other machines, and messages are no pickles."""

from __future__ import annotations

import json
import sys
import textwrap

import pytest

from nemo_modelopt_cli.process import launch, rendezvous

pytestmark = pytest.mark.cpu

_RANK = """
    import ipaddress, json, os, sys
    from datetime import timedelta
    from nemo_modelopt_cli.process import rendezvous
    from nemo_modelopt_cli.compress import runner

    runner.cpu_environment()
    if sys.argv[2] == "ours":
        rendezvous.keep_on_loopback()
    import psutil
    import torch

    # The job's own store, as compress.py makes it, and then two process groups, one after the other.
    port = int(os.environ["MASTER_PORT"])
    make = rendezvous.store if sys.argv[2] == "ours" else torch.distributed.TCPStore
    own = make("127.0.0.1", port + 1, 2, is_master=os.environ["RANK"] == "0", timeout=timedelta(seconds=60))
    found = set()
    for turn in range(2):
        if turn:
            # Rank one would otherwise join the store of the group that rank zero is about to close.
            own.set(f"closed/{os.environ['RANK']}", "yes")
            own.wait(["closed/0", "closed/1"])
        torch.distributed.init_process_group("gloo")
        one = torch.ones(1)
        torch.distributed.all_reduce(one)
        assert one.item() == 2
        found |= {c.laddr.ip for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"}
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    with open(f"{sys.argv[1]}/rank{os.environ['RANK']}.json", "w") as file:
        json.dump(sorted(found), file)
"""


def _listening(tmp_path, who: str) -> list[list[str]]:
    """Return the addresses on which each of two ranks listens."""
    (tmp_path / "rank.py").write_text(textwrap.dedent(_RANK))
    assert launch.run_ranks(2, [str(tmp_path / "rank.py"), str(tmp_path), who]) == 0
    return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the sockets of a process as Linux shows them")
def test_ranks_of_one_machine_listen_on_loopback_only(tmp_path, monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert _listening(tmp_path, "ours") == [["127.0.0.1"], ["127.0.0.1"]]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the sockets of a process as Linux shows them")
def test_pytorch_alone_listens_on_all_interfaces(tmp_path, monkeypatch):
    """If this fails PyTorch has mended it, and `rendezvous` can go."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert "::" in _listening(tmp_path, "torch")[0]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        ({"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, True),
        ({"MASTER_ADDR": "localhost"}, True),
        ({"MASTER_ADDR": "::1"}, True),
        ({"MASTER_ADDR": "node7", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, False),
        ({"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, False),
        ({"MASTER_ADDR": "10.0.0.7"}, False),
    ],
)
def test_one_machine_is_told_from_several(environment, expected):
    assert rendezvous.on_one_node(environment) is expected


@pytest.mark.parametrize("environment", [{"MASTER_ADDR": "node7"}, {"GLOO_SOCKET_IFNAME": "eth3"}])
def test_gloo_is_left_alone_between_machines_and_where_an_interface_is_chosen(monkeypatch, environment):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    rendezvous.keep_gloo_on_loopback()
    import os

    assert os.environ.get("GLOO_SOCKET_IFNAME") == environment.get("GLOO_SOCKET_IFNAME")

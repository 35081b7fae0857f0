"""Run this command once per local rank, as torchrun does, and end all ranks when one fails or the parent ends.

torchrun works as well, and is required for several nodes. This launcher saves CPU users the second command. Ranks are
started, or forked from a process that has imported NeMo (`forks`). This module does not import torch.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence

from nemo_modelopt_cli.process import forks, processes, signals
from nemo_modelopt_dropin import ranks

# Below the range from which systems give out ports of outgoing connections.
_PORTS = range(20000, 32000)
_GRACE_S = 10.0

Child = subprocess.Popen | forks.Forked


def run_ranks(count: int, argv: Sequence[str] | None = None, environment: Mapping[str, str] | None = None) -> int:
    """Run ``argv`` (this command by default) in ``count`` processes; return the first exit code that is not zero.

    Args:
        count: number of ranks.
        argv: arguments of the Python interpreter.
        environment: variables that the ranks get in addition to those of this process.
    """
    command = [sys.executable, *(own_arguments() if argv is None else argv)]
    port = free_port()
    children: list[Child] = []
    end = functools.partial(processes.end_with, os.getpid())
    with signals.seen() as arrived:

        def outcome() -> int:
            for rank in range(count):
                variables = {**os.environ, **_variables(rank, count, port), **(environment or {})}
                children.append(subprocess.Popen(command, env=variables, preexec_fn=end))
            return _wait(children)

        return _ended(children, outcome, arrived)


def fork_ranks(count: int, environment: Mapping[str, str] | None = None) -> int | None:
    """Fork ``count`` ranks from this process; return their first exit code that is not zero, or None in a rank.

    Args:
        count: number of ranks.
        environment: variables that the ranks get in addition to those of this process.
    """
    port, parent = free_port(), os.getpid()
    children: list[Child] = []
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # or each rank would write what is left
    with signals.blocked() as unblock:
        for rank in range(count):
            try:
                pid = os.fork()
            except OSError:
                _end(children)
                raise
            if not pid:
                forks.become_rank(parent, {**_variables(rank, count, port), **(environment or {})})
                return None
            children.append(forks.Forked(pid))
        with signals.seen() as arrived:

            def outcome() -> int:
                unblock()
                return _wait(children)

            return _ended(children, outcome, arrived)


def _ended(children: list[Child], outcome: Callable[[], int], arrived: list[int]) -> int:
    """Return the exit code of the ranks, or that of the signal that ends them; none of them runs any more."""
    try:
        return outcome()
    except (KeyboardInterrupt, signals.Stopped):
        return signals.CODES[arrived[0]]
    finally:
        _end(children)


def own_arguments() -> list[str]:
    """Return the arguments with which the interpreter runs this command again."""
    name = sys.argv[0]
    if os.path.basename(name) == "__main__.py":  # started with -m: as a file, its folder would be on the path
        return ["-m", os.path.basename(os.path.dirname(os.path.abspath(name))), *sys.argv[1:]]
    return list(sys.argv)


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port of an address of this machine ("" for all) that nobody listens on now."""
    for port in random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise OSError("no free port for local ranks")


def threads(count: int) -> str:
    """Return the number of threads of one of ``count`` ranks that share this machine."""
    return str(max(1, (os.cpu_count() or 1) // count))


def _variables(rank: int, count: int, port: int) -> dict[str, str]:
    """Return the environment variables of a rank, in addition to those of this process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        ranks.STARTED_BY_US: str(count),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads(count)),
        "TORCHELASTIC_RUN_ID": "local",  # Lightning then starts no processes itself
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
    }


def _wait(children: list[Child]) -> int:
    """Wait for all children, or for the first that fails."""
    while True:
        codes = [child.poll() for child in children]
        failed = [code for code in codes if code]
        if failed:
            return failed[0] if failed[0] > 0 else 128 - failed[0]
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.1)


def _end(children: list[Child]) -> None:
    """End the children that still run; more signals do not cut this short, and after the grace time it kills."""
    for number in signals.CODES:
        signal.signal(number, signal.SIG_IGN)
    alive = [child for child in children if child.poll() is None]
    for child in alive:
        child.terminate()
    deadline = time.monotonic() + _GRACE_S
    for child in alive:
        try:
            child.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()

"""A pool of live CPU ranks: started once a test run, it executes named functions on every rank.

Importing NeMo takes 15 seconds, so ranks are forked from a server that has most of it loaded (`preload`), and kept
alive between tests. A function runs on all ranks at once with the
CPU backend enabled and the environment torchrun would set; NeMo's strategy (or `tiny.init_parallel`) makes the process
groups, and `reset` takes them down after the job. Its return values come back in order of rank. When a rank raises, the
error shows the traceback of each rank and the ends of their logs; when one hangs, the stack where it hangs. A pool
that failed is thrown away, because its ranks may be in the middle of a collective, and the next test gets a fresh one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import multiprocessing
import os
import pickle
import random
import signal
import socket
import sys
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

_START_TIMEOUT = 240.0
_GRACE = 5.0
_PORTS = 1000


class RankError(RuntimeError):
    """A function failed, or did not end in time, on at least one rank."""


class RankPool:
    """``world_size`` live processes that form one gloo group."""

    def __init__(self, world_size: int, log_dir: Path, env: dict[str, str] | None = None):
        """Remember the settings; the ranks start with the first job.

        Args:
            world_size: number of ranks.
            log_dir: folder that receives what each rank prints.
            env: environment variables set in the ranks before anything is imported.
        """
        self.world_size = world_size
        self.log_dir = Path(log_dir)
        self.env = dict(env or {})
        self._processes: list = []
        self._pipes: list = []
        self._reserved: socket.socket | None = None

    def run(self, function, *args, timeout: float = 180.0, **kwargs) -> list:
        """Execute a module-level function on every rank and return its values in order of rank.

        Args:
            function: found again in the ranks by its module and name.
            *args: positional arguments, pickled.
            timeout: seconds until the job counts as hanging.
            **kwargs: keyword arguments, pickled.

        Raises:
            RankError: where a rank raised, died or did not end in time.
        """
        if not self._processes:
            self._start()
        job = pickle.dumps((function.__module__, function.__qualname__, args, kwargs))
        for pipe in self._pipes:
            pipe.send_bytes(job)
        return self._collect(f"{function.__module__}.{function.__qualname__}", timeout)

    def close(self) -> None:
        """End the ranks: politely first, then not."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(b"")
        deadline = time.monotonic() + _GRACE
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                _kill(process)
        self._processes, self._pipes = [], []
        self._free_ports()

    def _free_ports(self) -> None:
        if self._reserved is not None:
            self._reserved.close()
            self._reserved = None

    def _start(self) -> None:
        self.log_dir.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["test_code.support.preload"])
        self._free_ports()
        self._reserved = _reserve_ports()
        port = self._reserved.getsockname()[1] + 1
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, self.world_size, port, theirs, str(self._log(rank)), self.env),
                daemon=False,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._collect("start of the ranks", _START_TIMEOUT)

    def _collect(self, what: str, timeout: float) -> list:
        values: dict[int, object] = {}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(values) + len(failures) < self.world_size:
            waiting = {r: p for r, p in enumerate(self._pipes) if r not in values and r not in failures}
            ready = wait(list(waiting.values()), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for rank, pipe in waiting.items():
                if pipe not in ready:
                    continue
                try:
                    ok, value = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    ok, value = False, "the process died"
                (values if ok else failures)[rank] = value
                if not ok:
                    deadline = min(deadline, time.monotonic() + _GRACE)
        if len(values) == self.world_size:
            return [values[rank] for rank in range(self.world_size)]
        raise RankError(self._failure(what, values, failures, timeout))

    def _failure(self, what, values, failures, timeout) -> str:
        silent = [r for r in range(self.world_size) if r not in values and r not in failures]
        for rank in silent:
            if self._processes[rank].is_alive():
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        lines = [f"{what} failed on {self.world_size} ranks"]
        for rank in range(self.world_size):
            if rank in values:
                lines.append(f"--- rank {rank}: finished")
                continue
            reason = failures.get(rank, f"no answer (limit {timeout:.0f} s); its stack is at the end of its log")
            log = self._log(rank)
            tail = log.read_text(errors="replace")[-3000:] if log.exists() else ""
            lines.append(f"--- rank {rank}: {reason}\n--- end of the log of rank {rank}:\n{tail}")
        for process in self._processes:
            _kill(process)
        self._processes, self._pipes = [], []
        return "\n".join(lines)

    def _log(self, rank: int) -> Path:
        return self.log_dir / f"world{self.world_size}-rank{rank}.log"


def _kill(process) -> None:
    """End a rank with what it started: saving a checkpoint leaves a process of its own behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def _reserve_ports() -> socket.socket:
    """Return a socket bound to the first of a thousand ports, below those of `launch.free_port`, one a reset.

    As long as it is open no other pool takes them, of this test process or of another: a pool that ran into another's
    ports would meet the other's store there and wait for ranks that are long gone.
    """
    blocks = list(range(2_000, 20_000, _PORTS))
    random.SystemRandom().shuffle(blocks)
    for port in blocks:
        probe = socket.socket()
        try:
            probe.bind(("127.0.0.1", port))
            if all(map(_is_free, range(port + 1, port + _PORTS))):
                return probe
        except OSError:
            pass
        probe.close()
    raise RankError(f"no free block of {_PORTS} ports below 20000")


def _is_free(port: int) -> bool:
    """Return whether nothing listens on a port, a service of the machine for instance."""
    with socket.socket() as probe:
        # What a store of before has left behind does not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _serve(rank: int, world_size: int, port: int, pipe, log: str, env: dict[str, str]) -> None:
    """Be one rank: set up, then execute jobs until an empty one comes."""
    os.setpgid(0, 0)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    # As torchrun would: Lightning then takes the ranks as they are instead of starting its own.
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="pool",
        OMP_NUM_THREADS="1",
        **env,
    )
    try:
        _set_up()
        answer: tuple = (True, None)
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(answer))
    while answer is not None:
        try:
            job = pipe.recv_bytes()
        except EOFError:
            return
        if not job:
            return
        pipe.send_bytes(_execute(job))


def _set_up() -> None:
    import warnings

    import torch

    torch.set_num_threads(1)
    from nemo_modelopt_dropin import cpu_backend

    cpu_backend.enable()
    warnings.filterwarnings("error", module=r"nemo\.collections\.llm\.modelopt")
    import nemo.collections.llm  # noqa: F401
    from test_code.support import other_sums

    other_sums.enable_if_asked()
    # What is imported stays; without this, collecting garbage after a job would look through all of it, half a second.
    gc.collect()
    gc.freeze()


def _execute(job: bytes) -> bytes:
    module, name, args, kwargs = pickle.loads(job)
    sys.stdout.write(f"=== {module}.{name}\n")
    try:
        function = getattr(importlib.import_module(module), name)
        answer = pickle.dumps((True, function(*args, **kwargs)))
    except BaseException:
        # The pool throws its ranks away after a failure; a reset would wait for ranks that hang.
        return pickle.dumps((False, traceback.format_exc()))
    try:
        reset()
    except BaseException:
        answer = pickle.dumps((False, "while resetting the rank: " + traceback.format_exc()))
    sys.stdout.flush()
    return answer


@contextlib.contextmanager
def world(rank: int, size: int, port_offset: int):
    """Let this rank be one of a world of another size inside of the context: fewer ranks of a pool, or itself alone.

    Args:
        rank: Number in that world.
        size: Ranks of it.
        port_offset: Added to the pool's port; worlds that exist at the same time need different ones.
    """
    changed = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    changed["MASTER_PORT"] = int(os.environ["MASTER_PORT"]) + port_offset
    kept = {name: os.environ[name] for name in changed}
    os.environ.update({name: str(value) for name, value in changed.items()})
    try:
        yield
        reset()
    finally:
        os.environ.update(kept)


def reset() -> None:
    """Take a rank back to where a fresh process is: no process group, no batch calculator, no NeMo state.

    NeMo builds Megatron's groups only where it initialises ``torch.distributed`` itself, so that goes too. All ranks
    must call it. A job that runs two layouts in a row calls it in between.
    """
    import torch.distributed as dist
    from megatron.core import num_microbatches_calculator, parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.strategies import async_utils, base
    from nemo.constants import NEMO_ENV_VARNAME_VERSION
    from nemo.utils import AppState
    from nemo.utils.metaclasses import Singleton

    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.unset_num_microbatches_calculator()
    tensor_parallel.get_cuda_rng_tracker().reset()
    # NeMo keeps the parallel layout of a process in a singleton for good.
    Singleton._Singleton__instances.pop(AppState, None)
    # So does its logger with the folder of a run, which ranks would name by their own clocks.
    os.environ.pop(NEMO_ENV_VARNAME_VERSION, None)
    # Megatron 0.14 numbers the saves of a process, and its ranks must agree: a job may have saved on some of them only.
    base.async_calls = async_utils.AsyncCallsQueue()
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    # The next group meets at a new port: the old store may not have left its own yet.
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)

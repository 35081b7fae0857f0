"""Run module-level functions on a pool of live ranks, which starts once in a test run.

Importing NeMo takes 15 seconds. Ranks are therefore forked from a process that has imported it (`templates`), one for
each set-up, and they stay alive between tests. A function runs on all ranks at the same time, on the device that
`devices` chooses (or with what the pool sets up in its place) and with the environment variables that torchrun sets.
Ranks on GPUs are started without a template, and hold one GPU each. NeMo's strategy (or `tiny.init_parallel`) creates
the process groups, and `reset` destroys them after the job. The return values are ordered by rank. If a rank raises an
error, `RankError` shows the traceback and the end of the log of each rank; if a rank hangs, its log ends with the
stack. After a failure the ranks are killed, because they may be in the middle of a collective, and the next job starts
new ones.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import gc
import importlib
import io
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_modelopt_cli.process import imports
from test_code.support import devices
from test_code.support.templates import Forked, Template

if TYPE_CHECKING:
    from torch.distributed import TCPStore

_START_TIMEOUT = 240.0
_GRACE = 5.0
# Where the ranks of a pool meet, and the name of the world that this rank is in.
_STORE, _WORLD = "TEST_POOL_STORE", "TEST_POOL_WORLD"
_meetings: collections.Counter[str] = collections.Counter()
_templates: dict[tuple, Template] = {}


class RankError(RuntimeError):
    """A function raised an error or did not finish in time on at least one rank."""


class RankPool:
    """Keep ``world_size`` processes alive that form one process group."""

    def __init__(
        self,
        world_size: int,
        log_dir: Path,
        env: dict[str, str] | None = None,
        set_up: Callable[[int], None] | None = None,
    ):
        """Store the settings; the ranks start with the first job.

        Args:
            world_size: number of ranks.
            log_dir: folder of the ranks' logs, which hold everything that they print.
            env: environment variables that are set in the ranks before anything is imported.
            set_up: module-level function that each rank calls first, with its number; by default
                `devices.start_rank`.
        """
        self.world_size = world_size
        self.log_dir = Path(log_dir)
        self.env = dict(env or {})
        self._set_up = set_up or devices.start_rank
        self._processes: list[Forked | _Spawned] = []
        self._pipes: list = []
        self._store: TCPStore | None = None

    def run(self, function, *args, timeout: float = 180.0, **kwargs) -> list:
        """Run a module-level function on every rank and return the results, ordered by rank.

        Args:
            function: the function; the ranks import it by its module and name.
            *args: positional arguments, which are pickled.
            timeout: seconds after which the job counts as hanging.
            **kwargs: keyword arguments, which are pickled.

        Returns:
            One result for each rank.

        Raises:
            RankError: If a rank raised an error, died or did not finish in time.
            pytest.skip.Exception: If the ranks need more GPUs than there are.
        """
        if self._set_up is devices.start_rank:
            devices.need(self.world_size)
        if not self._processes:
            self._start()
        job = pickle.dumps((function.__module__, function.__qualname__, args, kwargs))
        for pipe in self._pipes:
            pipe.send_bytes(job)
        return self._collect(f"{function.__module__}.{function.__qualname__}", timeout)

    def close(self) -> None:
        """Ask the ranks to exit, and kill those that do not."""
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(b"")
        deadline = time.monotonic() + _GRACE
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
            if process.poll() is None:
                _kill(process)
        self._processes, self._pipes, self._store = [], [], None

    def _start(self) -> None:
        from torch.distributed import TCPStore

        self.log_dir.mkdir(parents=True, exist_ok=True)
        # The system chooses the port, so that no pool can meet another's ranks.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = self._store.port
        for rank in range(self.world_size):
            ours, theirs = multiprocessing.Pipe()
            self._processes.append(self._started((rank, self.world_size, port, str(self._log(rank))), theirs))
            theirs.close()
            self._pipes.append(ours)
        self._collect("start of the ranks", _START_TIMEOUT)

    def _started(self, place: tuple[int, int, int, str], pipe: Connection) -> Forked | _Spawned:
        """Start the rank of a place: rank, number of ranks, port of the store and log."""
        if devices.machine().start_method == "forkserver":
            return _template(self.env, self._set_up).fork(_serve_forked, place, pipe.fileno())
        return _Spawned(*place, pipe, self.env, self._set_up)

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
            if self._processes[rank].poll() is None:
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


class _Spawned:
    """A rank that was not forked, with the part of ``subprocess.Popen`` that a pool uses."""

    def __init__(self, *arguments) -> None:
        self._process = multiprocessing.get_context("spawn").Process(target=_serve, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> None:
        """Wait for the end; raise as ``Popen.wait`` does."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)


def _template(env: dict[str, str], set_up: Callable[[int], None]) -> Template:
    """Return the process that ranks of this set-up are forked from."""
    key = (*sorted(env.items()), set_up)
    if key not in _templates:
        _templates[key] = Template(_prepare, env, set_up)
    return _templates[key]


def _kill(process: Forked | _Spawned) -> None:
    """Kill a rank and its child processes; saving a checkpoint leaves one behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _serve_forked(rank: int, world_size: int, port: int, log: str, handle: int) -> None:
    """Run as one rank that was forked from a template."""
    _serve(rank, world_size, port, log, Connection(handle))


def _serve(
    rank: int,
    world_size: int,
    port: int,
    log: str,
    pipe: Connection,
    env: dict[str, str] | None = None,
    set_up: Callable[[int], None] | None = None,
) -> None:
    """Run as one rank: set it up if no template has done so, then execute jobs until an empty one arrives."""
    os.setpgid(0, 0)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    # torchrun sets the same variables. With them, Lightning uses these ranks instead of starting its own.
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        GROUP_RANK="0",
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="pool",
        **{_STORE: str(port), _WORLD: "pool"},
    )
    try:
        if set_up is not None:
            _prepare(env or {}, set_up, rank)
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


def _prepare(env: dict[str, str], set_up: Callable[[int], None], rank: int = 0) -> None:
    """Import and set up what a rank needs, in the rank or in the template of several."""
    import warnings

    os.environ.update(env, OMP_NUM_THREADS="1")

    import torch

    torch.set_num_threads(1)
    with imports.uncollected():
        set_up(rank)
        warnings.filterwarnings("error", module=r"nemo\.collections\.llm\.modelopt")
        _rendezvous()._rendezvous_handlers["env"] = _meet_in_store
        import nemo.collections.llm  # noqa: F401
    from test_code.support import other_sums

    other_sums.enable_if_asked()


def _execute(job: bytes) -> bytes:
    module, name, args, kwargs = pickle.loads(job)
    sys.stdout.write(f"=== {module}.{name}\n")
    try:
        function = getattr(importlib.import_module(module), name)
        answer = _pickled((True, function(*args, **kwargs)))
    except BaseException:
        # The pool kills its ranks after a failure; a reset would wait for ranks that hang.
        return pickle.dumps((False, traceback.format_exc()))
    try:
        reset()
    except BaseException:
        answer = pickle.dumps((False, "while resetting the rank: " + traceback.format_exc()))
    sys.stdout.flush()
    return answer


class _HostPickler(pickle.Pickler):
    """Pickle tensors of a GPU as tensors on the CPU, because tests compare them there."""

    def reducer_override(self, value):
        import torch

        if isinstance(value, torch.Tensor) and value.is_cuda:
            return value.detach().cpu().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return NotImplemented


def _pickled(value) -> bytes:
    stream = io.BytesIO()
    _HostPickler(stream, pickle.HIGHEST_PROTOCOL).dump(value)
    return stream.getvalue()


def _meet_in_store(url: str, **options):
    """Let ranks of a pool meet in its store, and other processes at ``MASTER_PORT``, for ``env://``.

    PyTorch's first rank would listen on ``MASTER_PORT`` for each process group. A suite makes thousands of groups, in
    several pools: it would run out of ports, or meet an older store. Here each group has its own name in one store.
    """
    from torch.distributed import PrefixStore, TCPStore

    if _STORE not in os.environ or "RANK" not in os.environ:
        yield from _rendezvous()._env_rendezvous_handler(url, **options)
        return
    name = os.environ[_WORLD]
    _meetings[name] += 1
    store = TCPStore("127.0.0.1", int(os.environ[_STORE]), is_master=False, timeout=options["timeout"])
    yield PrefixStore(f"{name}/{_meetings[name]}", store), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _rendezvous():
    # By name: the package has a function of the module's name.
    return importlib.import_module("torch.distributed.rendezvous")


@contextlib.contextmanager
def world(rank: int, size: int, name: str):
    """Make this rank part of a smaller world inside the context: several ranks of the pool, or this rank alone.

    Args:
        rank: rank in that world.
        size: number of ranks in that world.
        name: name of the world; its ranks enter worlds of this name equally often.
    """
    changed = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    changed[_WORLD] = f"{os.environ[_WORLD]}/{name}"
    kept = {name: os.environ[name] for name in changed}
    os.environ.update({name: str(value) for name, value in changed.items()})
    try:
        yield
        reset()
    finally:
        os.environ.update(kept)
        # NeMo has chosen the GPU by its number in the smaller world.
        devices.hold_gpu(int(kept["LOCAL_RANK"]))


def reset() -> None:
    """Reset a rank to the state of a new process: no process group, no batch calculator, no NeMo state.

    NeMo creates Megatron's groups only if it initialises ``torch.distributed`` itself, so the process group is
    destroyed as well. All ranks must call this function. A job that runs several layouts calls it between them.
    """
    import torch.distributed as dist
    from megatron.core import num_microbatches_calculator, parallel_state, tensor_parallel
    from megatron.core.dist_checkpointing.strategies import async_utils, base
    from megatron.core.transformer.moe import moe_utils
    from nemo.constants import NEMO_ENV_VARNAME_VERSION
    from nemo.utils import AppState
    from nemo.utils.metaclasses import Singleton

    parallel_state.destroy_model_parallel()
    num_microbatches_calculator.unset_num_microbatches_calculator()
    tensor_parallel.get_cuda_rng_tracker().reset()
    # NeMo keeps the parallel layout of a process in a singleton.
    Singleton._Singleton__instances.pop(AppState, None)
    # Its logger keeps the folder of a run in an environment variable; each rank would name it by its own clock.
    os.environ.pop(NEMO_ENV_VARNAME_VERSION, None)
    # Megatron 0.14 counts a process's saves. The ranks must agree, but a job may have saved on some of them only.
    base.async_calls = async_utils.AsyncCallsQueue()
    # Megatron keeps a loss for each layer of the first mixture of experts, and adds those of others to them.
    moe_utils.get_moe_layer_wise_logging_tracker().clear()
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    devices.release()

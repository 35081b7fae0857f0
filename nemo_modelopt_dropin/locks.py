"""Lock outputs so that one run at a time writes to them. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from nemo_modelopt_dropin.errors import InUseError, ModelOptConfigError

# Locks of this process by the path of their file: [descriptor, number of holders].
_held: dict[Path, list[int]] = {}


def _forget_locks() -> None:
    """Forget the locks of the parent: a forked child does not hold them."""
    _held.clear()


os.register_at_fork(after_in_child=_forget_locks)


@contextlib.contextmanager
def lock(output: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Lock an output for this process with the file ``.<name>.lock`` next to it; a process may lock it several times.

    The lock is a POSIX record lock; the system releases it when the process ends for any reason. Unlike ``flock``, it
    belongs to the process and not to the open file: forked children do not hold it, and it works between hosts on NFS
    (version 4, and 3 with lockd). Closing any descriptor of the file releases it; therefore only this function opens
    the file, once in each process.

    Args:
        output: The file or folder to write; it need not exist.
        patience_s: Seconds to wait for another run to end.

    Raises:
        InUseError: If another process holds the lock; the message contains its number, host and age.
        ModelOptConfigError: If the lock file cannot be created.
    """
    path, made = _lock_file(Path(os.path.realpath(output)))
    if path in _held:
        _held[path][1] += 1
    else:
        _held[path] = [_acquire(path, output, patience_s), 1]
    owner = os.getpid()
    try:
        yield
    finally:
        if os.getpid() == owner:
            _release(path, made)


def tidy(*outputs: Path) -> None:
    """Remove the lock files of killed processes; those of running processes are kept."""
    for output in outputs:
        with contextlib.suppress(InUseError, ModelOptConfigError), lock(output):
            pass


def release_all() -> None:
    """Release all locks of this process before it ends without unwinding (``os._exit``)."""
    for path, (descriptor, _) in list(_held.items()):
        del _held[path]
        if descriptor >= 0:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _lock_file(output: Path) -> tuple[Path, list[Path]]:
    """Return the path of the lock file and the folders that were created for it, innermost first."""
    made = []
    above = output.parent
    while not above.exists():
        made.append(above)
        above = above.parent
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelOptConfigError(f"{output} cannot be written: {error.strerror}: {error.filename}.") from None
    # The parent of a mounted folder may not be writable.
    inside = output.is_dir() and not os.access(output.parent, os.W_OK)
    return (output / ".lock" if inside else output.with_name(f".{output.name}.lock")), made


def _acquire(path: Path, output: Path, patience_s: float) -> int:
    """Return the descriptor of the locked file, or -1 if the file system has no locks."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise ModelOptConfigError(f"{output} cannot be locked: {path}: {error.strerror}.") from None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 4096, 0)
            os.close(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                _warn_without_locks(output, error)
                return -1
            if time.monotonic() >= deadline:
                raise InUseError(_in_use(output, holder)) from None
            time.sleep(0.2)
            continue
        if _is_same(descriptor, path):
            break
        os.close(descriptor)  # its holder removed the file after it was opened here
    content = {"lock": str(output), "pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
    if not _is_lock(os.pread(descriptor, 4096, 0)):
        os.close(descriptor)
        raise ModelOptConfigError(f"{path} is not a lock of this package; move it away.")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(content).encode(), 0)
    return descriptor


def _warn_without_locks(output: Path, error: OSError) -> None:
    """Warn about a file system without locks, for example Lustre mounted without "flock"."""
    logging.getLogger(__name__).warning(
        "%s cannot be locked (%s): do not start a second run that writes to it.", output, error.strerror
    )


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _is_lock(content: bytes) -> bool:
    """Return whether a file is empty or contains what `_acquire` writes, possibly truncated by a kill."""
    return content.startswith(b'{"lock": ') or not content.strip(b"\0")


def _in_use(output: Path, holder: bytes) -> str:
    """Return the message about a held output."""
    try:
        found = json.loads(holder)
        age = max(0, round(time.time() - float(found["since"])))
        who = f"process {int(found['pid'])} on host {found['host']}, for {_duration(age)}"
    except (ValueError, TypeError, KeyError):
        who = "another process"  # the holder has not written its number yet
    return f"{output} is in use by another run ({who}); wait for it, stop it, or choose another folder"


def _duration(seconds: int) -> str:
    if seconds < 120:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 7200 else f"{seconds // 3600} h"


def _release(path: Path, made: list[Path]) -> None:
    if path not in _held:
        return
    entry = _held[path]
    entry[1] -= 1
    if entry[1]:
        return
    del _held[path]
    if entry[0] >= 0:
        path.unlink(missing_ok=True)  # while it is locked: a process that has already opened it notices the removal
        os.close(entry[0])
    for folder in made:
        with contextlib.suppress(OSError):
            folder.rmdir()  # fails, as it should, if something was written

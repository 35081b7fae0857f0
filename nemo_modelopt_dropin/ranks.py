"""The rank of this process as its launcher set it: torchrun, Slurm, or a command. Standard library only."""

from __future__ import annotations

import os

# Set for the ranks that a command starts itself, to their number; the parent then prints what concerns the whole job.
STARTED_BY_US = "NEMO_MODELOPT_LOCAL_RANKS"
_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_PREFIXES = ("TORCHELASTIC_", "SLURM_")


def number() -> int:
    """Return the rank of this process; 0 if it runs alone."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """Return whether this process is rank zero or runs alone."""
    return number() == 0


def is_rank() -> bool:
    """Return whether this process is one rank of a job (torchrun, Slurm with torchrun, or a command's own ranks)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_started_by_us() -> bool:
    """Return whether a command of this package started this rank."""
    return STARTED_BY_US in os.environ


def leads() -> bool:
    """Return whether this process reports for the job: rank zero, unless the command that started the ranks does."""
    return is_first() and not is_started_by_us()


def is_launchers(variable: str) -> bool:
    """Return whether a launcher sets this environment variable for a rank; a process with it takes itself for one."""
    return variable in _VARIABLES or variable.startswith(_PREFIXES)

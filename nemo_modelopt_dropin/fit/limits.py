"""Parse budgets: ``600MB`` and ``22GiB`` for bytes, ``15ms`` for a time, ``0.5x`` for a share of the original."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nemo_modelopt_dropin.errors import ModelOptConfigError
from nemo_modelopt_dropin.preflight import shard_sizes

DISK, MEMORY, LATENCY = "disk", "memory", "latency"
KINDS = (DISK, MEMORY, LATENCY)
_SHARE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*x")
_TIME = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(us|ms|s)")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True)
class Limit:
    """One budget.

    Attributes:
        kind: One of `KINDS`.
        value: Bytes, or seconds for a token, or a share of the original model's figure.
        relative: Whether it is a share.
        text: As it was written.
    """

    kind: str
    value: float
    relative: bool
    text: str

    def resolved(self, original: float) -> float:
        """Return the budget in bytes or seconds.

        Args:
            original: The original model's figure in 16 bits.
        """
        return self.value * original if self.relative else self.value


def parse(kind: str, value: str) -> Limit:
    """Return a budget.

    Args:
        kind: One of `KINDS`.
        value: Such as ``"600MB"``, ``"22GiB"``, ``"15ms"`` or ``"0.5x"``.

    Raises:
        ModelOptConfigError: If it is not a budget of this kind; the message says what to use.
    """
    text = str(value).strip().lower()
    if share := _SHARE.fullmatch(text):
        if not 0 < float(share[1]) < 1:
            raise ModelOptConfigError(
                f"{kind} {value}: a share of the original model lies between 0x and 1x, such as 0.5x."
            )
        return Limit(kind, float(share[1]), True, str(value))
    if kind == LATENCY:
        found = _TIME.fullmatch(text)
        if not found or not float(found[1]):
            raise ModelOptConfigError(
                f"{kind} {value} is not a time per token; use a number and a unit, such as '15ms', or a share of the "
                "original model's, such as '0.5x'."
            )
        return Limit(kind, float(found[1]) * _SECONDS[found[2]], False, str(value))
    try:
        return Limit(kind, shard_sizes.parse(text), False, str(value))
    except ValueError:
        raise ModelOptConfigError(
            f"{kind} {value} is not a number of bytes; use a number and a unit, such as '600MB' or '22GiB', or a share "
            "of the original model's in 16 bits, such as '0.5x'."
        ) from None


def problems(given: dict[str, str | None]) -> list[str]:
    """Return what is wrong with the budgets by kind, in a list that is empty for valid ones and for None."""
    found = []
    for kind, value in given.items():
        try:
            if value is not None:
                parse(kind, value)
        except ModelOptConfigError as error:
            found.append(str(error).rstrip("."))
    return found

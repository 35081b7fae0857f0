"""The layout at which importance is measured: every rank holds whole layers, so the ranks are pipeline stages.

A NeMo checkpoint loads at any layout: the checkpoint of a tensor-parallel run is restored as pipeline stages, and the
pruned checkpoint loads at the original tensor-parallel size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_modelopt_dropin.preflight import model_sizes

FIRST, LAST = model_sizes.STAGES
# Arguments of ``llm.prune`` that set the layout.
NAMES = ("tp_size", "pp_size", FIRST, LAST)


def for_importance(checkpoint: str | Path, ranks: int) -> dict[str, int | None]:
    """Return the layout with one pipeline stage on each rank, as arguments of ``llm.prune``.

    Args:
        checkpoint: The model to prune; only its configuration is read.
        ranks: Number of ranks.

    Raises:
        ValueError: If there are more ranks than layers.
    """
    even: dict[str, int | None] = {"tp_size": 1, "pp_size": ranks, FIRST: None, LAST: None}
    return even | model_sizes.unequal_stages(checkpoint, ranks)


def problems(checkpoint: str | Path, ranks: int) -> list[str]:
    """Return why the model cannot be split into one pipeline stage per rank, in a list that is empty if it can."""
    try:
        for_importance(checkpoint, ranks)
    except ValueError as error:
        return [f"{error}; importance is measured on whole layers, one pipeline stage per rank: use fewer devices"]
    return []


def used(checkpoint: str | Path, ranks: int, requested: Mapping[str, Any], by_importance: bool) -> dict[str, Any]:
    """Return the layout that a run uses: the requested one, unless importance is to be measured at TP > 1.

    Args:
        checkpoint: The model to prune; only its configuration is read.
        ranks: Number of ranks.
        requested: Value of each of `NAMES`.
        by_importance: Whether importance is measured; dropping layers by number needs no measurement.

    Raises:
        ValueError: If there are more ranks than layers.
    """
    if requested["tp_size"] == 1 or not by_importance:
        return dict(requested)
    return for_importance(checkpoint, ranks)


def note(tp: int, layout: Mapping[str, Any]) -> str:
    """Return a sentence that describes the layout used instead of ``tp`` tensor-parallel ranks."""
    stages, first, last = layout["pp_size"], layout[FIRST], layout[LAST]
    unequal = f" ({first} layers in the first, {last} in the last)" if first else ""
    return (
        f"Importance is measured on whole layers: instead of TP={tp} the checkpoint is restored at TP=1 with {stages} "
        f"pipeline stages{unequal}. The pruned checkpoint loads at TP={tp} as well as at any other layout."
    )


def announce(tp: int, layout: Mapping[str, Any]) -> None:
    """Log the `note` if the layout differs from the requested one."""
    from nemo.utils import logging

    if layout["tp_size"] != tp:
        logging.warning(note(tp, layout))

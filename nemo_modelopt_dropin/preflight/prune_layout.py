"""The layout that importance is measured at: whole layers on every rank, so ranks are pipeline stages and nothing else.

A NeMo checkpoint loads at any layout: one of a tensor-parallel run is restored here as pipeline stages, and the pruned
one loads at the tensor-parallel size of before.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nemo_modelopt_dropin.preflight import model_sizes

FIRST, LAST = model_sizes.STAGES


def for_importance(checkpoint: str | Path, ranks: int) -> dict[str, int | None]:
    """Return the layout of ``ranks`` pipeline stages, as arguments of ``llm.prune``.

    Args:
        checkpoint: the model to prune; only its configuration is read.
        ranks: number of ranks.

    Raises:
        ValueError: for more ranks than the model has layers.
    """
    even: dict[str, int | None] = {"tp_size": 1, "pp_size": ranks, FIRST: None, LAST: None}
    return even | model_sizes.unequal_stages(checkpoint, ranks)


def problems(checkpoint: str | Path, ranks: int) -> list[str]:
    """Say where so many ranks cannot be pipeline stages of the model."""
    try:
        for_importance(checkpoint, ranks)
    except ValueError as error:
        return [f"{error}; importance is measured on whole layers, one stage a rank: give fewer devices"]
    return []


def of(given: argparse.Namespace) -> dict[str, Any]:
    """Return the layout that prune.py runs at: as asked for, unless importance is to be measured at TP > 1."""
    if given.tp_size == 1 or given.drop_layers:
        return {name: getattr(given, name) for name in ("tp_size", "pp_size", FIRST, LAST)}
    return for_importance(given.restore_path, given.devices * given.num_nodes)


def note(tp: int, layout: dict[str, Any]) -> str:
    """Return the sentence that says what is restored how, in place of ``tp`` tensor-parallel ranks."""
    stages, first, last = layout["pp_size"], layout[FIRST], layout[LAST]
    unequal = f" ({first} layers in the first, {last} in the last)" if first else ""
    return (
        f"Importance is measured on whole layers: instead of TP={tp} the checkpoint is restored at TP=1 with {stages} "
        f"pipeline stages{unequal}. The pruned checkpoint loads at TP={tp} as well as at any other layout."
    )


def announce(tp: int, layout: dict[str, Any]) -> None:
    """Log the `note` where the layout is another one than was asked for."""
    from nemo.utils import logging

    if layout["tp_size"] != tp:
        logging.warning(note(tp, layout))

"""Read the importance of layers and units from the report that the pruner writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_KINDS = {"ffn_hidden_size": "ffn", "num_attention_heads": "attention"}


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the importance that a pruning measured; {} if it measured none.

    Args:
        folder: the folder with the report of the pruning.

    Returns:
        ``layers`` (score and fate), ``units`` (importance relative to the best unit of the layer) and ``candidates``.
    """
    file = folder / "report.json"
    if not file.is_file():
        return {}
    report = json.loads(file.read_text(encoding="utf-8"))
    if "layer_scores" not in report:
        return {}
    return {
        "layers": layers(report["layer_scores"], report["kept_layers"]),
        "units": units(report.get("hparam_scores", {})),
        "candidates": report.get("candidates", []),
    }


def layers(scores: Mapping[str, float], kept: list[int]) -> list[dict[str, Any]]:
    """Return number, score and fate of each layer."""
    return [
        {"layer": int(layer), "score": score, "fate": "kept" if int(layer) in kept else "dropped"}
        for layer, score in scores.items()
    ]


def units(curves: Mapping[str, Mapping[str, list[float]]]) -> list[dict[str, Any]]:
    """Return, per kind of unit and layer, the importance of units in descending order, as shares of the best."""
    return [
        {"kind": kind, "layer": int(layer), "shares": [round(value / max(curve[0], 1e-12), 4) for value in curve]}
        for hparam, kind in sorted(_KINDS.items(), key=lambda pair: pair[1])
        for layer, curve in curves.get(hparam, {}).items()
    ]

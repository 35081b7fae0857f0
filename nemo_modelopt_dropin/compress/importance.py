"""What pruning by importance measured, as numbers for the report: a score a layer, a profile of each layer's units.

The scores are those that modelopt's Minitron search keeps: block influence of layers (arXiv 2403.03853) and norms of
activations of units (arXiv 2407.14679).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_BINS = 32
_MODULE = re.compile(r"decoder\.layers\.(\d+)\.(self_attention|mlp)$")
_KINDS = {"mlp": "ffn", "self_attention": "attention"}


def read(folder: Path, kept: int) -> dict[str, list[dict[str, Any]]]:
    """Return ``layers`` (score and fate) and ``units`` (shares of the layer's best); empty where nothing was measured.

    Args:
        folder: where pruning kept its scores, written by this job.
        kept: layers that are left.
    """
    files = sorted(folder.glob("scores*.pth"))
    if not files:
        return {}
    import torch

    scores = torch.load(files[0], map_location="cpu", weights_only=False)
    return {
        "layers": layers(scores.get("layer_scores") or {}, kept),
        "units": units(scores.get("activations_per_rank") or []),
    }


def layers(scores: dict[int, Any], kept: int) -> list[dict[str, Any]]:
    """Return number, score and fate of each layer: pruning keeps those with the highest scores."""
    best = sorted(scores, key=lambda layer: float(scores[layer]), reverse=True)[:kept]
    return [
        {"layer": layer, "score": float(score), "fate": "kept" if layer in best else "dropped"}
        for layer, score in sorted(scores.items())
    ]


def units(per_rank: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return for each kind of units and layer how important they are, from most to least, as shares of the best.

    Args:
        per_rank: of each pipeline stage, module name -> scores `[units]`; layers are numbered within the stage.
    """
    found, before = [], 0
    for stage in per_rank:
        known = [(match, scores) for name, scores in stage.items() if (match := _MODULE.search(str(name)))]
        for match, scores in known:
            ordered = sorted(scores.flatten().tolist(), reverse=True)
            count = min(_BINS, len(ordered))
            places = [i * (len(ordered) - 1) // max(1, count - 1) for i in range(count)]
            shares = [ordered[place] / max(ordered[0], 1e-12) for place in places]
            layer = before + int(match[1]) + 1
            found.append({"kind": _KINDS[match[2]], "layer": layer, "shares": [round(share, 4) for share in shares]})
        before += len({match[1] for match, _ in known})
    return sorted(found, key=lambda one: (one["kind"], one["layer"]))

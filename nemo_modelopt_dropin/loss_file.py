"""Files of distillation settings before NeMo is imported: their names, and what they ask for in words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from nemo_modelopt_dropin.command_line import nearest

# The fields of DistillationConfig.
SETTINGS = (
    "intermediate_layer_pairs",
    "logit_layers",
    "skip_lm_loss",
    "kd_loss_scale",
    "criterion",
    "loss_balancer",
    "logit_kl_temperature",
    "logit_kl_direction",
    "logit_kl_temperature_squared",
    "logit_kl_topk",
    "logit_kl_in_place",
    "loss_weights",
    "fused_logits",
    "validation_metrics",
)
# The index of a layer in a path of modules: the first number that is a whole component.
LAYER_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")
_DIVERGENCES = {"forward": "KL(teacher || student)", "reverse": "KL(student || teacher)", "jsd": "Jensen-Shannon"}


def read(path: str | None) -> dict[str, Any]:
    """Return the settings in a file, none where there is no file.

    Raises:
        ValueError: where it cannot be read, or holds no settings by name.
    """
    import yaml

    try:
        settings = (yaml.safe_load(Path(path).read_text(encoding="utf-8")) if path else None) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings by name")
    return settings


def problems(path: str | None) -> list[str]:
    """Return what is wrong with a file's form and names; a file that is missing is another's to tell."""
    if not path or not Path(path).is_file():
        return []
    try:
        unknown = [str(name) for name in read(path) if name not in SETTINGS]
    except ValueError as error:
        return [str(error)]
    return [f"{path}: unknown setting {name!r}{nearest(name, SETTINGS)}" for name in unknown]


def describe(path: str | None) -> str:
    """Return in words what is minimised."""
    try:
        asked = {"logit_kl_direction": "forward", "logit_kl_temperature": 1.0, "skip_lm_loss": True, **read(path)}
    except ValueError as error:
        return f"unknown: {error}"
    kind = _DIVERGENCES.get(asked["logit_kl_direction"], asked["logit_kl_direction"])
    parts = [f"{kind} of the logits at temperature {asked['logit_kl_temperature']}"]
    if asked.get("logit_kl_topk"):
        parts[0] += f", the teacher's top {asked['logit_kl_topk']}"
    for pair in asked.get("intermediate_layer_pairs") or []:
        if isinstance(pair, list) and len(pair) in (2, 3):
            parts.append(f"{(*pair, 'cosine')[2]} of {pair[0]} to {pair[1]}")
    return "; ".join([*parts, "no LM loss" if asked["skip_lm_loss"] else "LM loss"])

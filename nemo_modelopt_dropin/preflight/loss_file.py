"""Check and describe files of distillation settings before NeMo is imported."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nemo_modelopt_dropin.errors import did_you_mean

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
    "allow_other_tokenizer",
    "logit_kl_beta",
    "logit_kl_vocabulary",
)
# Values of logit_kl_vocabulary.
SAME, ALIGNED_TEXT = "same", "aligned-text"
VOCABULARIES = (SAME, ALIGNED_TEXT)
# Settings that a comparison over different vocabularies restricts: the values that it can have, the default or the only
# one first, and why.
NOT_ALIGNED: dict[str, tuple[tuple[Any, ...], str]] = {
    "skip_lm_loss": (
        (False,),
        "only the next-token loss shows which sorted probability belongs to which token",
    ),
    "intermediate_layer_pairs": (([], (), None), "layer pairs compare the models token by token"),
    "logit_kl_direction": (("forward",), "the distance of sorted probabilities has no direction"),
    "logit_kl_topk": ((None,), "the distance is over all entries"),
    "logit_kl_in_place": ((False,), "the next-token loss needs the logits"),
    "fused_logits": (("auto", "off", False), "the distance is not fused with the output layers"),
    "validation_metrics": ((False,), "the teacher does not run in validation"),
}
# Index of the layer in a module path: the first component that is a number.
LAYER_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")
_DIVERGENCES = {"forward": "KL(teacher || student)", "reverse": "KL(student || teacher)", "jsd": "Jensen-Shannon"}


def read(path: str | None) -> dict[str, Any]:
    """Return the settings in a file.

    Args:
        path: The file; None for no settings.

    Raises:
        ValueError: If the file cannot be read, or is not a mapping of settings.
    """
    import yaml

    try:
        settings = (yaml.safe_load(Path(path).read_text(encoding="utf-8")) if path else None) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must map names of settings to values")
    return settings


def problems(path: str | None) -> list[str]:
    """Return what is wrong with a file's form, names and values; a missing file is reported elsewhere."""
    if not path or not Path(path).is_file():
        return []
    try:
        settings = read(path)
    except ValueError as error:
        return [str(error)]
    unknown = [str(name) for name in settings if name not in SETTINGS]
    found = [f"{path}: unknown setting {name!r}{did_you_mean(name, SETTINGS)}" for name in unknown]
    for name, value in settings.items():
        legal, what = _VALUES.get(name, (None, ""))
        if legal is not None and not legal(value):
            found.append(f"{path}: {name} must be {what}, got {value!r}")
    if settings.get("logit_kl_vocabulary") == ALIGNED_TEXT:
        # Of these settings only skip_lm_loss has a default that does not fit.
        allowed = {name: values[0] for name, (values, _) in NOT_ALIGNED.items()}
        wrong = aligned_problems({**allowed, "skip_lm_loss": True, **settings})
        found += [f"{path}: logit_kl_vocabulary: {ALIGNED_TEXT} needs other settings: {one}" for one in wrong]
    if settings.get("logit_kl_beta") is not None and settings.get("logit_kl_direction") != "jsd":
        found.append(f"{path}: logit_kl_beta needs logit_kl_direction: jsd")
    return found


def aligned_problems(settings: Mapping[str, Any]) -> list[str]:
    """Return what a comparison over different vocabularies cannot have among settings with their defaults filled in."""
    return [
        f"set {name} to {json.dumps(allowed[0])}: {why}"
        for name, (allowed, why) in NOT_ALIGNED.items()
        if settings.get(name) not in allowed
    ]


def _is_positive(value: Any) -> bool:
    return 0 < _number(value) < math.inf


def _number(value: Any) -> float:
    try:  # YAML 1.1 reads 1e-1 as text
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _is_pair(value: Any) -> bool:
    words = isinstance(value, list) and all(isinstance(part, str) for part in value)
    return words and len(value) in (2, 3) and (len(value) == 2 or value[2] in _PAIR_LOSSES)


_PAIR_LOSSES = ("cosine", "mse")
_SWITCH = (_is_switch, "true or false")
_POSITIVE = (_is_positive, "a positive number")
# Checks of single values; the configuration makes the others.
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "kd_loss_scale": _POSITIVE,
    "logit_kl_temperature": _POSITIVE,
    "skip_lm_loss": _SWITCH,
    "logit_kl_temperature_squared": _SWITCH,
    "logit_kl_in_place": _SWITCH,
    "validation_metrics": _SWITCH,
    "allow_other_tokenizer": _SWITCH,
    "logit_kl_vocabulary": (lambda value: value in VOCABULARIES, f"one of {', '.join(VOCABULARIES)}"),
    "logit_kl_direction": (lambda value: value in [*_DIVERGENCES], f"one of {', '.join(_DIVERGENCES)}"),
    "logit_kl_beta": (lambda value: value is None or 0 <= _number(value) <= 1, "a number between 0 and 1"),
    "logit_kl_topk": (lambda value: value is None or (type(value) is int and value > 0), "a positive whole number"),
    "fused_logits": (lambda value: value in ("auto", "on", "off", True, False), "auto, on or off"),
    "intermediate_layer_pairs": (
        lambda value: isinstance(value, list) and all(map(_is_pair, value)),
        f"a list of [student layer, teacher layer] or [.., .., loss], the loss one of {', '.join(_PAIR_LOSSES)}",
    ),
}


def describe(path: str | None) -> str:
    """Return a description of the losses."""
    try:
        asked = {"logit_kl_direction": "forward", "logit_kl_temperature": 1.0, "skip_lm_loss": True, **read(path)}
    except ValueError as error:
        return f"unknown: {error}"
    kind = _DIVERGENCES.get(asked["logit_kl_direction"], asked["logit_kl_direction"])
    if asked.get("logit_kl_beta") is not None:
        kind += f" with beta {asked['logit_kl_beta']}"
    if asked.get("logit_kl_vocabulary") == ALIGNED_TEXT:
        kind = "distance of sorted probabilities, by aligned text,"
    parts = [f"{kind} of the logits at temperature {asked['logit_kl_temperature']}"]
    if asked.get("logit_kl_topk"):
        parts[0] += f", the teacher's top {asked['logit_kl_topk']}"
    for pair in asked.get("intermediate_layer_pairs") or []:
        if isinstance(pair, list) and len(pair) in (2, 3):
            parts.append(f"{(*pair, 'cosine')[2]} of {pair[0]} to {pair[1]}")
    return "; ".join([*parts, "no LM loss" if asked["skip_lm_loss"] else "LM loss"])

"""Check that requested sizes and layouts fit a model, from its configuration alone. Nothing heavy is imported."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemo_modelopt_dropin.preflight import budget, families, loss_file, model_sizes
from nemo_modelopt_dropin.preflight.model_sizes import Shape

# Widths that GPU kernels compute fastest at a multiple of `TENSOR_CORE_MULTIPLE`.
ROUNDED = ("hidden_size", "ffn_hidden_size", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
TENSOR_CORE_MULTIPLE = 8
_ROUND_TO = 64
Targets = Mapping[str, int | float | None]


def size_step(name: str, original: int) -> int:
    """Return the number of which all sizes that a search chooses are multiples."""
    if name not in ROUNDED:
        return 1
    if original % _ROUND_TO == 0 and original >= 16 * _ROUND_TO:
        return _ROUND_TO
    return TENSOR_CORE_MULTIPLE if original % TENSOR_CORE_MULTIPLE == 0 else 1


def legal_heads(heads: int, groups: int, target_groups: int) -> list[int]:
    """Return the numbers of attention heads that a model of ``heads`` in ``groups`` can be pruned to."""
    return [target_groups * n for n in range(1, heads // groups + 1)]


def target_problems(shape: Shape | None, targets: Targets, budget_too: bool = False) -> list[str]:
    """Return one sentence for each target that the model cannot be pruned to, with the names of the flags.

    Args:
        shape: The model, None if unknown.
        targets: Sizes or fractions of the model's sizes; None for those that are not set.
        budget_too: Whether a search chooses other sizes to reach a number of parameters.
    """
    asked = {name: size for name, size in targets.items() if size is not None}
    if shape is not None and shape.experts and "target_ffn_hidden_size" in asked:
        return ["target_ffn_hidden_size: all layers of this model have experts; set target_moe_ffn_hidden_size"]
    # A shape without experts has zero of them: the library reports a size that the model lacks.
    own: dict[str, Any] = {name: getattr(shape, model_sizes.field_of(name), None) or None for name in asked}
    given = {name: size for name, size in asked.items() if own[name] is not None}
    found = [f"{name} {size} is above the model's {own[name]}" for name, size in given.items() if size > own[name]]
    heads, groups = targets.get("target_num_attention_heads"), targets.get("target_num_query_groups")
    if shape is not None and not found and isinstance(heads, int) and not isinstance(groups, float):
        allowed = legal_heads(shape.num_attention_heads, shape.num_query_groups, groups or shape.num_query_groups)
        if heads not in allowed:
            found.append(
                f"target_num_attention_heads {heads} is not possible with {groups or shape.num_query_groups} query "
                f"groups; allowed for this model's {shape.num_attention_heads} heads in "
                f"{shape.num_query_groups} groups: {', '.join(map(str, allowed))}"
            )
    kept = all(own[name] == size for name, size in asked.items())
    if asked and kept and not budget_too:
        found.append(f"{', '.join(given)}: all are the model's own sizes, there is nothing to prune")
    return found


def family_problems(checkpoint: str | Path | None, targets: Targets, budget_too: bool = False) -> list[str]:
    """Return one sentence for each reason why a model of this family cannot be pruned to the targets.

    Args:
        checkpoint: The model; only its configuration is read.
        targets: Sizes or fractions of the model's sizes; None for those that are not set.
        budget_too: Whether a search chooses other sizes to reach a number of parameters.
    """
    asked, config = [name for name, size in targets.items() if size is not None], model_sizes.config_of(checkpoint)
    found = families.prune_problems(config, asked, budget_too)
    if kept := families.kept_by_mtp(config, asked, budget_too):
        found.append(
            f"{', '.join(kept)}: modelopt does not prune the multi-token-prediction block of this model "
            f"(mtp_num_layers={families.mtp_layers(config)}); set target_num_layers or drop_layers"
        )
    return found


def file_problems(checkpoint: str | Path | None, algorithm: str, export_format: str) -> list[str]:
    """Return why a model cannot be written in the requested format after quantization.

    Args:
        checkpoint: The model; only its configuration is read.
        algorithm: Name of the algorithm.
        export_format: The format.
    """
    config = model_sizes.config_of(checkpoint) if export_format == "hf" else {}
    problem = families.file_problem(config, algorithm)
    return [f"{algorithm} cannot be exported as hf: {problem}. Use the format nemo"] if problem else []


def drop_problems(layers: int | None, dropped: Sequence[int] | None) -> list[str]:
    """Return what is wrong with the numbers of the layers to drop.

    Args:
        layers: Number of layers of the model, None if unknown.
        dropped: Layers to drop, counted from 1.
    """
    if not dropped:
        return []
    found = []
    wrong = [n for n in dropped if n < 1 or (layers is not None and n > layers)]
    twice = sorted({n for n in dropped if [*dropped].count(n) > 1})
    if wrong:
        end = f"; the model has layers 1 to {layers}" if layers is not None else "; the first layer is 1"
        found.append(f"drop_layers: there is no layer {', '.join(map(str, wrong))}{end}")
    if twice:
        found.append(f"drop_layers: {', '.join(map(str, twice))} listed more than once")
    if not found and layers is not None and len(dropped) >= layers:
        found.append(f"drop_layers: these are all {layers} layers; keep at least one")
    return found


def size_multiples(shape: Shape | None, tp: int, block: int | None, to_hf: bool = True) -> dict[str, int]:
    """Return the number of which each size must be a multiple so that every rank holds whole blocks of weights.

    Args:
        shape: The original model, None if unknown.
        tp: Tensor-parallel ranks.
        block: Weights that share a scale along a layer's inputs; None for formats without blocks.
        to_hf: See `block_problems`.
    """
    if shape is None or min(tp, block or 1) < 1:
        return {}
    unit = (block or 1) if to_hf or tp > 1 else 1
    heads = math.lcm(tp, unit * tp // math.gcd(unit * tp, shape.kv_channels))
    found = {"hidden_size": unit if to_hf else 1, "ffn_hidden_size": unit * tp, "num_attention_heads": heads}
    if shape.experts:
        found["moe_ffn_hidden_size"] = unit * tp
    return {name: multiple for name, multiple in found.items() if multiple > 1}


def _least(step: int, multiple: int, size: int) -> int:
    """Return the smallest size that a search tries, the original one if there is none below it."""
    return min(math.lcm(step, multiple), size)


def smallest(shape: Shape, targets: Targets, multiples: Mapping[str, int] | None = None) -> Shape:
    """Return the smallest shape that a search of sizes reaches; sizes set in ``targets`` are kept.

    Args:
        shape: The original model.
        targets: Sizes or fractions of the model's sizes; None for those that are not set.
        multiples: Result of `size_multiples`.
    """
    need = multiples or {}
    joint = shape.num_query_groups == shape.num_attention_heads
    # Without query groups every head is its own group.
    groups = 1 if joint else shape.num_query_groups
    heads = _least(groups, need.get("num_attention_heads", 1), shape.num_attention_heads)
    widths = {
        name: _least(size_step(name, getattr(shape, name)), need.get(name, 1), getattr(shape, name))
        for name in ("hidden_size", "ffn_hidden_size")
    }
    least: dict[str, Any] = {
        **widths,
        "num_layers": 1,
        "num_attention_heads": heads,
        "num_query_groups": heads if joint else groups,
        "experts": min(1, shape.experts),
        "shared_expert_size": 0,
    }
    fixed = {model_sizes.field_of(name) for name, size in targets.items() if size is not None}
    wanted = shape.pruned(targets)
    return replace(shape, **{name: getattr(wanted, name) if name in fixed else size for name, size in least.items()})


def budget_problems(
    shape: Shape | None, limit: Any, targets: Targets, multiples: Mapping[str, int] | None = None
) -> list[str]:
    """Return why a model cannot be pruned to a number of parameters.

    Args:
        shape: The model, None if unknown.
        limit: Value of ``target_params``.
        targets: Sizes or fractions of the model's sizes; None for those that are not set.
        multiples: Result of `size_multiples`.
    """
    if shape is None or limit is None or budget.problem("", limit):
        return []
    number = budget.parse(limit)
    most = int(number * shape.parameters if number < 1 else number)
    if most >= shape.parameters:
        return [f"target_params {limit} is {most:,} parameters, not fewer than the model's {shape.parameters:,}"]
    least = smallest(shape, targets, multiples).parameters
    if most < least:
        return [
            f"target_params {limit} is {most:,} of the model's {shape.parameters:,} parameters; no "
            f"sizes go below {least:,}, because embedding and output layer keep the whole vocabulary"
            + "".join(f"; {name} must be a multiple of {number}" for name, number in (multiples or {}).items())
            + ("; set fewer target_* sizes" if any(size is not None for size in targets.values()) else "")
        ]
    return []


def split_problems(path: str | Path | None, tp: int, pp: int) -> list[str]:
    """Return why a model cannot be split over tensor-parallel ranks and pipeline stages."""
    if min(tp, pp) < 1:
        return []  # reported with the layout
    shape, found = model_sizes.known(path), []
    if shape is not None and shape.num_attention_heads % tp:
        found.append(f"{shape.num_attention_heads} attention heads of {path} cannot be split over tp {tp}")
    elif shape is not None and shape.num_query_groups % tp:
        found.append(f"{shape.num_query_groups} query groups of {path} cannot be split over tp {tp}")
    if shape is not None and shape.num_layers < pp:
        found.append(f"{shape.num_layers} layers of {path} cannot be split over pp {pp}")
    return found


def block_problems(
    shape: Shape | None,
    tp: int,
    block: int | None,
    to_hf: bool = True,
    option: str | None = "--awq_block_size",
    chosen: bool = False,
) -> list[str]:
    """Return the layers whose inputs, on each of the tp ranks, are not a multiple of the block of weights.

    Returns [] for no blocks (None), and for numbers below 1, which are reported elsewhere.

    Args:
        shape: The model's sizes, None if unknown.
        tp: Tensor-parallel size.
        block: Weights that share a scale.
        to_hf: Whether hf files are written, which hold whole blocks only. Elsewhere a row may end with a shorter block,
            unless ranks split the row there: no other tensor-parallel size could restore the scales.
        option: Flag that sets the block; None if the algorithm's is fixed.
        chosen: Whether a search will choose the sizes: then only a model that is too small is a problem.
    """
    if shape is None or block is None or min(tp, block) < 1:
        return []
    widths = {
        "hidden_size": (shape.hidden_size, 1),
        "ffn_hidden_size": (shape.ffn_hidden_size, tp),
        "attention heads x channels": (shape.num_attention_heads * shape.kv_channels, tp),
    }
    if not to_hf:
        widths = {name: size for name, size in widths.items() if size[1] > 1}
    fitting = _searched(shape, size_multiples(shape, tp, block, to_hf)) if chosen else {}
    smaller = f", or a smaller tp than {tp}" if tp > 1 else ""
    found = []
    for name, (width, parts) in widths.items():
        if width % (block * parts) and not fitting.get(name):
            start = f"blocks of {block} ({(option or 'fixed for int4').lstrip('-')})"
            common = math.gcd(width // parts, block)
            advice = f"use {option} {common}" if option else f"use int4_awq with a block size of {common}"
            found.append(
                f"{start} do not divide the {width // parts} inputs on each rank of layers after {name}; {advice}"
                f"{smaller}"
            )
    return found


def _searched(shape: Shape, multiples: Mapping[str, int]) -> dict[str, bool]:
    """Return whether a search finds any valid size, by the names of `block_problems`."""
    groups = 1 if shape.num_query_groups == shape.num_attention_heads else shape.num_query_groups
    steps = {
        "hidden_size": ("hidden_size", size_step("hidden_size", shape.hidden_size)),
        "ffn_hidden_size": ("ffn_hidden_size", size_step("ffn_hidden_size", shape.ffn_hidden_size)),
        "attention heads x channels": ("num_attention_heads", groups),
    }
    return {
        name: math.lcm(step, multiples.get(hparam, 1)) <= getattr(shape, hparam)
        for name, (hparam, step) in steps.items()
    }


def pair_problems(loss_path: str | None, layers: Mapping[str, int | None]) -> list[str]:
    """Return the layers in a file of losses that the student or the teacher lacks.

    Args:
        loss_path: The file.
        layers: Number of layers of the "student" and the "teacher", None if unknown.
    """
    try:
        pairs = loss_file.read(loss_path).get("intermediate_layer_pairs") or []
    except ValueError:
        return []  # reported by `loss_file.problems`
    found = []
    for pair in pairs if isinstance(pairs, list) else []:
        for name, (whose, number) in zip(pair if isinstance(pair, list) else [], layers.items(), strict=False):
            index = loss_file.LAYER_INDEX.search(str(name))
            if index and number is not None and int(index.group()) >= number:
                found.append(
                    f"{loss_path}: there is no layer {name!r}: the {whose} has {number} layers, counted from 0"
                )
    return found

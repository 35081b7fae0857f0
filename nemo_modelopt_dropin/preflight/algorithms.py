"""The table of quantization algorithms. Standard library only.

The choices of the commands, the checks of sizes, the estimates of bytes, the presets, the formats of Hugging Face files
and the table in the documentation are all made from it: a new algorithm is one entry here. Print the table of the
documentation with ``python -m nemo_modelopt_dropin.preflight.algorithms``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nemo_modelopt_dropin import versions
from nemo_modelopt_dropin.errors import ModelOptConfigError, suggestion
from nemo_modelopt_dropin.preflight import readers

# Names of ptq.py for "leave the model as it is" and for the search that chooses a format for each layer.
NO_QUANT = "no_quant"
AUTO = "auto"
# Values of the setting of the layout; `AUTO` is the layout that most servers read.
LAYOUT_CHOICES = (AUTO, *readers.LAYOUTS)


@dataclass(frozen=True)
class HfFormat:
    """One format of quantized weights in Hugging Face files; its name is modelopt's ``quant_algo``.

    Which programs read it is in `readers`.

    Attributes:
        layouts: Names of the layouts that can hold it, see `readers.LAYOUTS`.
        label: What is written in it, if no algorithm is.
    """

    layouts: tuple[str, ...] = (readers.MODELOPT,)
    label: str = ""


HF_FORMATS: dict[str, HfFormat] = {
    "FP8": HfFormat(layouts=readers.LAYOUTS),
    "FP8_PER_CHANNEL_PER_TOKEN": HfFormat(layouts=readers.LAYOUTS),
    "FP8_WO": HfFormat(layouts=(readers.COMPRESSED_TENSORS,)),
    "FP8_PB_WO": HfFormat(layouts=readers.LAYOUTS),
    "MXFP8": HfFormat(layouts=readers.LAYOUTS),
    "W8A8_SQ_PER_CHANNEL": HfFormat(layouts=readers.LAYOUTS),
    "W8A8_PER_CHANNEL_PER_TOKEN": HfFormat(layouts=(readers.COMPRESSED_TENSORS,), label="experts of `int8`"),
    "W8A16": HfFormat(layouts=readers.LAYOUTS),
    "W4A16_AWQ": HfFormat(layouts=readers.LAYOUTS),
    "W4A8_AWQ": HfFormat(),
    "NVFP4": HfFormat(layouts=readers.LAYOUTS),
    "NVFP4_AWQ": HfFormat(),
    "W4A16_NVFP4": HfFormat(layouts=readers.LAYOUTS),
}


@dataclass(frozen=True)
class Algorithm:
    """One algorithm.

    Attributes:
        preset: modelopt's name of its quant_cfg; None if `quantization/_quant_cfg_own.py` builds it.
        weights: Format of the weights, in words.
        activations: Format of the activations, in words.
        bits: Bits of a weight on disk, including its share of the block's scale.
        hf_format: Name in `HF_FORMATS`; None if Hugging Face files cannot hold it.
        block: Weights along a layer's input that share a stored scale; None if the algorithm has no such blocks.
        block_setting: Setting that changes the block; None if it is fixed.
        needs_cuda: Whether the quantized model runs on CUDA kernels only: the CPU backend does not simulate the format.
        remark: What else to know, in a few words.
        since: First nvidia-modelopt that has the method, if it is not among the first supported ones.
    """

    preset: str | None
    weights: str
    activations: str
    bits: float
    hf_format: str | None
    block: int | None = None
    block_setting: str | None = None
    needs_cuda: bool = False
    remark: str = ""
    since: str = ""


# The presets of modelopt that are not in the table and whose formats the CPU backend does not simulate.
CUDA_PRESETS = frozenset(
    {
        "MXFP6_DEFAULT_CFG",
        "MXINT8_DEFAULT_CFG",
        "NVFP4_FOUR_OVER_SIX_CFG",
        "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG",
        "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG",
    }
)

# Stock's algorithms in stock's order, then ours.
TABLE: dict[str, Algorithm] = {
    "int8": Algorithm("INT8_DEFAULT_CFG", "INT8 by channel", "INT8", 8, "W8A8_SQ_PER_CHANNEL"),
    "int8_sq": Algorithm(
        "INT8_SMOOTHQUANT_CFG",
        "INT8 by channel",
        "INT8",
        8,
        "W8A8_SQ_PER_CHANNEL",
        remark="SmoothQuant, `sq_alpha`",
    ),
    "fp8": Algorithm("FP8_DEFAULT_CFG", "FP8 E4M3", "FP8", 8, "FP8", remark="the default"),
    "block_fp8": Algorithm("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "FP8 by block of 128 x 128", "none", 8, "FP8_PB_WO"),
    "int4_awq": Algorithm(
        "INT4_AWQ_CFG",
        "INT4 by block of `awq_block_size`",
        "none",
        4.125,
        "W4A16_AWQ",
        block=128,
        block_setting="awq_block_size",
        remark="AWQ's search over the calibration data",
    ),
    "w4a8_awq": Algorithm(
        "W4A8_AWQ_BETA_CFG",
        "INT4 by block of `awq_block_size`",
        "FP8",
        4.125,
        "W4A8_AWQ",
        block=128,
        block_setting="awq_block_size",
        remark="AWQ's search over the calibration data",
    ),
    "int4": Algorithm("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "INT4 by block of 128", "none", 4.125, "W4A16_AWQ", block=128),
    "nvfp4": Algorithm("NVFP4_DEFAULT_CFG", "NVFP4", "NVFP4", 4.5, "NVFP4"),
    "fp8_pc_pt": Algorithm(
        "FP8_PER_CHANNEL_PER_TOKEN_CFG", "FP8 by channel", "FP8 by token", 8, "FP8_PER_CHANNEL_PER_TOKEN"
    ),
    "fp8_wo": Algorithm(None, "FP8 by channel", "none", 8, "FP8_WO"),
    "int8_wo": Algorithm("INT8_WEIGHT_ONLY_CFG", "INT8 by channel", "none", 8, "W8A16"),
    "mxfp8": Algorithm("MXFP8_DEFAULT_CFG", "MXFP8", "MXFP8", 8.25, "MXFP8"),
    "nvfp4_awq": Algorithm(
        "NVFP4_AWQ_LITE_CFG", "NVFP4", "NVFP4", 4.5, "NVFP4_AWQ", remark="AWQ's search over the calibration data"
    ),
    "w4a16_nvfp4": Algorithm(None, "NVFP4", "none", 4.5, "W4A16_NVFP4"),
    "gptq": Algorithm(
        None,
        "INT4 by block of `awq_block_size`",
        "none",
        4.125,
        "W4A16_AWQ",
        block=128,
        block_setting="awq_block_size",
        remark="GPTQ: later columns make up for the rounding of earlier ones; needs nvidia-modelopt 0.44",
        since="0.44",
    ),
}


def get(name: str) -> Algorithm:
    """Return the entry of an algorithm.

    Raises:
        ModelOptConfigError: If there is none.
    """
    if name not in TABLE:
        raise ModelOptConfigError(
            f"algorithm={name!r} is not in the table of algorithms; allowed: {[*TABLE]}.{suggestion(name, TABLE)}"
        )
    return TABLE[name]


def version_problem(algorithm: str, installed: str | None = None) -> str | None:
    """Return why the installed nvidia-modelopt cannot run an algorithm, or None.

    Args:
        algorithm: A name; those outside the table have no known problem.
        installed: The version; read from the environment by default.
    """
    since = TABLE[algorithm].since if algorithm in TABLE else ""
    found = (installed or versions.installed_version("nvidia-modelopt")) if since else None
    if found is None or versions.base(found) >= versions.base(since):
        return None
    return f"{algorithm} needs nvidia-modelopt {since} or later, and {found} is installed"


def of_ptq() -> tuple[str, ...]:
    """Return the names that ptq.py accepts."""
    return (NO_QUANT, AUTO, *TABLE)


def of_hf() -> tuple[str, ...]:
    """Return the names of the algorithms that Hugging Face files can hold."""
    return tuple(name for name, entry in TABLE.items() if entry.hf_format is not None)


def weight_bits(algorithm: str) -> float | None:
    """Return the bits of a weight on disk.

    Returns None for a preset of modelopt (``..._CFG``) without an entry, and for the path of a file.

    Args:
        algorithm: A name in the table, `NO_QUANT`, the name of a preset, or the path of a file.

    Raises:
        ModelOptConfigError: For any other name, `AUTO` included: its bits are chosen by a setting.
    """
    if algorithm == NO_QUANT:
        return 16
    by_preset = {entry.preset: entry.bits for entry in TABLE.values()}
    if algorithm.endswith("_CFG"):
        return by_preset.get(algorithm)
    if algorithm not in TABLE and Path(algorithm).is_file():
        return None
    return get(algorithm).bits


def block_size(algorithm: str, awq_block_size: int) -> int | None:
    """Return how many weights share a scale, None if the algorithm has no blocks or no entry in the table.

    Args:
        algorithm: The name.
        awq_block_size: The setting, for algorithms whose block it sets.
    """
    entry = TABLE.get(algorithm)
    if entry is None or entry.block is None:
        return None
    return entry.block if entry.block_setting is None else awq_block_size


def has_block_setting(algorithm: str) -> bool:
    """Return whether a setting changes the size of the algorithm's blocks."""
    entry = TABLE.get(algorithm)
    return entry is not None and entry.block_setting is not None


def needs_cuda(algorithm: str) -> bool:
    """Return whether the quantized model runs on CUDA kernels only; False for names that are not known here."""
    entry = TABLE.get(algorithm)
    return algorithm in CUDA_PRESETS if entry is None else entry.needs_cuda


def hf_format_of(algorithm: str) -> str | None:
    """Return the format of an algorithm in Hugging Face files.

    Args:
        algorithm: A name in the table, or modelopt's name of a preset in it. Other names have no known format.

    Returns:
        A name in `HF_FORMATS`, or None.
    """
    by_preset = {entry.preset: entry for entry in TABLE.values() if entry.preset is not None}
    entry = TABLE.get(algorithm) or by_preset.get(algorithm)
    return None if entry is None else entry.hf_format


def layout_of(hf_format: str, layout: str = AUTO) -> str:
    """Return the layout in which a format is written: the requested one, or the one that most servers read.

    Args:
        hf_format: A name in `HF_FORMATS`.
        layout: One of `LAYOUT_CHOICES`.
    """
    return layout if layout in readers.LAYOUTS else readers.best(hf_format, HF_FORMATS[hf_format].layouts)


def common_layout(hf_formats: Iterable[str], layout: str = AUTO) -> str:
    """Return the layout in which layers of several formats are written.

    Args:
        hf_formats: Names in `HF_FORMATS`; none if no layer is quantized.
        layout: One of `LAYOUT_CHOICES`.

    Raises:
        ModelOptConfigError: If no layout, or not the requested one, can hold all formats.
    """
    names = sorted(set(hf_formats))
    for name in names:
        if problem := layout_problem(name, layout):
            raise ModelOptConfigError(f"hf_layout={layout!r}: {problem}.")
    allowed = readers.LAYOUTS if layout == AUTO else (layout,)
    possible = [one for one in allowed if all(one in HF_FORMATS[name].layouts for name in names)]
    if not possible:
        raise ModelOptConfigError(f"No layout of Hugging Face files can hold {' and '.join(names)} together.")
    return max(possible, key=lambda one: len(readers.of_all(names, one)))


def scales_inputs(algorithm: str) -> bool:
    """Return whether the calibration of an algorithm adds scales to the inputs of layers (AWQ, SmoothQuant)."""
    preset = (TABLE[algorithm].preset or "") if algorithm in TABLE else algorithm
    return "AWQ" in preset or "SMOOTHQUANT" in preset


def layout_problem(hf_format: str, layout: str) -> str | None:
    """Return why a layout cannot hold a format of `HF_FORMATS`, and what to do; None if it can.

    Args:
        hf_format: The format.
        layout: One of `LAYOUT_CHOICES`; other names are reported elsewhere.
    """
    layouts = HF_FORMATS[hf_format].layouts
    if layout not in readers.LAYOUTS or layout in layouts:
        return None
    reason = readers.OBSTACLES.get((hf_format, layout))
    others = " or ".join(f"{other} (read by {readers.text(hf_format, other)})" for other in layouts)
    why = f" ({reason})" if reason else ""
    return f"the layout {layout} cannot hold {hf_format} weights{why}; use {others}, or {AUTO}"


def layout_problems(setting: str, algorithm: str, layout: str) -> list[str]:
    """Return why an algorithm cannot be written as Hugging Face files in a layout; empty if its format is unknown.

    Args:
        setting: Name of the setting of the layout, for the message.
        algorithm: The algorithm.
        layout: One of `LAYOUT_CHOICES`.
    """
    hf_format = hf_format_of(algorithm)
    if hf_format is None and algorithm in TABLE:
        return [f"algorithm {algorithm} cannot be written as Hugging Face files; use the format nemo or trtllm"]
    problem = layout_problem(hf_format, layout) if hf_format else None
    return [f"{setting} {layout}, algorithm {algorithm}: {problem}"] if problem else []


def reader_warning(algorithm: str | None, hf_format: str, layout: str = AUTO, experts: bool = False) -> str | None:
    """Return a warning if no known server reads a format in a layout, with the layouts that are read; else None.

    Args:
        algorithm: Name of the algorithm, for the message.
        hf_format: Its format, a name in `HF_FORMATS`.
        layout: One of `LAYOUT_CHOICES`.
        experts: Whether the model has experts.
    """
    used = layout_of(hf_format, layout)
    if set(readers.of(hf_format, used, experts)) & set(readers.SERVERS):
        return None
    rows = [(other, readers.of(hf_format, other, experts)) for other in HF_FORMATS[hf_format].layouts if other != used]
    better = [f"--hf-layout {other} is read by {', '.join(names)}" for other, names in rows if names]
    advice = "; ".join(better) or "use fp8 to serve the model, or the nemo format to train it further"
    what = " with experts" if experts else ""
    return f"{algorithm} in the layout {used}: no known server reads it{what}; {advice}"


def readers_of(hf_format: str, layout: str = AUTO) -> str:
    """Return the names of the programs that read a format of `HF_FORMATS` correctly, as text."""
    return readers.text(hf_format, layout_of(hf_format, layout))


def markdown() -> str:
    """Return the table of the documentation, one line for each algorithm."""
    lines = [
        "| name | weights | activations | `hf` files are read by | remark | `hf` layout |",
        "|---|---|---|---|---|---|",
    ]
    for name, entry in TABLE.items():
        remarks = [entry.remark] if entry.remark else []
        remarks += ["needs CUDA kernels"] if entry.needs_cuda else []
        if entry.hf_format is None:
            read, layout = "cannot be written", ""
        else:
            read, layout = readers_of(entry.hf_format), layout_of(entry.hf_format)
        cells = (f"`{name}`", entry.weights, entry.activations, read, "; ".join(remarks), layout)
        lines.append(_line(cells))
    lines += [
        f"| `{AUTO}` | mixed | mixed | if one layout holds all formats | chosen layer by layer | |",
        f"| None (`-algo {NO_QUANT}`) | unchanged | | as any model | exports the model without quantizing it | |",
    ]
    return "\n".join(lines) + "\n"


def readers_markdown() -> str:
    """Return the documentation's table of readers: one line for each format and layout that can be written."""
    heads = [f"{name} {version}" for name, version in readers.READERS.items()]
    lines = [_line(("export", "layout", *heads)), "|---" * (len(heads) + 2) + "|"]
    for hf_format, found in HF_FORMATS.items():
        names = [f"`{name}`" for name, entry in TABLE.items() if entry.hf_format == hf_format]
        for layout in found.layouts:
            mark = f"{layout} (default)" if len(found.layouts) > 1 and layout == layout_of(hf_format) else layout
            row = readers.cells(hf_format, layout)
            label = ", ".join([*(names or [found.label]), hf_format])
            lines.append(_line((label, mark, *(row[name].text for name in readers.READERS))))
    return "\n".join([*lines, "", *_reasons()]) + "\n"


def _reasons() -> list[str]:
    """Return one line for each reason in the table, with the readers and the formats that it concerns."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for hf_format, entry in HF_FORMATS.items():
        for layout in entry.layouts:
            for name, cell in readers.cells(hf_format, layout).items():
                if cell.reason:
                    found.setdefault((name, layout, cell.reason), []).append(hf_format)
    together: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    for (name, layout, reason), formats in found.items():
        together.setdefault((layout, reason, tuple(formats)), []).append(name)
    return [
        f"- {', '.join(names)}; {layout}; {', '.join(formats)}: {reason}."
        for (layout, reason, formats), names in together.items()
    ]


def _line(cells: Iterable[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


if __name__ == "__main__":
    sys.stdout.write(f"{markdown()}\n{readers_markdown()}")

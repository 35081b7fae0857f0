"""Write the model card, ``README.md``, of a folder of Hugging Face files. Standard library only.

`write` makes the card from the configuration in the folder. Those who know more add sections with `add`: the Quantizer
its calibration and measurements, the compress command its pruning and distillation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from nemo_modelopt_dropin.preflight import algorithms, readers

NAME = "README.md"
# Sections are added before this one.
_LAST = "## Versions"
_PACKAGES = ("nemo-modelopt-dropin", "nvidia-modelopt", "nemo-toolkit", "megatron-core", "torch", "transformers")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# How each reader loads the folder.
_COMMANDS = {
    readers.VLLM: "vllm serve FOLDER",
    readers.SGLANG: "python -m sglang.launch_server --model-path FOLDER",
    readers.TENSORRT_LLM: "trtllm-serve FOLDER --backend pytorch",
    readers.TRANSFORMERS: "from transformers import AutoModelForCausalLM\n\n"
    'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
}


def write(folder: Path, source: str, formats: Iterable[str] = (), layout: str | None = None, base: str = "") -> None:
    """Write the card of a folder.

    Args:
        folder: The folder, with its ``config.json``.
        source: Name of the model that was written, for the title.
        formats: Names of the formats of the quantized layers in `HF_FORMATS`; empty if the model is not quantized.
        layout: The layout, a name in `readers.LAYOUTS`; None if the model is not quantized.
        base: The name of the original model on the Hugging Face hub, if it is known.
    """
    names = sorted(set(formats))
    title = f"{source}, {' and '.join(names)}" if names else source
    sections = [
        _header(names, layout, base),
        f"# {title}\n",
        _introduction(source, names, base),
        *([_format(folder, names, layout)] if layout else []),
        _loading(names, layout),
        _versions(),
    ]
    (folder / NAME).write_text("\n".join(sections), encoding="utf-8")


def add(folder: Path, title: str, lines: Sequence[str]) -> None:
    """Add a section to the card of a folder, before the versions; nothing is added if there is no card.

    Args:
        folder: The folder.
        title: Title of the section.
        lines: Its text, in Markdown.
    """
    path = folder / NAME
    if path.is_file() and lines:
        before, last, after = path.read_text(encoding="utf-8").rpartition(_LAST)
        section = "\n".join([f"## {title}", "", *lines, "", ""])
        path.write_text(f"{before}{section}{last}{after}", encoding="utf-8")


def retitle(folder: Path, title: str) -> None:
    """Replace the title of the card of a folder."""
    path = folder / NAME
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"^# .*$", lambda _: f"# {title}", text, count=1, flags=re.MULTILINE), encoding="utf-8")


def set_base(folder: Path, base: str) -> None:
    """Name the original model in the header of the card of a folder, if the card does not name one.

    Args:
        folder: The folder.
        base: Its name on the Hugging Face hub; nothing is done if it is empty.
    """
    path = folder / NAME
    if not base or not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    if "\nbase_model: " not in text:
        path.write_text(text.replace("---\n", f"---\nbase_model: {base}\n", 1), encoding="utf-8")


def hub_id(*candidates: Any) -> str:
    """Return the first candidate that is a name on the Hugging Face hub and no path, or an empty text."""
    for one in candidates:
        text = str(one or "").removeprefix("hf://")
        if _HUB_ID.fullmatch(text) and not Path(text).exists():
            return text
    return ""


def method(algorithm: Any) -> str:
    """Return the line about the algorithm."""
    name = Path(str(algorithm)).name
    entry = algorithms.TABLE.get(str(algorithm))
    words = f"weights {entry.weights}, activations {entry.activations}" if entry else "a quant_cfg of modelopt"
    remark = f" ({entry.remark})" if entry and entry.remark not in ("", "the default") else ""
    return f"- Algorithm: `{name}`, {words}{remark}"


def calibration_data(source: Any, rows: str, length: int) -> str:
    """Return the line about the calibration data.

    Args:
        source: Name or path of the data set, or a data set.
        rows: The number of rows, as text.
        length: The most tokens of a row that are used.
    """
    text = f"`{Path(source).name}`" if isinstance(source, (str, Path)) else "a data set in memory"
    return f"- Calibration data: {rows} rows of {text}, at most {length} tokens each"


def calibration(settings: Mapping[str, Any], report: Mapping[str, Any]) -> list[str]:
    """Return the text about the calibration.

    Args:
        settings: The fields of the QuantizationConfig.
        report: ``Quantizer.report``.
    """
    lines, rows = [method(settings["algorithm"])], report.get("calibration_rows")
    if rows:
        length = settings["calibration_seq_len"]
        lines.append(f"{calibration_data(settings['calibration_dataset'], str(rows), length)} ({rows * length} in all)")
    if "effective_bits" in report:
        lines.append(f"- Bits of a weight, chosen layer by layer: {report['effective_bits']:.2f} on average")
    return lines


def quality(report: Mapping[str, Any]) -> list[str]:
    """Return the measurements of a ``Quantizer.report``; empty if nothing was compared with the original model."""
    if "loss_after" not in report:
        return []
    text = "that did not calibrate" if report.get("held_out") else "that calibrated the model"
    return [
        "| | original | quantized |",
        "|---|---|---|",
        f"| loss (nats per token) | {report['loss_before']:.4f} | {report['loss_after']:.4f} |",
        f"| perplexity | {report['perplexity_before']:.2f} | {report['perplexity_after']:.2f} |",
        f"| KL to the original (nats) | | {report['kl_to_original']:.2e} |",
        "",
        f"Measured on {report['evaluation_tokens']} tokens of rows {text}.",
    ]


def _header(formats: Sequence[str], layout: str | None, base: str) -> str:
    """Return the YAML header. The license is omitted: it is the original model's."""
    lines = ["---"]
    if base:
        lines += [f"base_model: {base}", *(["base_model_relation: quantized"] if formats else [])]
    library = "Model Optimizer" if layout == readers.MODELOPT else "transformers"
    lines += [f"library_name: {library}", "pipeline_tag: text-generation"]
    if layout:
        lines += ["tags:", f"- {layout}", *(f"- {name.lower()}" for name in formats)]
    return "\n".join([*lines, "---", ""])


def _introduction(source: str, formats: Sequence[str], base: str) -> str:
    what = f"quantized with NVIDIA Model Optimizer to {' and '.join(formats)}" if formats else "not quantized"
    origin = f" It was imported from `{base}`." if base else ""
    return f"A checkpoint of `{source}`, {what}, written by nemo-modelopt-dropin.{origin}\n"


def _format(folder: Path, formats: Sequence[str], layout: str | None) -> str:
    section = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    cache = section.get("kv_cache_scheme") or section.get("kv_cache_quant_algo")
    kept = section.get("ignore") or section.get("exclude_modules") or []
    plain = sorted({re.sub(r"\.\d+(?=\.)", ".*", str(name)) for name in kept})
    return "\n".join(
        [
            "## Format",
            "",
            f"- Weights: {', '.join(formats) or 'in 16 bits'}",
            f"- Layout: {layout}",
            f"- KV cache: {cache if isinstance(cache, str) else 'FP8' if cache else 'in 16 bits'}",
            f"- Linear layers in 16 bits: {', '.join(f'`{name}`' for name in plain) or 'none'}",
            "",
        ]
    )


def _loading(formats: Sequence[str], layout: str | None) -> str:
    """Return how each program that reads the folder loads it."""
    lines = ["## Use", ""]
    if not layout or not formats:
        found: dict[str, str] = dict.fromkeys(readers.READERS, "as any model that is not quantized")
    else:
        rows = [readers.cells(name, layout) for name in formats]
        named = [name for name in readers.READERS if all(name in row and row[name].reads for row in rows)]
        found = {name: ", ".join(sorted({row[name].text for row in rows})) for name in named}
    if not found:
        return "\n".join([*lines, "No server that is known reads this format in this layout.", ""])
    for name, how in found.items():
        code = "python" if name == readers.TRANSFORMERS else "bash"
        lines += [f"{name} {readers.READERS[name]} ({how}):", "", f"```{code}", _COMMANDS[name], "```", ""]
    return "\n".join(lines)


def _versions() -> str:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "\n".join([_LAST, "", ", ".join(f"{name} {version}" for name, version in found.items()), ""])

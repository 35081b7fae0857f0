"""Write the model card of a Hugging Face checkpoint from what is known of the model."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from nemo.lightning.base import NEMO_MODELS_CACHE

from nemo_modelopt_dropin.report import model_card

from . import layouts


def write(folder: Path, model_dir: Any, model: Any) -> None:
    """Write ``README.md``, without calibration and measurements; nothing is written without a ``config.json``.

    Args:
        folder: The checkpoint.
        model_dir: The NeMo checkpoint that the model came from.
        model: The ``llm.GPTModel`` or NeMo's wrapper of a transformers model.
    """
    if (folder / "config.json").is_file():
        formats, layout = stored(folder)
        model_card.write(folder, Path(str(model_dir)).name, formats, layout, base_model(model_dir, model))


def stored(folder: Path) -> tuple[set[str], str | None]:
    """Return the formats of the quantized layers and the name of the layout, from the ``config.json`` of a folder."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    section = config.get("quantization_config")
    if not section:
        return set(), None
    found = layouts.LAYOUTS[section["quant_method"]].formats_of(section)
    return {name for name, _ in found.values()}, section["quant_method"]


def base_model(model_dir: Any, model: Any) -> str:
    """Return the name on the Hugging Face hub that a model was imported from, or an empty text if it is not known.

    ``llm.import_ckpt`` writes a model of the hub into NeMo's cache below its name, and tokenizers keep theirs.
    """
    cached = ""
    with contextlib.suppress(ValueError):
        cached = Path(str(model_dir)).resolve().relative_to(Path(NEMO_MODELS_CACHE).resolve()).as_posix()
    tokenizer = getattr(getattr(model, "tokenizer", None), "tokenizer", None)
    return model_card.hub_id(cached, getattr(tokenizer, "name_or_path", None))


def add_measurements(folder: Path, quantizer: Any) -> None:
    """Add how the model was calibrated, and how it compares with the original, to the card of a checkpoint.

    Args:
        folder: The checkpoint.
        quantizer: The ``Quantizer`` that quantized the model.
    """
    config, report = quantizer.quantization_config, quantizer.report
    if config.algorithm is None:
        return
    model_card.add(folder, "Calibration", model_card.calibration(vars(config), report))
    model_card.add(folder, "Measured quality", model_card.quality(report))

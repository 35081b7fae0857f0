"""What ranks execute for the tests of the families of models."""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from test_code.families import models


def import_hf(name: str, folder: str | Path, entries: Mapping[str, Any] | None = None) -> Path:
    """Write the random model of a family to ``folder / "hf"``, import it and return NeMo's checkpoint."""
    from nemo.collections import llm

    model, config = (getattr(llm, attribute) for attribute in models.FAMILIES[name].nemo)
    source, target = models.save_hf(name, Path(folder) / "hf", entries=entries), Path(folder) / "nemo"
    llm.import_ckpt(model(config()), f"hf://{source}", output_path=str(target), overwrite=True)
    return target


def nemo_logits(checkpoint: str | Path) -> torch.Tensor:
    """Return the logits `[rows, length, 256]` of a NeMo checkpoint in fp32."""
    from nemo.collections.llm.modelopt import setup_trainer_and_restore_model_with_modelopt_spec
    from test_code.support import tiny

    model, _ = setup_trainer_and_restore_model_with_modelopt_spec(str(checkpoint))
    core = tiny.core(model)
    return core_logits(core)


def core_logits(core: Any) -> torch.Tensor:
    """Return the logits `[rows, length, 256]` of a Megatron model in memory."""
    ids = models.tokens()
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    core.eval()
    with torch.no_grad():
        return core(ids, torch.arange(ids.shape[1])[None].expand_as(ids), mask)[..., :256].float()


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the relative difference of two tensors."""
    return float((ours - theirs).norm() / theirs.norm())


def saved_names(checkpoint: str | Path) -> set[str]:
    """Return the names of a checkpoint's tensors of layers, without the layers' numbers."""
    from megatron.core import dist_checkpointing

    found = dist_checkpointing.load_tensors_metadata(str(Path(checkpoint) / "weights"))
    return {re.sub(r"^.*decoder\.layers\.(\d+\.)?", "", name) for name in found if "decoder.layers." in name}


def import_and_compare(name: str, folder: str | Path, entries: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Import a family and return the relative difference of the logits and the saved names, or the traceback."""
    from test_code.support import ranks

    try:
        checkpoint = import_hf(name, folder, entries)
        ranks.reset()
        found = difference(nemo_logits(checkpoint), models.hf_logits(Path(folder) / "hf"))
        return {"difference": found, "names": saved_names(checkpoint)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    finally:
        ranks.reset()

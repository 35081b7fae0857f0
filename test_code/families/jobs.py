"""What ranks execute for the tests of the families of models."""

from __future__ import annotations

import contextlib
import os
import re
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from test_code.families import models
from test_code.support import devices


class AtStart(pl.Callback):
    """Keep the logits of student and teacher when training starts."""

    def __init__(self):
        self.found: list[torch.Tensor] = []

    def on_train_start(self, trainer, pl_module):
        from test_code.support import tiny

        core = tiny.core(pl_module)
        with core.hide_teacher_model() if hasattr(core, "hide_teacher_model") else contextlib.nullcontext():
            self.found = [core_logits(core)]
        self.found.append(core_logits(core._teacher_model))
        core.train()


def import_hf(name: str, folder: str | Path, entries: Mapping[str, Any] | None = None) -> Path:
    """Write the random model of a family to ``folder / "hf"``, import it and return NeMo's checkpoint."""
    from nemo.collections import llm

    model, config = (getattr(llm, attribute) for attribute in models.FAMILIES[name].nemo)
    source, target = models.save_hf(name, Path(folder) / "hf", entries=entries), Path(folder) / "nemo"
    llm.import_ckpt(model(config()), f"hf://{source}", output_path=str(target), overwrite=True)
    return target


def nemo_logits(checkpoint: str | Path, tp: int = 1, ep: int = 1) -> torch.Tensor:
    """Return the logits `[rows, length, 256]` of a NeMo checkpoint in fp32, on ``tp`` or ``ep`` ranks."""
    from nemo.collections.llm.modelopt import setup_trainer_and_restore_model_with_modelopt_spec
    from test_code.support import tiny

    model, _ = setup_trainer_and_restore_model_with_modelopt_spec(
        str(checkpoint),
        tensor_model_parallel_size=tp,
        expert_model_parallel_size=ep,
        devices=int(os.environ["WORLD_SIZE"]),
    )
    core = tiny.core(model)
    return core_logits(core)


def core_logits(core: Any) -> torch.Tensor:
    """Return the logits `[rows, length, 256]` of a Megatron model in memory."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from test_code.support import tiny

    ids = models.tokens()
    mask = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    core.eval()
    with torch.no_grad():
        logits = tiny.run(core, ids, mask)
        if core.parallel_output:
            logits = gather_from_tensor_model_parallel_region(logits)
        return devices.on_host(logits[..., :256].float())


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


def quantize(checkpoint: str | Path, folder: str | Path, algorithm: str) -> dict[str, Any]:
    """Quantize a checkpoint; return how much the restored logits differ from the original, and the layers left out."""
    from nemo.collections.llm.modelopt import setup_trainer_and_restore_model_with_modelopt_spec
    from test_code.support import jobs_quant, ranks, tiny

    folder = Path(folder)
    data = jobs_quant.corpus(folder / "text.jsonl")
    settings = {"calibration_dataset": data, "calibration_dataset_size": 8, "enable_kv_cache": False}
    seen = jobs_quant.ptq(checkpoint, folder / algorithm, algorithm, "nemo", quant=settings)
    ranks.reset()
    original = nemo_logits(checkpoint)
    ranks.reset()
    model, _ = setup_trainer_and_restore_model_with_modelopt_spec(str(folder / algorithm))
    core = tiny.core(model)
    linears = {name for name, part in core.named_modules() if re.search(r"layers\..*linear_\w+$", name)}
    quantized = {name.removesuffix(".weight_quantizer") for name in jobs_quant.amax_of(model) if "weight_q" in name}
    assert set(seen["amax"]) == set(jobs_quant.amax_of(model))
    return {"difference": difference(core_logits(core), original), "left": sorted(linears - quantized)}


def prune(checkpoint: str | Path, target: str | Path, request: Mapping[str, Any]) -> dict[str, Any]:
    """Prune a checkpoint as ``llm.prune`` does; return how much the restored logits differ from those in memory."""
    from nemo.collections.llm.modelopt import PruningConfig, prune_language_model
    from nemo.collections.llm.modelopt import setup_trainer_and_restore_model_with_modelopt_spec as restore
    from nemo.collections.llm.modelopt.prune import _checkpoint_checks, save_pruned_model
    from test_code.support import ranks, tiny

    config = PruningConfig(**request)
    _checkpoint_checks.check_checkpoint(config, str(checkpoint))
    model, trainer = restore(
        str(checkpoint),
        strategy_kwargs={"sequence_parallel": False, "replace_progress_bar": False},
        trainer_kwargs={"max_steps": 2, "limit_val_batches": 2, "val_check_interval": 2},
    )
    before = core_logits(tiny.core(model))
    prune_language_model(model, config, tiny.data(global_batch_size=2, micro_batch_size=2), trainer)
    memory, report = core_logits(tiny.core(model)), model.pruning_report
    save_pruned_model(trainer, str(target))
    ranks.reset()
    return {
        "difference": difference(nemo_logits(target), memory),
        "changed": difference(memory, before),
        "parameters": (report["before"]["parameters"], report["after"]["parameters"]),
    }


def distill(
    student: str | Path, teacher: str | Path, folder: str | Path, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Distill for two steps; return the losses, and how much both models in memory differ from their checkpoints."""
    import yaml

    from nemo import lightning as nl
    from nemo.collections import llm
    from test_code.support import ranks, tiny
    from test_code.support.jobs_distill import Metrics

    expected = [nemo_logits(path) for path in (student, teacher) if ranks.reset() is None]
    ranks.reset()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "distill.yaml"
    path.write_text(yaml.safe_dump(dict(settings)))
    recorder, logits = Metrics(), AtStart()
    # As the commands do on a CPU: the imported weights are in bf16.
    plugin = nl.MegatronMixedPrecision(precision="32", params_dtype=torch.float32, autocast_enabled=False)
    llm.distill(
        student_model_path=str(student),
        teacher_model_path=str(teacher),
        data=tiny.data(),
        trainer=tiny.trainer(max_steps=2, callbacks=[recorder, logits], plugins=plugin),
        distillation_config_path=str(path),
        log=nl.NeMoLogger(log_dir=str(folder / "logs"), use_datetime_version=False, ckpt=None),
        # NeMo 2.5 does not load the student by itself.
        resume=nl.AutoResume(restore_config=nl.RestoreConfig(path=str(student))),
        optim=tiny.optim(),
    )
    found = [difference(ours, theirs) for ours, theirs in zip(logits.found, expected, strict=True)]
    return {"difference": max(found), "losses": recorder.steps}


def refused_requests(name: str, folder: str | Path, requests: Sequence[Mapping[str, Any]]) -> list[str]:
    """Import a family and return the error of each pruning request, from the checkpoint's configuration alone."""
    from nemo.collections.llm.modelopt import ModelOptConfigError, PruningConfig
    from nemo.collections.llm.modelopt.prune import _checkpoint_checks

    checkpoint, messages = import_hf(name, folder), []
    for request in requests:
        try:
            _checkpoint_checks.check_checkpoint(PruningConfig(**request), str(checkpoint))
            messages.append("accepted")
        except ModelOptConfigError as error:
            messages.append(str(error))
    return messages


def import_only(name: str, folder: str | Path) -> str:
    """Import a family and return the checkpoint's path."""
    return str(import_hf(name, folder))


def compare_layout(checkpoint: str, folder: str | Path, tp: int = 1, ep: int = 1) -> float:
    """Return the relative difference of a checkpoint's logits on several ranks from those of `transformers`."""
    return difference(nemo_logits(checkpoint, tp, ep), models.hf_logits(Path(folder) / "hf"))


def exported_window(name: str, folder: str | Path) -> int | None:
    """Import a family and return the window in the configuration that NeMo's exporter derives."""
    from nemo.lightning import io
    from nemo.lightning.ckpt_utils import ckpt_to_context_subdir

    checkpoint = import_hf(name, folder)
    model = io.load_context(ckpt_to_context_subdir(checkpoint), subpath="model")
    return model.exporter("hf", checkpoint).config.sliding_window


def two_tokenizers(name: str, folder: str | Path) -> tuple[int, int]:
    """Start an import, take another tokenizer's files, and return the sizes of both tokenizers."""
    from transformers import AutoTokenizer

    from nemo.collections import llm

    model = getattr(llm, models.FAMILIES[name].nemo[0])
    first = models.save_hf(name, Path(folder) / "first")
    second = models.save_hf(name, Path(folder) / "second")
    larger = AutoTokenizer.from_pretrained(second)
    larger.add_tokens(["<another>"])
    larger.save_pretrained(second)
    paths = [model.importer(f"hf://{source}").save_hf_tokenizer_assets(str(source)) for source in (first, second)]
    one, other = (len(AutoTokenizer.from_pretrained(path)) for path in paths)
    return one, other

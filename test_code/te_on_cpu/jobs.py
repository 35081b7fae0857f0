"""What ranks execute for the tests on Transformer Engine's layer specs."""

from __future__ import annotations

from pathlib import Path

import torch

from test_code.support.devices import SPECS, layer_spec


def layers_of(core) -> set[str]:
    """Return the class names of all modules of a model."""
    return {type(module).__name__ for module in core.modules()}


def make_pair(folder: str, llama: bool = False, layout: dict | None = None, **overrides) -> dict:
    """Write one model as two checkpoints, whose contexts name the local spec and TE's: ``local`` and ``te``.

    Returns:
        By name: the losses of the training that wrote it and the classes of its layers.
    """
    from test_code.support import ranks, tiny

    made = {}
    for name in SPECS:
        model = _model(llama, transformer_layer_spec=layer_spec(name), **overrides)
        first = name == "local"
        model.optim = tiny.optim(lr=1e-3 if first else 0.0)
        model.optim.connect(model)
        losses = tiny.fit(
            model,
            save_to=Path(folder) / name,
            restore=None if first else Path(folder) / "local",
            max_steps=2 if first else 1,
            bf16_weights=first,
            **(layout or {}),
        )
        made[name] = losses, layers_of(tiny.core(model))
        ranks.reset()
    return made


def _model(llama: bool, **overrides):
    from nemo.collections import llm
    from test_code.support import tiny

    config = tiny.config(**overrides)
    if not llama:
        return tiny.model(config)
    names = llm.LlamaConfig.__dataclass_fields__
    settings = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return llm.LlamaModel(llm.LlamaConfig(**settings), optim=tiny.optim(), tokenizer=tiny.tokenizer())


def train_from(checkpoint: str, name: str, steps: int = 3, layout: dict | None = None, **overrides):
    """Train with a spec from a checkpoint; return the losses and the weights afterwards by their saved names."""
    from test_code.support import ranks, tiny

    model = tiny.model(transformer_layer_spec=layer_spec(name), **overrides)
    losses = tiny.fit(model, restore=checkpoint, max_steps=steps, **(layout or {}))
    trained = saved_weights(tiny.core(model))
    ranks.reset()
    return losses, trained


def in_fp32() -> dict:
    """Return the arguments of a trainer that computes in fp32 whatever a model's configuration says."""
    from nemo import lightning as nl

    plugin = nl.MegatronMixedPrecision(precision="32", params_dtype=torch.float32, autocast_enabled=False)
    return {"plugins": plugin}


def in_bf16(overrides: dict) -> dict:
    """Add bf16 to the settings of a model, and return the arguments of a trainer that computes in it."""
    from nemo import lightning as nl

    overrides |= {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    return {"plugins": nl.MegatronMixedPrecision("bf16-mixed", params_dtype=torch.bfloat16, autocast_enabled=False)}


def train_in_bf16(checkpoint: str, name: str) -> list[float]:
    """Return what `train_from` does for a model in bf16, without its weights."""
    overrides: dict = {}
    layout = in_bf16(overrides)
    return train_from(checkpoint, name, layout=layout, **overrides)[0]


def train_again(path: str, layout: dict | None = None) -> list[float]:
    """Load a checkpoint into the model that its context describes, and return the losses of three steps."""
    from nemo.lightning.ckpt_utils import ckpt_to_context_subdir

    from nemo import lightning as nl
    from test_code.support import tiny

    model = nl.io.load_context(ckpt_to_context_subdir(Path(path)), subpath="model")
    model.optim = tiny.optim()
    model.optim.connect(model)
    return tiny.fit(model, restore=path, max_steps=3, **in_fp32(), **(layout or {}))


def saved_weights(core) -> dict[str, torch.Tensor]:
    """Return this rank's weights under the names that a checkpoint gives them, which both specs share."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    found = {}
    for value in core.sharded_state_dict().values():
        if isinstance(value, (ShardedTensor, ShardedTensorFactory)):
            # Layers are slices of one saved tensor, so the offsets belong to the name.
            found[value.key, tuple(getattr(value, "global_offset", ()) or ())] = value.data.detach().clone()
    return found


def prune_without_extra_state(source: str, target: str) -> list[float]:
    """Prune as stock does, which writes no ``_extra_state`` for norms, and train the result."""
    from unittest import mock

    from nemo.collections.llm.modelopt import _saved_keys
    from test_code.support import jobs_prune, ranks

    with mock.patch.object(_saved_keys, "complete_extra_state", lambda weights: weights):
        jobs_prune.prune_checkpoint(source, target, {"drop_layers": [2]})
    ranks.reset()
    assert keys_that_are_missing(target), "nothing is missing: this job tests nothing"
    ranks.reset()
    return train_again(target)


def keys_that_are_missing(path: str) -> list[str]:
    """Return what the model of a checkpoint's context asks for and the checkpoint lacks."""
    from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject
    from nemo.lightning.ckpt_utils import ckpt_to_context_subdir

    from nemo import lightning as nl
    from nemo.collections.llm.modelopt import _saved_keys
    from test_code.support import tiny

    tiny.init_parallel()
    model = nl.io.load_context(ckpt_to_context_subdir(Path(path)), subpath="model")
    core = model.config.configure_model(tiny.tokenizer())
    keys = _saved_keys.saved_keys(path)
    saved = {_saved_keys.strip_module_prefix(key) for key in keys}
    wanted = [value for value in core.sharded_state_dict().values() if isinstance(value, ShardedBase)]
    names = [value.unique_key if isinstance(value, ShardedObject) else value.key for value in wanted]
    return [name for name in names if name not in saved]


def distill(
    teacher: str,
    student: str,
    name: str,
    settings: str | None = None,
    layout: dict | None = None,
    bf16: bool = False,
    te_loss: bool = False,
):
    """Distill a student of half the MLP's width for three steps and return the losses.

    Args:
        teacher: checkpoint.
        student: checkpoint.
        name: layer spec of both models.
        settings: file of the distillation's settings.
        layout: arguments of the trainer.
        bf16: whether to compute in bf16.
        te_loss: whether TE computes the language-model loss; it overwrites the logits.
    """
    from nemo.collections.llm.modelopt import DistillationGPTModel
    from test_code.support import jobs_distill, tiny

    overrides: dict = {"transformer_layer_spec": layer_spec(name)}
    layout = {**(layout or {}), **(in_bf16(overrides) if bf16 else {})}
    model = DistillationGPTModel(
        tiny.config(ffn_hidden_size=64, **overrides),
        tiny.config(**overrides),
        teacher,
        settings,
        optim=tiny.optim(),
        tokenizer=tiny.tokenizer(),
    )
    callbacks = [jobs_distill.TECrossEntropy()] if te_loss else []
    return tiny.fit(model, restore=student, max_steps=3, callbacks=callbacks, **layout)


def refused_distillation(teacher: str, student: str, settings: str) -> str:
    """Return the error of a distillation on TE's layers."""
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError

    try:
        distill(teacher, student, "te", settings)
    except ModelOptConfigError as error:
        return str(error)
    return ""


def import_family(name: str, folder: str) -> dict:
    """Import a family; compare its logits with transformers' in NeMo's own layers and in Model Optimizer's spec.

    Returns:
        The relative differences ``own`` and ``modelopt``, and the ``layers`` of the former.
    """
    from nemo.collections.llm.inference.base import _setup_trainer_and_restore_model
    from nemo.lightning.ckpt_utils import ckpt_to_context_subdir

    from nemo import lightning as nl
    from test_code.families import jobs as families
    from test_code.families import models
    from test_code.support import ranks, tiny

    checkpoint = families.import_hf(name, folder)
    expected = models.hf_logits(Path(folder) / "hf")
    ranks.reset()
    model = nl.io.load_context(ckpt_to_context_subdir(checkpoint), subpath="model")
    del model.optim
    inference = {"setup_optimizers": False, "ckpt_load_optimizer": False, "ddp": "pytorch"}
    _setup_trainer_and_restore_model(checkpoint, tiny.trainer(strategy_kwargs=inference, **in_fp32()), model)
    core = tiny.core(model)
    found = {"own": families.difference(families.core_logits(core), expected), "layers": layers_of(core)}
    ranks.reset()
    return {**found, "modelopt": families.difference(families.nemo_logits(checkpoint), expected)}


def distill_twice(student: str, teacher: str, folder: str) -> tuple[list[float], str]:
    """Distill for a step and resume for another; return the losses and the last checkpoint."""
    from test_code.support import jobs_checkpoints

    stops = {1: "1 rank", 2: "1 rank"}
    losses = jobs_checkpoints.distill_with_resume(student, teacher, None, folder, stops)
    return losses, jobs_checkpoints.last(folder)


def write_texts(folder: str) -> None:
    """Write training and held-out texts for the command ``compress``."""
    import json

    from test_code.support import tiny

    texts = tiny.texts(120)
    for name, rows in (("train", texts[:100]), ("heldout", texts[100:])):
        (Path(folder) / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))

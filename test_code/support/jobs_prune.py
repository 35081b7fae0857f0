"""What ranks execute for the tests of pruning."""

from __future__ import annotations

import os
import random
import zlib
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch

from test_code.support import devices


def build(tp: int = 1, pp: int = 1, data=None, batches: int = 4, stages=None, **overrides):
    """Train a tiny model for one step and set weights that depend on their names only, not on the layout.

    Args:
        tp: tensor-parallel size.
        pp: pipeline-parallel size.
        data: settings of `tiny.data`.
        batches: how many batches importance is measured on.
        stages: arguments of the strategy that say how many layers the first and the last stage hold.
        **overrides: settings of the model.

    Returns:
        NeMo's model, its data module and the trainer that holds the model.
    """
    from test_code.support import tiny

    # Pruning needs norms of their own. Checkpoints are restored in such layers; this model is not restored.
    overrides.setdefault("transformer_layer_spec", devices.layer_spec(devices.LOCAL))
    model = tiny.model(**overrides)
    module = tiny.data(**(data or {}))
    run = tiny.trainer(tp=tp, pp=pp, max_steps=1, limit_val_batches=batches, strategy_kwargs=stages)
    run.fit(model, module)
    fill(model)
    return model, module, run


def whole_name(core, name: str) -> str:
    """Return a parameter's name in the whole model, for one of this pipeline stage."""
    head, dot, rest = name.partition("decoder.layers.")
    if not dot:
        return name
    index, _, tail = rest.partition(".")
    return f"{head}{dot}{core.decoder.layers[int(index)].layer_number - 1}.{tail}"


def fill(model) -> None:
    from test_code.support import tiny

    core = tiny.core(model)
    for name, parameter in core.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(whole_name(core, name).encode()))
        drawn = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            parameter.copy_(1 + 0.2 * drawn if "norm" in name and name.endswith("weight") else 0.1 * drawn)


def weights(model) -> dict[str, torch.Tensor]:
    """Return this rank's weights under their names in the whole model."""
    from test_code.support import tiny

    core = tiny.core(model)
    return {
        whole_name(core, name): value.detach().clone()
        for name, value in core.state_dict().items()
        if isinstance(value, torch.Tensor)
    }


def sizes(model) -> dict:
    from test_code.support import tiny

    config = tiny.core(model).config
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    return {name: getattr(config, name) for name in names}


def logits(model, tokens=None):
    """Return the logits of one batch, with TP=1 and PP=1."""
    from test_code.support import tiny

    core = tiny.core(model)
    tokens = torch.arange(64).view(2, 32) * 3 % 251 if tokens is None else tokens
    mask = torch.ones(1, 1, 32, 32, dtype=torch.bool).triu(1)
    with torch.no_grad():
        return tiny.run(core, tokens, mask)


def run_prune(model, request, module=None, run=None):
    from nemo.collections.llm.modelopt.prune import PruningConfig, prune_language_model

    return prune_language_model(model, PruningConfig(**request), module, run)


def prune(request: dict, **settings) -> dict:
    """Prune a tiny model and return its weights before and after, its sizes and the report."""
    from nemo.collections.llm.modelopt.prune import describe_pruning

    model, module, run = build(**settings)
    before = weights(model)
    assert run_prune(model, request, module, run) is model
    return {"before": before, "after": weights(model), "sizes": sizes(model), "report": describe_pruning(model)}


def refusal(request: dict, **settings) -> str:
    """Return the error of pruning a tiny model, or nothing if it succeeds."""
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError

    model, module, run = build(**settings)
    try:
        run_prune(model, request, module, run)
    except ModelOptConfigError as error:
        return str(error)
    return ""


def refused_without_plugin(checkpoint: str, request: dict) -> list[str]:
    """Return the errors of a model and of a checkpoint where modelopt's plugin for Megatron was not imported."""
    from types import SimpleNamespace
    from unittest import mock

    from nemo.collections.llm.modelopt.prune import pruner

    with mock.patch.object(pruner, "mtp", SimpleNamespace(plugins=SimpleNamespace())):
        return [refused(request), refused_by_checkpoint(checkpoint, [(request, 1)])[0]]


def multi_token_prediction(folder: str, requests: dict, tp: int = 1) -> dict:
    """Return for each request its error, or the losses of a training that continues from the pruned checkpoint."""
    from unittest import mock

    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from test_code.support import ranks, tiny

    block = {"mtp_num_layers": 1, "mtp_loss_scaling_factor": 0.1}
    results: dict = {}
    for number, (label, request) in enumerate(requests.items()):
        model, module, run = build(tp=tp, **block)
        validate = mock.patch("nemo.collections.llm.validate", side_effect=AssertionError("measured"))
        try:
            with validate if "target_num_layers" not in request else mock.patch.dict({}):
                run_prune(model, request, module, run)
        except ModelOptConfigError as error:
            results[label] = str(error)
            ranks.reset()
            continue
        path = Path(folder) / str(number)
        run.save_checkpoint(path, weights_only=True)
        layers = tiny.core(model).config.num_layers
        ranks.reset()
        results[label] = tiny.fit(tiny.model(num_layers=layers, **block), restore=path, max_steps=2, tp=tp)
        ranks.reset()
    return results


def stock_drop(layers: list[int], pp: int = 1):
    """Drop layers with whichever subpackage this rank's environment selects."""
    import nemo.collections.llm.modelopt.prune.pruner as pruner

    model, _, _ = build(pp=pp)
    pruner.prune_language_model(model, pruner.PruningConfig(drop_layers=layers))
    return pruner.__file__, weights(model)


def plain_modelopt(export_config: dict, **settings):
    """Prune with modelopt itself, as stock asks it to, on the unwrapped model and with every size allowed."""
    import modelopt.torch.prune as mtp

    from nemo.collections import llm
    from nemo.collections.llm.modelopt.prune import _norms, _search
    from test_code.support import tiny

    model, module, run = build(**settings)
    _norms.register_torch_norms()
    if "num_attention_heads" in export_config and _search.prunes_query_groups():
        # modelopt 0.37 needs an explicit number of groups.
        export_config = {**export_config, "num_query_groups": tiny.core(model).config.num_query_groups}
    module.val_dataloader = module.train_dataloader
    mtp.prune(
        tiny.core(model),
        mode=_search.search_mode(),
        constraints={"export_config": export_config},
        dummy_input=None,
        config={"forward_loop": lambda _: llm.validate(model, data=module, trainer=run, tokenizer="model")},
    )
    return weights(model)


def measured(model, module, run):
    """Return importance by our own hooks: ffn channels, heads' channels and layers, over the training data."""
    from nemo.collections import llm
    from test_code.support import tiny

    core = tiny.core(model)
    ffn: dict[int, torch.Tensor] = {}
    heads: dict[int, torch.Tensor] = {}
    layers: dict[int, float] = {}
    handles = []
    weights: list[torch.Tensor] = []  # [s, b], a column sums to one

    dataset = module.train_dataloader().dataset
    rows = {tuple((row := dataset[i])["tokens"].tolist()): row["loss_mask"] for i in range(len(dataset))}

    def keep_weights(_, args, kwargs):
        tokens = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        mask = devices.place(torch.stack([rows[tuple(row.tolist())] for row in tokens]).T)
        weights[:] = [mask / mask.sum(0)]

    handles.append(core.register_forward_pre_hook(keep_weights, with_kwargs=True))

    def keep_inputs(store, number):
        def hook(_, args):
            # Mean over the sequence's unmasked tokens, then squares summed over the samples (arXiv 2407.14679).
            mean = (args[0].abs() * weights[0][..., None]).sum(0)
            store[number] = store.get(number, 0) + mean.square().sum(0)

        return hook

    def keep_change(number):
        def hook(_, args, kwargs, output):
            before = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            change = 1 - torch.nn.functional.cosine_similarity(before, output[0], dim=2)
            layers[number] = layers.get(number, 0.0) + float((change * weights[0]).sum(0).mean())

        return hook

    for layer in core.decoder.layers:
        n = layer.layer_number
        handles.append(layer.mlp.linear_fc2.register_forward_pre_hook(keep_inputs(ffn, n)))
        handles.append(layer.self_attention.linear_proj.register_forward_pre_hook(keep_inputs(heads, n)))
        handles.append(layer.register_forward_hook(keep_change(n), with_kwargs=True))
    own = module.val_dataloader
    module.val_dataloader = module.train_dataloader
    with torch.no_grad():
        # The trainer is used again for pruning, which must cope with what NeMo leaves in it.
        llm.validate(model, data=module, trainer=run, tokenizer="model")
    module.val_dataloader = own
    for handle in handles:
        handle.remove()
    return ffn, heads, layers


def prune_and_measure(request: dict, **settings):
    """Return weights before and after, and what `measured` found before."""
    model, module, run = build(**settings)
    before = weights(model)
    importance = measured(model, module, run)
    run_prune(model, request, module, run)
    return before, weights(model), importance


def masked_and_pruned(request: dict, **settings):
    """Return logits of the pruned model, and of the original one with what will go masked out."""
    from test_code.support import tiny

    model, module, run = build(**settings)
    ffn, heads, layers = measured(model, module, run)
    core = tiny.core(model)
    handles = []

    def mask(kept, width):
        gate = torch.zeros(width, device=devices.device())
        gate[kept] = 1
        return lambda _, args: (args[0] * gate, *args[1:])

    channels = core.config.kv_channels
    groups, count = core.config.num_query_groups, core.config.num_attention_heads
    removed = list(request.get("drop_layers", []))
    if "target_num_layers" in request:
        ranked = sorted(layers, key=layers.get, reverse=True)
        removed = ranked[request["target_num_layers"] :]
    for layer in core.decoder.layers:
        n = layer.layer_number
        if "target_ffn_hidden_size" in request:
            kept = ffn[n].topk(request["target_ffn_hidden_size"]).indices
            handles.append(layer.mlp.linear_fc2.register_forward_pre_hook(mask(kept, len(ffn[n]))))
        if "target_num_attention_heads" in request:
            target_groups = request.get("target_num_query_groups", groups)
            per_group = request["target_num_attention_heads"] // target_groups
            scores = heads[n].view(groups, count // groups, channels).sum(-1)
            kept_groups = scores.sum(-1).topk(target_groups).indices.tolist()
            kept = [
                (g * (count // groups) + h) * channels + c
                for g in kept_groups
                for h in scores[g].topk(per_group).indices.tolist()
                for c in range(channels)
            ]
            handles.append(layer.self_attention.linear_proj.register_forward_pre_hook(mask(kept, count * channels)))
        if n in removed:
            handles.append(
                layer.register_forward_hook(
                    lambda _, args, kwargs, output: (
                        kwargs["hidden_states"] if "hidden_states" in kwargs else args[0],
                        output[1],
                    ),
                    with_kwargs=True,
                )
            )
    expected = logits(model)
    for handle in handles:
        handle.remove()
    run_prune(model, request, module, run)
    return expected, logits(model), sizes(model)


def fingerprint_of_state(model, module, run):
    import megatron.core.tensor_parallel as tensor_parallel

    from test_code.support import tiny

    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
    return {
        "loader": module.val_dataloader(),
        "in vars": "val_dataloader" in vars(module),
        "tokenizer": id(module.tokenizer),
        "limits": (run.limit_train_batches, run.limit_val_batches, run.limit_test_batches, run.max_steps),
        "callbacks": [type(callback).__name__ for callback in run.callbacks],
        "modes": [part.training for part in tiny.core(model).modules()],
        "torch": torch.get_rng_state().tolist(),
        "cuda": torch.cuda.get_rng_state().tolist() if devices.machine().on_gpus else None,
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "tracker": {name: state.tolist() for name, state in tracker.items()},
        "hooks": [
            (name, list(map(str, hooks)))
            for name, part in tiny.core(model).named_modules()
            if (hooks := [*part._forward_hooks.values(), *part._forward_pre_hooks.values()])
        ],
        "classes": sorted({type(part).__name__ for part in tiny.core(model).modules()}),
    }


def what_changes(request: dict, fail: bool = False, train_samples: int | None = None, **settings):
    """Return the names of settings that pruning changed, and the error it raised."""
    from nemo.collections import llm

    model, module, run = build(**settings)
    model.train()
    list(model.modules())[-1].eval()
    seed = module.val_dataloader().dataset.seed
    if train_samples is not None:
        module.samples = train_samples
    before, old = fingerprint_of_state(model, module, run), weights(model)
    error, validate = "", llm.validate
    if fail:

        def break_down(*args, **kwargs):
            validate(*args, **kwargs)
            raise OSError("the disk is gone")

        llm.validate = break_down
    try:
        run_prune(model, request, module, run)
    except (OSError, ValueError) as problem:
        error = f"{type(problem).__name__}: {problem}"
    finally:
        llm.validate = validate
    after, new = fingerprint_of_state(model, module, run), weights(model)
    changed = [name for name in before if name not in ("loader", "modes", "classes") and before[name] != after[name]]
    if module.val_dataloader().dataset.seed != seed:
        changed.append("loader")
    if fail or not request.get("target_num_layers") and not request.get("drop_layers"):
        changed += [name for name in ("modes", "classes") if before[name] != after[name]]
    same = old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    again = None
    if fail:
        run_prune(model, request, module, run)
        again = sizes(model)
    return changed, error, same, again


def refused(request: dict, **settings) -> str:
    """Return the message of the error, having made sure that no forward pass was run."""
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from test_code.support import tiny

    model, module, run = build(**settings)
    calls = []
    tiny.core(model).register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        run_prune(model, request, module, run)
    except ModelOptConfigError as error:
        assert not calls
        return str(error)
    raise AssertionError("not refused")


def refused_all(requests: list[dict], **settings) -> list[str]:
    """Return the messages for several requests to one model, which must stay as it is."""
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError

    model, module, run = build(**settings)
    before, messages = weights(model), []
    for request in requests:
        try:
            run_prune(model, request, module, run)
        except ModelOptConfigError as error:
            messages.append(str(error))
        else:
            messages.append("not refused")
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())
    return messages


def reuse_scores(folder: str, requests: list[dict], **settings):
    """Prune equal models to several targets with one scores folder; return weights and numbers of forward passes."""
    from test_code.support import tiny

    out = []
    for request in requests:
        model, module, run = build(**settings)
        calls: list[int] = []
        handle = tiny.core(model).register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        run_prune(model, {**request, "scores_path": folder}, module, run)
        handle.remove()
        out.append((weights(model), len(calls)))
        reset_layout()
    return out


def refused_by_checkpoint(path: str, requests: list[tuple[dict, int]], **settings) -> list[str]:
    """Return what a checkpoint's requests and tensor-parallel sizes raise, or "accepted"."""
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.prune import PruningConfig, check_checkpoint

    save_checkpoint(path, **settings)
    said = []
    for request, tp in requests:
        try:
            check_checkpoint(PruningConfig(**request), path, tp)
            said.append("accepted")
        except ModelOptConfigError as error:
            said.append(str(error))
    return said


def scores_of_other_data(folder: str) -> str:
    """Measure scores on one data set and ask for them with another; return the error."""
    request = {"target_ffn_hidden_size": 64, "scores_path": folder}
    model, module, run = build()
    run_prune(model, request, module, run)
    reset_layout()
    model, module, run = build(data={"seed": 5})
    try:
        run_prune(model, request, module, run)
    except ValueError as error:
        return str(error)
    raise AssertionError("scores of other data were accepted")


def scores_of_other_model(folder: str) -> str:
    model, module, run = build()
    run_prune(model, {"target_ffn_hidden_size": 64, "scores_path": folder}, module, run)
    reset_layout()
    model, module, run = build()
    from test_code.support import tiny

    with torch.no_grad():
        next(tiny.core(model).parameters()).mul_(2)
    try:
        run_prune(model, {"target_ffn_hidden_size": 64, "scores_path": folder}, module, run)
    except ValueError as error:
        return str(error)
    raise AssertionError("scores of another model were accepted")


def planted_scores(folder: str, ran: str) -> list[str]:
    """Replace scores by pickles, under the new name and the old one; return the errors of pruning."""
    from test_code.support import jobs_state

    messages = []
    for name in ("scores-rank0.safetensors", "scores0.pth"):
        torch.save({"layer_scores": jobs_state.Planted(ran)}, f"{folder}/{name}")
        model, module, run = build()
        try:
            run_prune(model, {"target_ffn_hidden_size": 64, "scores_path": folder}, module, run)
            messages.append("read")
        except ValueError as error:
            messages.append(str(error))
        reset_layout()
    return messages


def reset_layout() -> None:
    from test_code.support import ranks

    ranks.reset()


def twice(first: dict, second: dict):
    """Prune one model twice and train it on; return sizes and losses."""
    from test_code.support import tiny

    model, module, run = build()
    run_prune(model, first, module, run)
    run_prune(model, second, module, run)
    reset_layout()
    return sizes(model), tiny.fit(model, max_steps=3)


def identity_layer():
    """Prune a model whose second layer changes nothing: its score is zero."""
    from nemo.collections.llm.modelopt.prune import describe_pruning
    from test_code.support import tiny

    model, module, run = build()
    layer = tiny.core(model).decoder.layers[1]
    with torch.no_grad():
        layer.self_attention.linear_proj.weight.zero_()
        layer.mlp.linear_fc2.weight.zero_()
    run_prune(model, {"target_num_layers": 3}, module, run)
    return describe_pruning(model)["kept_layers"]


def marks(**settings):
    """Return Megatron's marks of the parameters before and after, and what is frozen."""
    from test_code.support import tiny

    model, module, run = build(**settings)
    core = tiny.core(model)
    core.embedding.word_embeddings.weight.requires_grad_(False)

    def look():
        return {
            name: (getattr(p, "tensor_model_parallel", None), getattr(p, "partition_dim", None), p.requires_grad)
            for name, p in core.named_parameters()
        }

    before = look()
    run_prune(model, {"target_hidden_size": 32, "target_ffn_hidden_size": 64}, module, run)
    return before, look()


class FillAtEnd(pl.Callback):
    """Fill the weights while ``fit`` is still running, before `tiny.SaveAtEnd` writes them."""

    def on_train_end(self, trainer, pl_module):
        fill(pl_module)


def save_checkpoint(path: str, tp: int = 1, sp: bool = False, **overrides):
    """Write a NeMo checkpoint of a model whose weights depend on their names only."""
    from test_code.support import tiny

    model = tiny.model(**overrides)
    run = tiny.trainer(tp=tp, sp=sp, max_steps=1, callbacks=[FillAtEnd(), tiny.SaveAtEnd(path)])
    run.fit(model, tiny.data())
    return weights(model)


def prune_checkpoint(source: str, target: str, request: dict, data: bool = True, **layout) -> None:
    """Run NeMo's own llm.prune on a checkpoint."""
    from nemo.collections import llm
    from nemo.collections.llm.modelopt.prune import PruningConfig
    from test_code.support import tiny

    llm.prune(
        nemo_checkpoint=source,
        save_path=target,
        pruning_config=PruningConfig(**request),
        devices=int(os.environ["WORLD_SIZE"]),
        num_train_samples=8,
        data=tiny.data(global_batch_size=2, micro_batch_size=2) if data else None,
        **layout,
    )


def layers_held(path: str, **layout) -> int:
    """Restore a checkpoint as ptq and pruning do, and return how many layers this rank's stage holds."""
    from nemo.collections.llm.modelopt import setup_trainer_and_restore_model_with_modelopt_spec
    from test_code.support import tiny

    model, _ = setup_trainer_and_restore_model_with_modelopt_spec(
        path, devices=int(os.environ["WORLD_SIZE"]), pipeline_model_parallel_size=2, **layout
    )
    return len(tiny.core(model).decoder.layers)


def prune_by_script(arguments: list[str]) -> list[str]:
    """Do what scripts/prune.py does on a rank, and return the warnings that it logs."""
    import logging

    from nemo_modelopt_cli import prune as script

    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("nemo_logger").addHandler(handler)
    try:
        script.work(script.resolve(arguments))
    finally:
        logging.getLogger("nemo_logger").removeHandler(handler)
    return said


def checkpoint_config(path: str) -> dict:
    """Return the sizes in a checkpoint's context."""
    from nemo.lightning.ckpt_utils import ckpt_to_context_subdir

    from nemo import lightning as nl

    config = nl.io.load_context(ckpt_to_context_subdir(Path(path)), subpath="model").config
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    return {name: getattr(config, name) for name in names}


def train_checkpoint(path: str, **layout):
    """Load a checkpoint into the model that its context describes, and train it."""
    from nemo.lightning.ckpt_utils import ckpt_to_context_subdir

    from nemo import lightning as nl
    from test_code.support import tiny

    model = nl.io.load_context(ckpt_to_context_subdir(Path(path)), subpath="model")
    model.optim = tiny.optim()
    return tiny.fit(model, restore=path, max_steps=3, **layout)


def loaded_weights(path: str, **layout):
    """Return a checkpoint's weights as one rank holds them after loading, and the validation loss."""
    from nemo.lightning.ckpt_utils import ckpt_to_context_subdir

    from nemo import lightning as nl
    from test_code.support import tiny

    model = nl.io.load_context(ckpt_to_context_subdir(Path(path)), subpath="model")
    model.optim = tiny.optim()
    recorder = tiny.LossRecorder()
    run = tiny.trainer(callbacks=[recorder], limit_val_batches=4, **layout)
    run.strategy.restore_config = nl.RestoreConfig(path=str(path), load_optim_state=False)
    run.validate(model, tiny.data())
    return weights(model), recorder.val_losses


def generate(path: str) -> list[str]:
    """Return what NeMo's llm.generate makes of a prompt with the checkpoint."""
    from megatron.core.inference.common_inference_params import CommonInferenceParams

    from nemo.collections import llm
    from test_code.support import tiny

    run = tiny.trainer(strategy_kwargs={"setup_optimizers": False, "ckpt_load_optimizer": False})
    return llm.generate(
        path=path,
        trainer=run,
        prompts=["the model"],
        params_dtype=torch.float32,
        inference_params=CommonInferenceParams(num_tokens_to_generate=4, top_k=1),
        text_only=True,
        enable_flash_decode=False,
    )


def callbacks_that_validation_adds():
    """Prune while each validation adds a callback, as NeMo's telemetry does; return those before and afterwards."""
    import lightning.pytorch as pl

    model, module, run = build()
    loader = module.train_dataloader

    def adding():
        run.callbacks.append(pl.Callback())
        return loader()

    module.train_dataloader = adding
    before = list(run.callbacks)
    run_prune(model, {"target_ffn_hidden_size": 64}, module, run)
    return before == run.callbacks

"""What ranks execute for the tests of quantization and of the model utilities."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def corpus(path, rows: int = 24, blank: int = 2) -> str:
    """Write a JSON-lines file of texts, some of them blank, and return its path."""
    from test_code.support import tiny

    lines = [{"text": text} for text in tiny.texts(rows)] + [{"text": "  "}] * blank
    Path(path).write_text("\n".join(json.dumps(line) for line in lines))
    return str(path)


def make_checkpoint(path, llama: bool = False, steps: int = 3, **overrides) -> str:
    """Train a tiny model for some steps and write it as a full NeMo checkpoint.

    A Llama could come from Hugging Face, so its weights are numbers of bf16.
    """
    from nemo.collections import llm
    from test_code.support import tiny

    config = tiny.config(**overrides)
    model = tiny.model(config)
    if llama:
        settings = {
            name: getattr(config, name) for name in llm.LlamaConfig.__dataclass_fields__ if hasattr(config, name)
        }
        model = llm.LlamaModel(llm.LlamaConfig(**settings), optim=tiny.optim(), tokenizer=tiny.tokenizer())
    tiny.fit(model, save_to=path, max_steps=steps, bf16_weights=llama)
    return str(path)


def ptq(checkpoint, out, algorithm="fp8", fmt="nemo", tp=1, pp=1, quant=None, export=None) -> dict:
    """Run NeMo's own ``llm.ptq`` and return what the model and the report hold afterwards.

    Without a layout in ``export``, Hugging Face files have modelopt's.
    """
    from nemo.collections import llm
    from nemo.collections.llm.modelopt.quantization import quantizer as module

    seen = {}
    quantize = module.Quantizer.quantize

    def keep(self, model, forward_loop=None):
        out_model = quantize(self, model, forward_loop)
        seen.update(report=self.report, amax=amax_of(out_model), same=out_model is model)
        return out_model

    module.Quantizer.quantize = keep
    try:
        config = llm.QuantizationConfig if hasattr(llm, "QuantizationConfig") else module.QuantizationConfig
        llm.ptq(
            str(checkpoint),
            module.ExportConfig(path=str(out), export_format=fmt, **{"hf_layout": "modelopt", **(export or {})}),
            calibration_tp=tp,
            calibration_pp=pp,
            devices=tp * pp,
            num_nodes=1,
            quantization_config=config(
                algorithm=algorithm, calibration_batch_size=4, calibration_seq_len=32, **(quant or {})
            ),
        )
    finally:
        module.Quantizer.quantize = quantize
    return seen


def amax_of(model) -> dict[str, torch.Tensor]:
    """Return the amax of every enabled quantizer of this rank by name, layers numbered over the whole model."""
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from test_code.support import tiny

    core = tiny.core(model)
    names = {
        name: layer.layer_number - 1 for name, layer in core.named_modules() if isinstance(layer, TransformerLayer)
    }
    found = {}
    for name, module in core.named_modules():
        if name.endswith("_quantizer") and getattr(module, "amax", None) is not None and module.is_enabled:
            owner = next((n for n in names if name.startswith(n + ".")), None)
            key = name if owner is None else f"decoder.layers.{names[owner]}{name[len(owner) :]}"
            found[key] = module.amax.detach().cpu().clone()
    return found


def restored_amax(checkpoint, tp: int = 1, pp: int = 1) -> dict[str, torch.Tensor]:
    """Restore a quantized NeMo checkpoint at some layout and return its amax."""
    from nemo.collections.llm.modelopt import setup_trainer_and_restore_model_with_modelopt_spec

    model, _ = setup_trainer_and_restore_model_with_modelopt_spec(
        str(checkpoint), tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, devices=tp * pp
    )
    return amax_of(model)


def quantize_loaded(
    checkpoint,
    data,
    tp: int = 1,
    pp: int = 1,
    algorithm="fp8",
    before=None,
    export_format="nemo",
    first_stage_without_layers: bool = False,
    **quant,
) -> dict:
    """Restore a checkpoint on all ranks (what TP and PP leave over is data parallel) and quantize it.

    With ``before``, an algorithm, it is quantized with that one first, and a refusal is returned.
    """
    import os

    from megatron.core import parallel_state

    from nemo.collections.llm.modelopt import (
        ExportConfig,
        ModelOptConfigError,
        QuantizationConfig,
        Quantizer,
        setup_trainer_and_restore_model_with_modelopt_spec,
    )

    settings = {"calibration_dataset": data, "calibration_dataset_size": 20, "calibration_batch_size": 4}

    def quantizer_of(name) -> Quantizer:
        config = QuantizationConfig(algorithm=name, calibration_seq_len=32, **{**settings, **quant})
        return Quantizer(config, ExportConfig(path="unused", export_format=export_format))

    quantizer = quantizer_of(algorithm)
    model, _ = setup_trainer_and_restore_model_with_modelopt_spec(
        str(checkpoint),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        devices=int(os.environ["WORLD_SIZE"]),
    )
    if first_stage_without_layers and parallel_state.is_pipeline_first_stage():
        from test_code.support import tiny

        tiny.core(model).decoder.layers = torch.nn.ModuleList()
    if before is not None:
        quantizer_of(before).quantize(model)
    try:
        returned = quantizer.quantize(model)
    except ModelOptConfigError as error:
        if before is None:
            raise
        return {"error": str(error)}
    return {"report": quantizer.report, "amax": amax_of(model), "same": returned is model}


def ptq_error(*args, **kwargs) -> tuple[str, str, bool]:
    """Run `ptq`, which must fail; return the error's class and text, and whether anything was left at the target."""
    from pathlib import Path as P

    target = P(args[1])
    try:
        ptq(*args, **kwargs)
    except Exception as error:
        left = [p.name for p in target.parent.iterdir() if target.name in p.name]
        return type(error).__name__, str(error), bool(left)
    raise AssertionError("the export did not fail")


def hf_logits(folder, checkpoint) -> tuple:
    """Return the `Logits` of the Hugging Face checkpoint and of the fake-quantized NeMo checkpoint."""
    from nemo.collections.llm.modelopt import setup_trainer_and_restore_model_with_modelopt_spec
    from nemo.collections.llm.modelopt.quantization.export import hf_verify
    from test_code.support import tiny

    model, _ = setup_trainer_and_restore_model_with_modelopt_spec(str(checkpoint))
    # Norms that hold scales of inputs are rounded, and scales of the KV cache are at least one.
    with hf_verify.rounded(tiny.core(model), torch.bfloat16):
        ours = hf_verify.quantized_logits(tiny.core(model), tiny.VOCABULARY)
    return hf_verify.stored_logits(Path(folder), tiny.VOCABULARY), ours


def ptq_twice(checkpoint, nemo, hf, algorithm, quant) -> None:
    """Calibrate once and export to NeMo and to Hugging Face."""
    from nemo.collections.llm.modelopt.quantization import quantizer as module
    from nemo.collections.llm.modelopt.quantization.config import ExportConfig

    export = module.Quantizer.export

    def both(self, model, model_dir, trainer=None):
        export(self, model, model_dir, trainer)
        self.export_config = ExportConfig(path=str(nemo), export_format="nemo")
        export(self, model, model_dir, trainer)

    module.Quantizer.export = both
    try:
        ptq(checkpoint, hf, algorithm, "hf", quant=quant)
    finally:
        module.Quantizer.export = export


def export_loaded(checkpoint, target, tp: int = 1, pp: int = 1) -> None:
    """Restore a quantized NeMo checkpoint at some layout and write it as a Hugging Face checkpoint."""
    from nemo.collections.llm.modelopt import setup_trainer_and_restore_model_with_modelopt_spec
    from nemo.collections.llm.modelopt.quantization.quantizer import export_hf_checkpoint

    model, _ = setup_trainer_and_restore_model_with_modelopt_spec(
        str(checkpoint), tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, devices=tp * pp
    )
    layout = {"hf_layout": "modelopt"}
    assert export_hf_checkpoint(str(checkpoint), str(target), model=model, **layout) == Path(target)


def spec_after(name: str) -> str:
    """Return the layer spec that model_utils chooses for a configuration with the spec of that name."""
    from nemo.collections.llm.gpt.model import base

    from nemo.collections.llm.modelopt import model_utils
    from test_code.support import tiny

    def custom_spec(config):
        return base.local_layer_spec(config)

    spec = custom_spec if name == "custom_spec" else getattr(base, name)
    config = tiny.config(transformer_layer_spec=spec)
    return model_utils._spec_name(model_utils._set_gpt_mamba_modelopt_spec(config).transformer_layer_spec)


def quantize_with_loop(checkpoint) -> dict:
    """Quantize with a forward loop of the user's own."""
    from nemo.utils import logging

    from nemo.collections.llm.modelopt import (
        ExportConfig,
        QuantizationConfig,
        Quantizer,
        setup_trainer_and_restore_model_with_modelopt_spec,
    )
    from test_code.support import tiny

    model, _ = setup_trainer_and_restore_model_with_modelopt_spec(str(checkpoint))

    def loop(core):
        tiny.run(core, torch.arange(3, 35).unsqueeze(0))

    quantizer = Quantizer(QuantizationConfig(algorithm="int8"), ExportConfig(path="unused", export_format="nemo"))
    said: list[str] = []
    info = logging.info
    logging.info = lambda text, *a, **k: said.append(str(text))
    try:
        quantizer.quantize(model, loop)
    finally:
        logging.info = info
    return {"report": quantizer.report, "log": said}


def plain_logits(folder, checkpoint) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits of a plain Hugging Face checkpoint as `transformers` loads it, and of the NeMo checkpoint."""
    from transformers import AutoModelForCausalLM

    from nemo.collections.llm.modelopt import setup_trainer_and_restore_model_with_modelopt_spec
    from test_code.support import devices, tiny

    tokens = torch.arange(3, 35).unsqueeze(0)
    model, _ = setup_trainer_and_restore_model_with_modelopt_spec(str(checkpoint))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)(tokens).logits
        ours = devices.on_host(tiny.run(tiny.core(model).eval(), tokens))
    return theirs, ours


def train_quantized(checkpoint, steps: int = 24) -> list[float]:
    """Continue training a quantized checkpoint (quantization-aware training) and return the losses."""
    from nemo.lightning.ckpt_utils import ckpt_to_context_subdir

    from nemo import lightning as nl
    from nemo.collections.llm.modelopt import set_modelopt_spec_if_exists_in_ckpt
    from test_code.support import tiny

    model = nl.io.load_context(path=ckpt_to_context_subdir(checkpoint), subpath="model")
    model.optim = tiny.optim(lr=3e-3)
    model.optim.connect(model)
    set_modelopt_spec_if_exists_in_ckpt(model, checkpoint)
    losses = tiny.fit(model, restore=checkpoint, max_steps=steps)
    assert amax_of(model), "the quantizers were not restored"
    return losses


def which_package() -> str:
    """Return the file that serves the subpackage in this process."""
    from nemo.collections.llm.modelopt.quantization import quantizer

    return quantizer.__file__


def load_with_restore(checkpoint) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Load a quantized checkpoint as NeMo's trainer does, train one step; return amax before that and the loss."""
    from nemo.lightning.ckpt_utils import ckpt_to_context_subdir

    from nemo import lightning as nl
    from test_code.support import tiny

    model = nl.io.load_context(path=ckpt_to_context_subdir(checkpoint), subpath="model")
    model.optim = tiny.optim(lr=0.0)
    model.optim.connect(model)
    losses = tiny.fit(model, restore=checkpoint, max_steps=1)
    return amax_of(model), losses


def quantize_and_save(checkpoint, path) -> dict[str, torch.Tensor]:
    """Restore, quantize with a loop and save, with whichever subpackage serves this process."""
    from nemo.collections.llm.inference.base import _setup_trainer_and_restore_model
    from nemo.lightning.ckpt_utils import ckpt_to_context_subdir

    from nemo import lightning as nl
    from nemo.collections.llm.modelopt import ExportConfig, QuantizationConfig, Quantizer
    from test_code.support import tiny

    def loop(core):
        tiny.run(core, torch.arange(3, 35).unsqueeze(0))

    # Stock's own set-up function fails without Transformer Engine: these are its steps.
    model = nl.io.load_context(path=ckpt_to_context_subdir(checkpoint), subpath="model")
    del model.optim
    inference = {"setup_optimizers": False, "ckpt_load_optimizer": False, "ddp": "pytorch"}
    trainer = tiny.trainer(strategy_kwargs=inference)
    _setup_trainer_and_restore_model(checkpoint, trainer, model)
    trainer.strategy.restore_config = None
    config = QuantizationConfig(algorithm="fp8", enable_kv_cache=False)
    quantizer = Quantizer(config, ExportConfig(path=path, export_format="nemo"))
    quantizer.quantize(model, loop)
    quantizer.export(model, checkpoint, trainer)
    return amax_of(model)

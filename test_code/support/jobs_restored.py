"""What ranks execute for the tests of what an operation that fails leaves behind in its process."""

from __future__ import annotations

import functools

import torch

ERRORS = {"error": RuntimeError, "interruption": KeyboardInterrupt}


def _raiser(error: str, after: int = 1):
    """Return a hook that raises the error when it is called for the ``after``-th time."""
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == after:
            raise ERRORS[error]("in the middle of a forward pass")

    return hook


def _patched() -> dict[str, object]:
    """Return what modelopt and we replace at times, by name."""
    from megatron.core.tensor_parallel import layers
    from modelopt.torch.export import unified_export_megatron
    from modelopt.torch.nas.plugins import megatron as nas_plugin
    from modelopt.torch.quantization.nn import QuantModuleRegistry

    owners = {"layers": layers, "functional": torch.nn.functional, "exporter": unified_export_megatron.GPTModelExporter}
    found = {f"{owner}.{name}": value for owner, module in owners.items() for name, value in vars(module).items()}
    found["dist"] = nas_plugin.dist
    found["registry"] = sorted(str(key) for key in QuantModuleRegistry._registry)
    return found


def _differences(before: dict[str, object]) -> list[str]:
    after = _patched()
    same = {name for name in before if name in after and (before[name] is after[name] or before[name] == after[name])}
    return sorted((before.keys() | after.keys()) - same)


def _train(model=None) -> list[float]:
    from test_code.support import tiny

    return tiny.fit(model or tiny.model(), max_steps=3)


def _quantize(error: str, algorithm: str) -> None:
    from nemo.collections.llm.modelopt.quantization import quantizer as module
    from test_code.support import jobs_prune, tiny

    model, _, _ = jobs_prune.build()
    config = module.QuantizationConfig(algorithm=algorithm, enable_kv_cache=True, awq_block_size=32)

    def loop(core):
        core.decoder.layers[1].mlp.linear_fc2.input_quantizer.register_forward_hook(_raiser(error, after=2))
        for _ in range(3):
            ids = torch.arange(2 * tiny.SEQ_LENGTH).reshape(2, -1)
            mask = torch.ones(1, 1, tiny.SEQ_LENGTH, tiny.SEQ_LENGTH, dtype=torch.bool).triu(1)
            core(ids, ids % tiny.SEQ_LENGTH, mask)

    module.Quantizer(config, None).quantize(model, loop)


def _run_quantized(error: str, checkpoint: str) -> None:
    """Fail in a forward pass of a quantized checkpoint that is trained on."""
    from nemo.collections.llm.modelopt import setup_trainer_and_restore_model_with_modelopt_spec
    from test_code.support import tiny

    model, run = setup_trainer_and_restore_model_with_modelopt_spec(
        checkpoint, inference_only=False, trainer_kwargs={"max_steps": 1, "logger": False}
    )
    tiny.core(model).decoder.layers[1].mlp.linear_fc2.weight_quantizer.register_forward_hook(_raiser(error))
    run.fit(model, tiny.data())


def _prune(error: str) -> None:
    from test_code.support import jobs_prune, tiny

    model, module, run = jobs_prune.build()
    tiny.core(model).decoder.layers[1].mlp.linear_fc1.register_forward_hook(_raiser(error, after=2))
    jobs_prune.run_prune(model, {"target_ffn_hidden_size": 64}, module, run)


def _distill(error: str, teacher: str) -> None:
    from test_code.support import jobs_distill, tiny

    model = jobs_distill.distillation_model(teacher)
    hook = _raiser(error, after=3)
    configure = model.configure_model

    @functools.wraps(configure)
    def with_hook():
        configure()
        tiny.core(model).decoder.layers[1].mlp.linear_fc1.register_forward_hook(hook)

    model.configure_model = with_hook
    tiny.fit(model, max_steps=3)


FAILURES = {
    "fp8": functools.partial(_quantize, algorithm="fp8"),
    "int4_awq": functools.partial(_quantize, algorithm="int4_awq"),
    "quantized": _run_quantized,
    "prune": _prune,
    "distill": _distill,
}


def fail_then_train(kind: str, error: str, **given: str) -> dict:
    """Train, fail in the middle of something, train again; return both curves and what stayed replaced."""
    from test_code.support import ranks

    first = _train()
    ranks.reset()
    before = _patched()
    failed = ""
    try:
        FAILURES[kind](error, **given)
    except (RuntimeError, KeyboardInterrupt, SystemExit) as problem:
        failed = type(problem).__name__
    left = _differences(before)
    ranks.reset()
    return {"failed": failed, "left": left, "before": first, "after": _train()}


def train_with_interim(folder: str, asynchronous: bool) -> tuple[list[float], list[float], list[str]]:
    """Train with a checkpoint after each step, resume from the last one; return both curves and what was saved."""
    import os
    from pathlib import Path

    from nemo_modelopt_cli import intermediate
    from test_code.support import jobs_checkpoints, ranks, tiny

    here = Path(folder) / f"async {asynchronous}"
    layout = {"max_steps": 6, "strategy_kwargs": {"ckpt_async_save": asynchronous}}

    # Else the time that saving takes puts off the next checkpoint.
    share, intermediate._LONGEST_SHARE = intermediate._LONGEST_SHARE, 1e9

    def train(resume=None) -> list[float]:
        recorder = tiny.LossRecorder()
        run = tiny.trainer(callbacks=[recorder, intermediate.Interim(str(here), 1e-9)], **layout)
        torch.manual_seed(1234)
        run.fit(tiny.model(), jobs_checkpoints.CountedData(masked=False), ckpt_path=resume)
        return recorder.losses

    try:
        first = train()
        saved = sorted(os.listdir(here))
        ranks.reset()
        return first, train(str(here / saved[-1] / "weights")), saved
    finally:
        intermediate._LONGEST_SHARE = share

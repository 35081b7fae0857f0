"""After a failed or interrupted operation, other models of the process run as they did before."""

from __future__ import annotations

import functools
import types
from pathlib import Path

import pytest
import torch

from nemo_modelopt_dropin import versions
from test_code.support import installed, jobs_distill, jobs_quant

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
    from modelopt.torch.quantization.nn import QuantModuleRegistry

    owners = {"layers": layers, "functional": torch.nn.functional, "exporter": unified_export_megatron.GPTModelExporter}
    found = {f"{owner}.{name}": value for owner, module in owners.items() for name, value in vars(module).items()}
    if versions.pruning_problem() is None:
        from modelopt.torch.nas.plugins import megatron as nas_plugin

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
            tiny.run(core, ids, mask)

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


FAILURES = {
    "fp8": functools.partial(_quantize, algorithm="fp8"),
    "int4_awq": functools.partial(_quantize, algorithm="int4_awq"),
    "quantized": _run_quantized,
    "prune": _prune,
    "distill": _distill,
}


@pytest.fixture(scope="module")
def teacher(ranks_factory, tmp_path_factory) -> Path:
    """Train a tiny checkpoint."""
    folder = tmp_path_factory.mktemp("restored")
    ranks_factory(1).run(jobs_distill.teacher, str(folder / "teacher"))
    return folder / "teacher"


@pytest.mark.parametrize("error", ["error", "interruption"])
@pytest.mark.parametrize(
    "kind",
    [
        *(pytest.param(name, marks=installed.since_0_43) for name in ("fp8", "int4_awq")),
        "quantized",
        "prune",
        "distill",
    ],
)
def test_other_models_train_as_before_after_a_failure(ranks, teacher, kind, error):
    given = {}
    if kind == "distill":
        given = {"teacher": str(teacher)}
    if kind == "quantized":
        given = {"checkpoint": str(teacher.parent / "quantized")}
        if not Path(given["checkpoint"]).exists():
            text = jobs_quant.corpus(teacher.parent / "text.jsonl")
            data = {"calibration_dataset": text, "calibration_dataset_size": 8}
            ranks(1).run(jobs_quant.ptq, str(teacher), given["checkpoint"], quant=data, timeout=240)
    found = ranks(1).run(fail_then_train, kind, error, **given, timeout=240)[0]
    # Lightning ends a training that is interrupted with SystemExit.
    expected = {"error": {"RuntimeError"}, "interruption": {"KeyboardInterrupt", "SystemExit"}}
    assert found["failed"] in expected[error]
    assert found["left"] == []
    assert found["after"] == found["before"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("cached", [False, True])
def test_a_replaced_function_is_put_back(error, cached):
    from nemo.collections.llm.modelopt._functions import replace_function

    def before():
        return "before"

    package = types.SimpleNamespace(work=before, **({"_work": before} if cached else {}))
    names = dict(vars(package))
    with pytest.raises(error, match="inside"), replace_function(package, "work", lambda: package._work() + " after"):
        assert package.work() == "before after"
        raise error("inside")
    assert vars(package) == names


def test_all_of_modelopt_replaces_functions_safely():
    import sys

    from nemo.collections.llm.modelopt import _functions

    _functions.always_put_back()
    found = [m for name, m in sys.modules.items() if name.startswith("modelopt.") and hasattr(m, "replace_function")]
    assert len(found) >= 2
    assert all(module.replace_function is _functions.replace_function for module in found)

"""What the process with the fake GPU executes for the tests of quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from test_code.fake_gpu import device, models


class Quantized(NamedTuple):
    """What a quantization did.

    Attributes:
        quantizers: number of enabled quantizers of this rank.
        waits: functions of this package in which the host waited, in order.
        forward: number of waits in a forward pass of the quantized model.
    """

    quantizers: int
    waits: list[str]
    forward: int


def quantize(algorithm: str, tp: int, pp: int = 1, stage: int = 0, **options: Any) -> Quantized:
    """Calibrate a model, compare it with the original and measure the errors of its layers, as `Quantizer` does.

    Args:
        algorithm: a short name.
        tp: tensor-parallel ranks.
        pp: pipeline stages.
        stage: this rank's stage.
        **options: fields of the ``QuantizationConfig``.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import TensorQuantizer

    from nemo.collections.llm.modelopt.quantization import comparison, quant_cfg_choices
    from nemo.collections.llm.modelopt.quantization.calibration import batching, steps
    from nemo.collections.llm.modelopt.quantization.config import QuantizationConfig

    presets = quant_cfg_choices.get_quant_cfg_choices()
    with models.layout(tp, pp, stage) as layout:
        # Large enough for blocks of 128 in every shard.
        model_config = models.config(**layout, hidden_size=256, ffn_hidden_size=512)
        core = model_config.configure_model(None)
        core.eval()
        batches = [models.batch(model_config)["tokens"] for _ in range(2)]
        config = QuantizationConfig(algorithm=algorithm, layer_errors=True, **options)
        quant_cfg = presets[algorithm]
        if config.enable_kv_cache:
            entries, more = quant_cfg["quant_cfg"], mtq.FP8_KV_CFG["quant_cfg"]  # lists from modelopt 0.44
            quant_cfg["quant_cfg"] = {**entries, **more} if isinstance(more, dict) else [*entries, *more]
        plan = steps.make_plan(config, "gpt", quant_cfg, presets)

        def loop(model: Any) -> None:
            batching.run_forward(model, batches, lambda states: None, "Calibration")

        with device.count() as waits:
            before = comparison.hidden_states(core, batches, "Original model")
            steps.calibrate(mtq, core, plan, loop, None)
            report = steps.measure(config, core, batches, before)
            assert "layers" in report
        with device.count() as of_forward:
            loop(core)
        for name, tensor in [*core.named_parameters(), *core.named_buffers()]:
            assert tensor.device.type == device.GPU, name
        enabled = sum(isinstance(module, TensorQuantizer) and module.is_enabled for module in core.modules())
    own = [wait.where.rpartition(" ")[-1] for wait in waits if wait.ours]
    return Quantized(enabled, own, len(of_forward))


def logits_in_memory(tp: int, pp: int, stage: int) -> list[str]:
    """Return the functions of this package that wait while it computes the logits that verify an export."""
    import modelopt.torch.quantization as mtq

    from nemo.collections.llm.modelopt.quantization import quant_cfg_choices
    from nemo.collections.llm.modelopt.quantization.calibration import batching
    from nemo.collections.llm.modelopt.quantization.export import hf_verify
    from nemo.collections.llm.modelopt.quantization.insert import quantizers

    with models.layout(tp, pp, stage) as layout:
        config = models.config(**layout, hidden_size=256, ffn_hidden_size=512)
        core = config.configure_model(None)
        batches = [models.batch(config)["tokens"]]
        quant_cfg = quant_cfg_choices.get_quant_cfg_choices()["fp8"]
        with device.count():
            quantizers.insert(mtq, core, quant_cfg, lambda _: batching.run_forward(core, batches), None)
        with device.count() as waits:
            found = hf_verify.quantized_logits(core, config.vocab_size)
        assert [logits.device.type for logits in found] == ["cpu", "cpu"]
        assert [logits.shape[-1] for logits in found] == [config.vocab_size] * 2
        return [wait.where.rpartition(" ")[-1] for wait in waits if wait.ours]


def export(algorithm: str, layout: str, folder: str) -> tuple[list[str], dict[str, str]]:
    """Quantize a model and write it as a Hugging Face checkpoint.

    Args:
        algorithm: a short name.
        layout: a name of `layouts`.
        folder: folder of the checkpoint.

    Returns:
        The names of the files, and the type of each tensor by its name.
    """
    import importlib

    import modelopt.torch.quantization as mtq
    from safetensors.torch import load_file

    from nemo.collections import llm
    from nemo.collections.llm.modelopt.quantization import quant_cfg_choices
    from nemo.collections.llm.modelopt.quantization.calibration import batching
    from nemo.collections.llm.modelopt.quantization.export import hf_configs, hf_writer, layouts
    from nemo.collections.llm.modelopt.quantization.insert import quantizers
    from test_code.support import tiny

    quant_cfg = quant_cfg_choices.get_quant_cfg_choices()[algorithm]
    quant_cfg.setdefault("algorithm", "max")
    with models.layout():
        # Keys and values have 256 rows, so that blocks of 128 x 128 fit.
        config = models.config(hidden_size=256, ffn_hidden_size=512, kv_channels=128)
        model = llm.LlamaModel(config, tokenizer=tiny.tokenizer())
        core = config.configure_model(None)
        core.eval()
        batches = [models.batch(config)["tokens"]]
        with device.count(), hf_configs.in_memory(model):
            quantizers.insert(mtq, core, quant_cfg, lambda _: batching.run_forward(core, batches), None)
            exporter = hf_configs.exporter_of(model)
            chosen = importlib.import_module(f"{layouts.__name__}.{layout}")
            hf_writer.write(core, exporter, None, Path(folder), layout=chosen)
    tensors = load_file(Path(folder) / "model.safetensors")
    return sorted(path.name for path in Path(folder).iterdir()), {n: str(t.dtype) for n, t in tensors.items()}

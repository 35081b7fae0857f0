"""An export holds the tensors of one file at a time, however many files there are."""

from __future__ import annotations

import pytest

LAYERS, SHARD = 32, 500_000


def peak(folder: str, quantized: bool) -> tuple[int, int, int]:
    """Write a model in files of limited size.

    Args:
        folder: Where to write to.
        quantized: Quantize to FP8 first.

    Returns:
        The peak of the bytes that the export allocates, the bytes of its largest parameter in fp32, and of all files.
    """
    from pathlib import Path

    import modelopt.torch.quantization as mtq
    import torch

    from nemo.collections import llm
    from nemo.collections.llm.modelopt.quantization.export import hf_configs, hf_writer
    from test_code.support import devices, tiny

    tiny.init_parallel()
    sizes = {"num_layers": LAYERS, "hidden_size": 128, "ffn_hidden_size": 256, "kv_channels": 64}
    model = llm.LlamaModel(tiny.config(**sizes), tokenizer=tiny.tokenizer())
    model.configure_model()
    core = devices.place(tiny.core(model).to(torch.bfloat16))
    if quantized:
        tokens = torch.arange(32)[None]
        mtq.quantize(core, mtq.FP8_DEFAULT_CFG, lambda core: tiny.run(core, tokens))
    with hf_configs.in_memory(model):
        exporter = hf_configs.exporter_of(model)
        found = tiny.peak_bytes(
            lambda: hf_writer.write(core, exporter, None, Path(folder), torch.bfloat16, max_shard_bytes=SHARD)
        )
    largest = max(parameter.numel() for parameter in core.parameters()) * 4
    files = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return found, largest, files


@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "fp8"])
def test_an_export_allocates_less_than_two_files(ranks, tmp_path, quantized):
    ((found, largest, files),) = ranks(1).run(peak, str(tmp_path / "hf"), quantized)
    # One file, and the parameter that is encoded: values in fp32, codes, and what the quantizer computes on the way.
    assert found <= SHARD + 4 * largest < files / 2

"""An export holds one parameter at a time, and its check one decoder layer, whatever the size of the files."""

from __future__ import annotations

import pytest

LAYERS, SMALL = 32, 500_000


def peak(folder: str, quantized: bool, shard: int) -> dict[str, int]:
    """Write a model in files of limited size, and compute its logits from them.

    Args:
        folder: Where to write to.
        quantized: Quantize to FP8 first.
        shard: The largest size of a file.

    Returns:
        The peaks of the bytes that the export and its check allocate, the bytes of the largest parameter and of all
        parameters in fp32, and of all files.
    """
    from pathlib import Path
    from unittest.mock import patch

    import modelopt.torch.quantization as mtq
    import torch

    from nemo.collections import llm
    from nemo.collections.llm.modelopt.quantization.export import hf_configs, hf_shards, hf_verify, hf_writer
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
        written = hf_shards.Writer.write
        peaks: list[int] = []

        def measured(*arguments) -> None:
            # Without what reads the files afterwards: the profiler counts mapped files.
            peaks.append(tiny.peak_bytes(lambda: written(*arguments)))

        with patch.object(hf_shards.Writer, "write", measured):
            hf_writer.write(core, exporter, None, Path(folder), torch.bfloat16, max_shard_bytes=shard)
    sizes = [4 * parameter.numel() for parameter in core.parameters()]
    files = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    check = tiny.peak_bytes(lambda: hf_verify.stored_logits(Path(folder), tiny.VOCABULARY))
    return {"export": peaks[0], "check": check, "largest": max(sizes), "all": sum(sizes), "files": files}


@pytest.mark.parametrize("shard", [SMALL, 10**9], ids=["many files", "one file"])
@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "fp8"])
def test_an_export_and_its_check_stream(ranks, tmp_path, quantized, shard):
    (found,) = ranks(1).run(peak, str(tmp_path / "hf"), quantized, shard)
    # The parameter that is encoded: values in fp32, codes, and what the quantizer computes on the way.
    assert found["export"] <= SMALL + 4 * found["largest"] < found["files"] / 2
    # A decoder layer of 32 in fp32, what decoding computes on the way, and activations. Mapped files count as memory.
    assert found["check"] - found["files"] < found["all"] / 4

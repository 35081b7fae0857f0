"""A user's replacement of modelopt's writer is called as in stock, for real models too."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from test_code.support import installed, jobs_quant


def export(folder: str, how: str) -> dict:
    """Export a tiny Llama with a replaced writer; return how the writer was called.

    Args:
        folder: Where to write to.
        how: "attribute" replaces ``quantizer.mte``, "package" the function of ``modelopt.torch.export``.
    """
    import modelopt.torch.export as mte

    from nemo.collections.llm.modelopt.quantization import quantizer
    from test_code.support import tiny

    calls: list[dict] = []
    original = mte.export_mcore_gpt_to_hf

    def writer(model, pretrained_model_name_or_path, export_dir, **kwargs):
        source = sorted(path.name for path in Path(pretrained_model_name_or_path).iterdir())
        calls.append({"core": type(tiny.core(model)).__name__, "source": source, "kwargs": kwargs})
        original(model, pretrained_model_name_or_path, export_dir=export_dir, **kwargs)
        (Path(export_dir) / "mine.txt").write_text("written by the replacement")

    jobs_quant.make_checkpoint(f"{folder}/llama", True)
    quant = {"calibration_dataset": jobs_quant.corpus(f"{folder}/text.jsonl"), "calibration_dataset_size": 16}
    owner, name = (quantizer, "mte") if how == "attribute" else (mte, "export_mcore_gpt_to_hf")
    kept = getattr(owner, name)
    setattr(owner, name, SimpleNamespace(export_mcore_gpt_to_hf=writer) if how == "attribute" else writer)
    try:
        jobs_quant.ptq(f"{folder}/llama", f"{folder}/out", "fp8", "hf", quant={"enable_kv_cache": False, **quant})
    finally:
        setattr(owner, name, kept)
    return calls


@pytest.mark.xfail(
    not installed.OWN_WRITER_RUNS,
    reason="modelopt's writer needs a module of a later Megatron: see docs/versions.md",
    strict=True,
)
@pytest.mark.parametrize("how", ["attribute", "package"])
def test_a_replaced_writer_writes_a_real_model(ranks, tmp_path, how):
    ((call,),) = ranks(1).run(export, str(tmp_path), how)
    assert call["core"] == "GPTModel" and "config.json" in call["source"]
    # The arguments that stock passes; ours (layout, sizes of files) are not passed to it.
    assert call["kwargs"] == {}
    out = tmp_path / "out"
    assert (out / "mine.txt").read_text() == "written by the replacement"
    # Its codes are rounded by other arithmetic than those in memory; nothing of it is verified or changed.
    assert json.loads((out / "hf_quant_config.json").read_text())["quantization"]["quant_algo"] == "FP8"
    assert not (out / "README.md").exists()

"""What ranks execute for the tests of the layouts of Hugging Face files: one model in each format and layout."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

from test_code.support import jobs_hf, jobs_quant, jobs_state, ranks, tiny


def write_all(folder, algorithms: list[str], tp: int = 1) -> dict[tuple[str, str], float | str]:
    """Write and verify a random Qwen3 in each layout; return the relative error of the logits, or the traceback.

    Args:
        folder: For the checkpoints.
        algorithms: To quantize with.
        tp: Tensor parallel size.
    """
    from nemo.collections.llm.modelopt.quantization import quantizer as module
    from nemo.collections.llm.modelopt.quantization.export import hf_files, hf_verify, hf_writer
    from nemo.collections.llm.modelopt.quantization.export.layouts import LAYOUTS

    data = jobs_quant.corpus(Path(folder) / "text.jsonl")
    checkpoint = str(Path(folder) / "nemo")
    if not Path(checkpoint).exists():
        # Heads of 128 rows, so that each block of 128 x 128 belongs to one of q, k and v.
        checkpoint = jobs_hf.import_hf(jobs_hf.hf_model("qwen3", 0), folder)
        ranks.reset()
    found: dict[tuple[str, str], float | str] = {}
    errors: list[float] = []
    compare = hf_verify.compare
    hf_verify.compare = lambda *args: errors.append(compare(*args))
    try:
        for algorithm in algorithms:
            model, _ = jobs_state.restored(checkpoint, tp=tp)
            settings = {"enable_kv_cache": False}
            jobs_state.quantizer_for(data, algorithm=algorithm, **settings).quantize(model)
            exporter = module.load_connector_from_trainer_ckpt(checkpoint, "hf")
            for name, layout in LAYOUTS.items():
                target = Path(folder) / f"{algorithm}-{name}"
                try:
                    hf_writer.write(tiny.core(model), exporter, None, target, torch.bfloat16, layout)
                    hf_files.verify(target)
                    hf_verify.check_logits(tiny.core(model), target, torch.bfloat16)
                    found[algorithm, name] = errors.pop() if errors else 0.0
                except Exception:
                    found[algorithm, name] = traceback.format_exc()
            ranks.reset()
    finally:
        hf_verify.compare = compare
    return found

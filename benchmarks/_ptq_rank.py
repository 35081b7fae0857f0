"""Run the part of ``benchmarks/ptq.py`` that a rank executes: one timed `quantize` of a GPT, on stock or on ours."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from typing import Any

import torch

_CALIBRATES: list[bool] = []


def _mark_calibration() -> None:
    """Mark in `_CALIBRATES` when our subpackage runs the calibration data through the model."""
    from nemo.collections.llm.modelopt.quantization.calibration import batching

    if hasattr(batching, "run_loader_unmarked"):
        return
    batching.run_loader_unmarked = batching.run_loader

    def marked(*args, **kwargs):
        _CALIBRATES.append(True)
        try:
            batching.run_loader_unmarked(*args, **kwargs)
        finally:
            _CALIBRATES.clear()

    batching.run_loader = marked


def _memory(name: str) -> int:
    """Return an entry of /proc/self/status in bytes."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(name + ":"))


def build(sizes: dict[str, int], tokenizer_folder: str) -> Any:
    """Return an ``llm.LlamaModel`` with weights drawn from a fixed seed."""
    from nemo.collections.common.tokenizers import AutoTokenizer

    from nemo.collections import llm
    from test_code.support import tiny

    own = tiny.config(**sizes)
    fields = {n: getattr(own, n) for n in llm.LlamaConfig.__dataclass_fields__ if hasattr(own, n)}
    model = llm.LlamaModel(llm.LlamaConfig(**fields), tokenizer=AutoTokenizer(tokenizer_folder))
    torch.manual_seed(7)
    model.configure_model()
    return model.eval()


def quantize(
    sizes: dict[str, int], tokenizer: str, settings: dict[str, Any], comparison: bool = True
) -> dict[str, Any]:
    """Quantize a new model and measure time, memory beyond the model, and the number of calibration tokens.

    Args:
        sizes: sizes of the model.
        tokenizer: folder of a Hugging Face tokenizer.
        settings: settings of the QuantizationConfig.
        comparison: whether our quantizer compares the result with the original, its default; stock has no comparison.

    Returns:
        ``seconds``, ``peak`` bytes, ``rank``, computed ``positions``, ``real`` tokens and the ``package`` that ran.
    """
    from nemo.collections.llm.modelopt.quantization import quantizer as module
    from test_code.support import tiny

    tiny.init_parallel()
    model = build(sizes, tokenizer)
    known = module.QuantizationConfig.__dataclass_fields__
    ours = "comparison_size" in known
    extra = {} if comparison or not ours else {"comparison_size": 0, "layer_errors": False}
    config = module.QuantizationConfig(**{**settings, **{k: v for k, v in extra.items() if k in known}})
    quantizer = module.Quantizer(config, module.ExportConfig(path="unused", export_format="nemo"))
    tokens = {"positions": 0, "real": 0}

    def see(_, arguments, keywords):
        ids = keywords["input_ids"] if "input_ids" in keywords else arguments[0]
        # Forward passes of the comparison are not calibration.
        if not ours or _CALIBRATES:
            tokens["positions"] += ids.numel()
            tokens["real"] += int((ids != model.tokenizer.eos).sum())

    tiny.core(model).embedding.register_forward_pre_hook(see, with_kwargs=True)
    if ours:
        _mark_calibration()
    gc.collect()
    # Return freed memory of earlier runs to the system; otherwise the peak would not show.
    ctypes.CDLL(None).malloc_trim(0)
    torch.distributed.barrier()
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    resident, start = _memory("VmRSS"), time.perf_counter()
    quantizer.quantize(model)
    torch.distributed.barrier()
    seconds = time.perf_counter() - start
    found = {"seconds": seconds, "peak": _memory("VmHWM") - resident, "rank": int(os.environ["RANK"]), **tokens}
    found["package"] = "ours" if ours else "stock"
    return found

"""What ranks execute for the tests of mixed precision and of quant_cfg patterns."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from test_code.support import jobs_quant, jobs_state


@contextlib.contextmanager
def counted():
    """Count the micro-batches that calibrate and that are scored."""
    from nemo.collections.llm.modelopt.quantization.insert import mixed_precision

    counts = {"_calibrate": 0, "_score": 0}
    kept = {name: getattr(mixed_precision, name) for name in counts}

    def counting(name):
        def run(model, batches, title):
            counts[name] += len(batches)
            return kept[name](model, batches, title)

        return run

    for name in counts:
        setattr(mixed_precision, name, counting(name))
    try:
        yield counts
    finally:
        for name, function in kept.items():
            setattr(mixed_precision, name, function)


def search(checkpoint, data, tp=1, pp=1, **settings) -> dict:
    """Quantize with mixed precision; return the report, the amax and how often each part of the data ran."""
    with counted() as counts:
        options = {"awq_block_size": 16, "auto_quantize_bits": 10.0, **settings}
        found = jobs_quant.quantize_loaded(checkpoint, data, tp, pp, "auto", **options)
    return {**found, "counts": counts}


def searches(checkpoint, data, tp=1, pp=1, runs=()) -> list[dict]:
    """Run some searches one after the other, in groups of their own."""
    from test_code.support import ranks

    found = []
    for index, settings in enumerate(runs):
        if index:
            ranks.reset()
        try:
            found.append(search(checkpoint, data, tp, pp, **settings))
        except ValueError as error:
            found.append({"error": f"{type(error).__name__}: {error}"})
    return found


def ptq_of_dataset(checkpoint, out, **settings) -> dict:
    """Run NeMo's own ``llm.ptq`` with a ``datasets.Dataset`` and mixed precision; return what the model held."""
    import datasets

    from test_code.support import tiny

    data = datasets.Dataset.from_dict({"body": tiny.texts(12), "number": list(range(12))})
    quant = {"calibration_dataset": data, "calibration_column": "body", "calibration_dataset_size": 12, **settings}
    return jobs_quant.ptq(checkpoint, out, "auto", quant=quant)


def quantize_many(checkpoint, data, tp, pp, runs) -> list[str]:
    """Quantize with one setting after the other, each in groups of its own; return what went wrong, "" for nothing."""
    from test_code.support import ranks

    found = []
    for index, settings in enumerate(runs):
        if index:
            ranks.reset()
        try:
            jobs_quant.quantize_loaded(checkpoint, data, tp, pp, **settings)
        except ValueError as error:
            found.append(f"{type(error).__name__}: {error}")
        else:
            found.append("")
    return found


def clamped(checkpoint, data) -> dict[str, dict]:
    """Return amax before and after the clamp of a mixed model that counts as a "gpt" decoder."""
    from nemo.collections.llm.modelopt.quantization.insert import quantizers
    from test_code.support import tiny

    found = {}
    kept = quantizers.keep_amax_from_vanishing

    def watch(mtq, model, algorithm, formats=None):
        found["before"] = _inputs(model)
        found["formats"] = formats
        kept(mtq, model, algorithm, formats)
        found["after"] = _inputs(model)

    def _inputs(model):
        return {
            name: float(module.amax.max())
            for name, module in model.named_modules()
            if name.endswith("input_quantizer") and getattr(module, "amax", None) is not None and module.is_enabled
        }

    quantizers.keep_amax_from_vanishing = watch
    try:
        settings = {"algorithm": "auto", "auto_quantize_formats": ["w4a8_awq", "fp8"], "auto_quantize_bits": 9.0}
        settings["awq_block_size"] = 16
        export = {"path": "unused", "export_format": "nemo", "decoder_type": "gpt"}
        quantizer = jobs_state.quantizer_for(data, export=export, **settings)
        model, _ = jobs_state.restored(checkpoint)
        quantizer.quantize(model)
    finally:
        quantizers.keep_amax_from_vanishing = kept
    found["size"] = len(list(tiny.core(model).modules()))
    return found


def auto_to_hf(checkpoint, data, out, **settings) -> dict:
    """Quantize with mixed precision and export to Hugging Face, fully verified; return what the model was."""
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from test_code.support import tiny

    export = {"path": str(out), "export_format": "hf", "hf_layout": "modelopt"}
    quantizer = jobs_state.quantizer_for(data, export=export, algorithm="auto", **settings)
    model, trainer = jobs_state.restored(checkpoint)
    quantizer.quantize(model)
    try:
        quantizer.export(model, str(checkpoint), trainer)
    except ModelOptConfigError as error:
        return {"error": str(error), "left": Path(out).exists(), "formats": quantizer.report["formats"]}
    from nemo.collections.llm.modelopt.quantization.export import hf_verify

    # What is not quantized is rounded, and scales of the KV cache are at least one.
    with hf_verify.rounded(tiny.core(model), torch.bfloat16):
        ours = hf_verify.quantized_logits(tiny.core(model), tiny.VOCABULARY)
    return {
        "formats": quantizer.report["formats"],
        "logits": (hf_verify.stored_logits(Path(out), tiny.VOCABULARY), ours),
        "error": "",
    }

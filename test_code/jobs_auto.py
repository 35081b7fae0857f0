"""What ranks execute for the tests of mixed precision and of quant_cfg patterns."""

from __future__ import annotations

import contextlib

from test_code import jobs_quant


@contextlib.contextmanager
def counted():
    """Count the microbatches that calibrate and that are scored."""
    from nemo.collections.llm.modelopt.quantization import auto

    counts = {"_calibrate": 0, "_score": 0}
    kept = {name: getattr(auto, name) for name in counts}

    def counting(name):
        def run(model, batches, title):
            counts[name] += len(batches)
            return kept[name](model, batches, title)

        return run

    for name in counts:
        setattr(auto, name, counting(name))
    try:
        yield counts
    finally:
        for name, function in kept.items():
            setattr(auto, name, function)


def search(checkpoint, data, tp=1, pp=1, **settings) -> dict:
    """Quantize with mixed precision; return the report, the amax and how often each part of the data ran."""
    with counted() as counts:
        options = {"awq_block_size": 16, "auto_quantize_bits": 10.0, **settings}
        found = jobs_quant.quantize_loaded(checkpoint, data, tp, pp, "auto", **options)
    return {**found, "counts": counts}


def searches(checkpoint, data, tp=1, pp=1, runs=()) -> list[dict]:
    """Run some searches one after the other, in groups of their own."""
    from test_code import ranks

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

    from test_code import tiny

    data = datasets.Dataset.from_dict({"body": tiny.texts(12), "number": list(range(12))})
    quant = {"calibration_dataset": data, "calibration_column": "body", "calibration_dataset_size": 12, **settings}
    return jobs_quant.ptq(checkpoint, out, "auto", quant=quant)


def quantize_many(checkpoint, data, tp, pp, runs) -> list[str]:
    """Quantize with one setting after the other, each in groups of its own; return what went wrong, "" for nothing."""
    from test_code import ranks

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

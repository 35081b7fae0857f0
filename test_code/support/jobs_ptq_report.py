"""What ranks execute for the tests of the quantization report."""

from __future__ import annotations

import torch

from test_code.support import jobs_state


def report_of(checkpoint, data, tp=1, pp=1, **settings) -> dict:
    """Quantize and return the report."""
    quantizer = jobs_state.quantizer_for(data, **settings)
    model, _ = jobs_state.restored(checkpoint, tp, pp)
    quantizer.quantize(model)
    return quantizer.report


def reports(checkpoint, data, tp, pp, runs) -> list[dict]:
    """Return the report of each run, in groups of their own."""
    from test_code.support import ranks

    found = []
    for index, settings in enumerate(runs):
        if index:
            ranks.reset()
        found.append(report_of(checkpoint, data, tp, pp, **settings))
    return found


def exported_report(checkpoint, data, out, report_path, fmt="nemo", **settings) -> dict:
    """Quantize, export with a report, and return what the quantizer holds."""
    export = {"path": str(out), "export_format": fmt, "report_path": str(report_path)}
    quantizer = jobs_state.quantizer_for(data, export=export, **settings)
    model, trainer = jobs_state.restored(checkpoint)
    quantizer.quantize(model)
    quantizer.export(model, str(checkpoint), trainer)
    return quantizer.report


def by_hand(checkpoint, data, layer: str) -> dict[str, float]:
    """Return errors of one layer and KL(original || quantized), computed from whole tensors and logits."""
    from test_code.support import tiny

    quantizer = jobs_state.quantizer_for(data, layer_errors=False)
    original, _ = jobs_state.restored(checkpoint)
    _, batches = quantizer._read_rows(original)
    core = tiny.core(original).eval()

    def logits(model):
        with torch.no_grad():
            outputs = [model(b, torch.arange(b.shape[1]).expand(b.shape), None) for b in batches]
        return torch.cat([out.double().flatten(0, 1) for out in outputs]).log_softmax(-1)

    before = logits(core)
    quantizer.quantize(original)
    module = core.get_submodule(layer)
    seen = []
    module.input_quantizer.register_forward_hook(lambda _, args, out: seen.append((args[0].double(), out.double())))
    after = logits(core)
    ratio = {}
    with torch.no_grad():
        pairs = {"weight": [(module.weight.double(), module.weight_quantizer(module.weight).double())]}
    pairs["activation"] = seen[: len(batches)][:4]
    for kind, values in pairs.items():
        signal = sum(float((x**2).sum()) for x, _ in values)
        noise = sum(float(((x - q) ** 2).sum()) for x, q in values)
        ratio[f"{kind}_sqnr_db"] = 10 * float(torch.tensor(signal / noise, dtype=torch.float64).log10())
    kl = float((before.exp() * (before - after)).sum(-1).mean())
    return {**ratio, "kl_to_original": kl, "batches": len(batches)}

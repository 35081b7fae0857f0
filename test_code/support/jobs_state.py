"""What ranks execute for the tests of the calibrated state and of failing exports."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
import time
from pathlib import Path

import torch

from test_code.support import jobs_quant

FILE = "tp0_pp0_ep0.safetensors"


@contextlib.contextmanager
def counted():
    """Count the microbatches that run through the model for calibration, its search or the comparison."""
    from nemo.collections.llm.modelopt.quantization.calibration import batching
    from nemo.collections.llm.modelopt.quantization.insert import mixed_precision

    counts = {"forward": 0, "score": 0}
    kept = batching.run_forward, mixed_precision._score

    def run_forward(model, batches, *args, **kwargs):
        counts["forward"] += len(batches)
        return kept[0](model, batches, *args, **kwargs)

    def score(model, batches, title):
        counts["score"] += len(batches)
        return kept[1](model, batches, title)

    batching.run_forward, mixed_precision._score = run_forward, score
    try:
        yield counts
    finally:
        batching.run_forward, mixed_precision._score = kept


def restored(checkpoint, tp=1, pp=1):
    from nemo.collections.llm.modelopt import setup_trainer_and_restore_model_with_modelopt_spec

    return setup_trainer_and_restore_model_with_modelopt_spec(
        str(checkpoint),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        devices=int(os.environ["WORLD_SIZE"]),
    )


def quantizer_for(data, algorithm="fp8", export=None, **settings):
    from nemo.collections.llm.modelopt import ExportConfig, QuantizationConfig, Quantizer

    own = {"calibration_dataset": str(data), "calibration_dataset_size": 20, "calibration_batch_size": 4}
    config = QuantizationConfig(algorithm=algorithm, calibration_seq_len=32, **{**own, **settings})
    return Quantizer(config, None if export is None else ExportConfig(**export))


def everything_of(model, tp, pp) -> dict:
    """Return all tensors of a model, the settings of its quantizers, and its logits or hidden states."""
    from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer

    from nemo.collections.llm.modelopt.quantization.calibration import batching
    from test_code.support import tiny

    core = tiny.core(model).eval()
    tensors = {n: v for n, v in core.state_dict().items() if not n.endswith("_extra_state")}
    found: dict = {f"tensor {n}": v.clone() for n, v in tensors.items()}
    for name, module in core.named_modules():
        if isinstance(module, (TensorQuantizer, SequentialQuantizer)):
            found[f"settings {name}"] = sorted((key, str(v)) for key, v in module.get_modelopt_state().items())
    outputs: list[torch.Tensor] = []
    batching.run_forward(core, [torch.arange(3, 35).unsqueeze(0)], outputs.append, "Outputs")
    if outputs:
        found["outputs"] = outputs[0].clone()
    return found


def unequal(first: dict, second: dict) -> list[str]:
    """Return the names of the entries that differ in any bit."""
    found = sorted(set(first) ^ set(second))
    for name in set(first) & set(second):
        a, b = first[name], second[name]
        same = torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b
        if not same:
            found.append(name)
    return found


def save_and_load(checkpoint, data, work, tp, pp, runs) -> list[dict]:
    """Quantize and save the state, then load it into a fresh model; compare both, and what they export.

    A run is the settings of a QuantizationConfig; "hf" among them exports both models to that format.
    """
    from test_code.support import ranks

    found = []
    for index, run in enumerate(runs):
        settings = {name: value for name, value in run.items() if name != "hf"}
        state, seen, files = Path(work) / f"state-tp{tp}-pp{pp}-{index}", [], []
        for step in ("calibrated", "loaded"):
            if found or seen:
                ranks.reset()
            target = f"{work}/hf-tp{tp}-pp{pp}-{index}-{step}"
            export = {"path": target, "export_format": "hf", "verify": "files", "dtype": "bf16"}
            quantizer = quantizer_for(data, export=export if run.get("hf") else None, **settings)
            model, trainer = restored(checkpoint, tp, pp)
            with counted() as counts:
                if step == "calibrated":
                    quantizer.quantize(model)
                    quantizer.save_state(state)
                else:
                    assert quantizer.load_state(state, model) is model
            seen.append((everything_of(model, tp, pp), quantizer.report, counts))
            if run.get("hf"):
                quantizer.export(model, str(checkpoint), trainer)
                files.append(target)
        (first, report, before), (second, again, after) = seen
        found.append(
            {
                "unequal": unequal(first, second),
                "size": len(first),
                "reports": (report, again),
                "forward": (before["forward"], after["forward"], after["score"]),
                "state": sorted(p.name for p in state.iterdir() if not p.name.startswith(".")),
                "hf": files,
            }
        )
    return found


def load_errors(checkpoint, data, work, kv_cache: bool) -> dict[str, str]:
    """Return the error of each attempt to use a state where it does not belong; with KV-cache quantizers or without."""
    from test_code.support import ranks, tiny

    state = Path(work) / "one-state"
    quantizer = quantizer_for(data)
    model, _ = restored(checkpoint)
    errors = {}
    try:
        quantizer.save_state(state)
    except ValueError as error:
        errors["nothing calibrated"] = str(error)
    quantizer.quantize(model)
    quantizer.save_state(state)
    broken = Path(work) / "broken-state"
    broken.mkdir()
    (broken / FILE).write_bytes((state / FILE).read_bytes()[:5000])
    for name in ("empty-state", "pickle-state", "old-state", "foreign-state"):
        (Path(work) / name).mkdir()
    torch.save({"fingerprint": {}}, Path(work) / "pickle-state" / FILE)
    torch.save({"fingerprint": {}}, Path(work) / "old-state" / "tp0_pp0_ep0.pt")
    (Path(work) / "foreign-state" / "thesis.tex").write_text("years")
    try:
        quantizer.save_state(Path(work) / "foreign-state")
    except ValueError as error:
        errors["foreign"] = str(error)
    assert (Path(work) / "foreign-state" / "thesis.tex").read_text() == "years"
    other_data = Path(work) / "other.jsonl"
    other_data.write_text(Path(data).read_text().replace("model", "muddle"))
    cases = {
        "algorithm": ({"algorithm": "int8"}, state),
        "option": ({"enable_kv_cache": False}, state),
        "sequence": ({"calibration_seq_len": 16}, state),
        "data": ({"calibration_dataset": str(other_data)}, state),
        "weights": ({}, state),
        "broken": ({}, broken),
        "empty": ({}, Path(work) / "empty-state"),
        "pickle": ({}, Path(work) / "pickle-state"),
        "old": ({}, Path(work) / "old-state"),
        "missing": ({}, Path(work) / "no-state"),
    }
    if not kv_cache:
        del cases["option"]  # the state has no such quantizers either
    for label, (settings, path) in cases.items():
        ranks.reset()
        own = {"calibration_dataset": str(data), "calibration_dataset_size": 20, "calibration_batch_size": 4}
        from nemo.collections.llm.modelopt import QuantizationConfig, Quantizer

        fresh = Quantizer(QuantizationConfig(**{"calibration_seq_len": 32, **own, **settings}), None)
        model, _ = restored(checkpoint)
        if label == "weights":
            with torch.no_grad():
                tiny.core(model).decoder.final_layernorm.weight[0] += 1e-3
        try:
            fresh.load_state(path, model)
        except ValueError as error:
            errors[label] = str(error)
        names = [name for name, _ in tiny.core(model).named_modules() if name.endswith("_quantizer")]
        assert not names, f"{label}: a refused state left quantizers behind"
    return errors


def wrong_layout(checkpoint, data, state) -> str:
    """Load a state of one rank on two tensor-parallel ranks and return the error of this rank."""
    quantizer = quantizer_for(data)
    model, _ = restored(checkpoint, tp=2)
    try:
        quantizer.load_state(state, model)
    except ValueError as error:
        return str(error)
    return "none"


class Planted:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def plant_pickles(checkpoint, data, folder) -> dict:
    """Quantize with a state folder in which somebody has put pickles under both names, with our marker."""
    from nemo_modelopt_dropin import files

    kept = Path(folder) / "planted.calibration-state"
    kept.mkdir(parents=True)
    for name in (FILE, "tp0_pp0_ep0.pt"):
        torch.save({"fingerprint": {}, "code": Planted(f"{folder}/ran")}, kept / name)
    files.mark(kept, files.CALIBRATION_STATE, [FILE])
    quantizer = quantizer_for(data, calibration_state=str(kept))
    model, _ = restored(checkpoint)
    with counted() as counts:
        quantizer.quantize(model)
    quantizer._forget()
    return {"forward": counts["forward"], "left": sorted(p.name for p in [kept, *kept.glob("*.pt")])}


def fill_before_quantize(checkpoint, data, folder) -> tuple[str, list[str]]:
    """Put a user's file into the folder of the state before `quantize` starts; return the error and what is left."""
    quantizer = quantizer_for(data, calibration_state=folder)
    model, _ = restored(checkpoint)
    Path(folder).mkdir()
    (Path(folder) / "thesis.tex").write_text("years")
    try:
        quantizer.quantize(model)
    except ValueError as error:
        return str(error), sorted(p.name for p in Path(folder).iterdir())
    return "none", []


# --- failing exports ---


@contextlib.contextmanager
def _small_files(limit: int):
    """Let writes past ``limit`` bytes of a file fail in this process and in those it starts, as on a full disk."""
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)


def _kill_once_written(staging: Path) -> None:
    """Kill this process and all it has started as soon as the export has written a part of a file."""

    def watch():
        while not any(p.is_file() and p.stat().st_size > 0 for p in staging.rglob("*")):
            time.sleep(0.001)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def ptq_that_fails(checkpoint, data, out, fmt, how, algorithm="fp8", tp=1, **settings) -> dict:
    """Run ``llm.ptq`` with a kept state and let the export fail; return what is left and what it cost.

    Args:
        checkpoint: The model.
        data: Calibration file.
        out: Where to export to.
        fmt: Export format.
        how: "full" for a disk that is full in the middle of the export, "killed", or "" for no failure.
        algorithm: Quantization algorithm.
        tp: Tensor parallel size.
        **settings: Of the QuantizationConfig.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    from nemo.collections.llm.modelopt.quantization.export import writers

    out = Path(out)
    write, kept = writers.write, f"{out}.calibration-state"
    seen: dict = {}

    def failing(*args, **kwargs):
        seen["amax"] = jobs_quant.amax_of(args[2])
        if how == "killed":
            _kill_once_written(out.parent / f".{out.name}.partial" / out.name)
            return write(*args, **kwargs)
        with _small_files(20_000) if how == "full" else contextlib.nullcontext():
            return write(*args, **kwargs)

    own = {"calibration_dataset": str(data), "calibration_dataset_size": 16, "calibration_state": kept}
    writers.write, error = failing, ""
    try:
        with counted() as counts:
            jobs_quant.ptq(checkpoint, out, algorithm, fmt, tp, quant={**own, **settings})
    except (Exception, CheckpointException) as caught:  # torch's own is no Exception
        error = f"{type(caught).__name__}: {caught}"
    finally:
        writers.write = write
    left = sorted(p.name for p in out.parent.iterdir() if out.name in p.name)
    return {"error": error, "left": left, "amax": seen.get("amax"), "forward": counts["forward"]}

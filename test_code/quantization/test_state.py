"""The calibrated state: saved, loaded bit for bit, rejected if it does not fit, kept when an export fails."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from test_code.support import installed, jobs_quant, jobs_state
from test_code.support.ranks import RankError, RankPool

needs_search = pytest.mark.skipif(not installed.AUTO, reason="refused on this modelopt: see test_old_modelopt")

AWQ = {"algorithm": "int4_awq", "awq_block_size": 16}
AUTO = {"algorithm": "auto", "awq_block_size": 16, "auto_quantize_bits": 9.0}
# A search may choose the format with two steps for some layers and the other format for others.
AUTO_W4A8 = {**AUTO, "auto_quantize_formats": ["w4a8_awq", "fp8"]}

FILE = "tp0_pp0_ep0.safetensors"


@contextlib.contextmanager
def counted():
    """Count the micro-batches that run through the model for calibration, search or comparison."""
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


def everything_of(model, tp, pp) -> dict:
    """Return all tensors of a model, the settings of its quantizers, and its logits or hidden states."""
    from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer

    from nemo.collections.llm.modelopt.quantization.calibration import batching
    from test_code.support import devices, tiny

    core = tiny.core(model).eval()
    tensors = {n: v for n, v in core.state_dict().items() if not n.endswith("_extra_state")}
    found: dict = {f"tensor {n}": v.clone() for n, v in tensors.items()}
    for name, module in core.named_modules():
        if isinstance(module, (TensorQuantizer, SequentialQuantizer)):
            found[f"settings {name}"] = sorted((key, str(v)) for key, v in module.get_modelopt_state().items())
    outputs: list[torch.Tensor] = []
    batching.run_forward(core, [devices.place(torch.arange(3, 35).unsqueeze(0))], outputs.append, "Outputs")
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
    """Quantize and save the state, then load it into a new model; compare the models and their exports.

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
            export = {
                "path": target,
                "export_format": "hf",
                "hf_layout": "modelopt",
                "verify": "files",
                "dtype": "bf16",
            }
            quantizer = jobs_state.quantizer_for(data, export=export if run.get("hf") else None, **settings)
            model, trainer = jobs_state.restored(checkpoint, tp, pp)
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
    """Return the error of each attempt to use a state that does not fit, with or without KV-cache quantizers."""
    from test_code.support import ranks, tiny

    state = Path(work) / "one-state"
    quantizer = jobs_state.quantizer_for(data)
    model, _ = jobs_state.restored(checkpoint)
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
        model, _ = jobs_state.restored(checkpoint)
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
    quantizer = jobs_state.quantizer_for(data)
    model, _ = jobs_state.restored(checkpoint, tp=2)
    try:
        quantizer.load_state(state, model)
    except ValueError as error:
        return str(error)
    return "none"


def plant_pickles(checkpoint, data, folder) -> dict:
    """Quantize with a state folder that contains pickles under both names, and our marker."""
    from nemo_modelopt_dropin import files

    kept = Path(folder) / "planted.calibration-state"
    kept.mkdir(parents=True)
    for name in (FILE, "tp0_pp0_ep0.pt"):
        torch.save({"fingerprint": {}, "code": jobs_state.Planted(f"{folder}/ran")}, kept / name)
    files.mark(kept, files.CALIBRATION_STATE, [FILE])
    quantizer = jobs_state.quantizer_for(data, calibration_state=str(kept))
    model, _ = jobs_state.restored(checkpoint)
    with counted() as counts:
        quantizer.quantize(model)
    quantizer._state.forget(str(kept))
    return {"forward": counts["forward"], "left": sorted(p.name for p in [kept, *kept.glob("*.pt")])}


def fill_before_quantize(checkpoint, data, folder) -> tuple[str, list[str]]:
    """Put a user's file into the folder of the state before `quantize` starts; return the error and what is left."""
    quantizer = jobs_state.quantizer_for(data, calibration_state=folder)
    model, _ = jobs_state.restored(checkpoint)
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
    """Make writes beyond ``limit`` bytes of a file fail in this process and its children, as on a full disk."""
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, kept[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)


def _kill_once_written(staging: Path) -> None:
    """Kill this process and its children as soon as the export has written a part of a file."""

    def written() -> bool:
        try:
            return any(p.is_file() and p.stat().st_size > 0 for p in staging.rglob("*"))
        except FileNotFoundError:  # renamed between the listing and the look at it
            return False

    def watch():
        while not written():
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
    except (Exception, CheckpointException) as caught:  # torch's error is not an Exception
        error = f"{type(caught).__name__}: {caught}"
    finally:
        writers.write = write
    left = sorted(p.name for p in out.parent.iterdir() if out.name in p.name)
    return {"error": error, "left": left, "amax": seen.get("amax"), "forward": counts["forward"]}


@pytest.fixture(scope="module")
def work(ranks_factory, tmp_path_factory):
    """Return a folder with a trained checkpoint of a tiny llm.LlamaModel and a calibration file."""
    folder = tmp_path_factory.mktemp("state")
    ranks_factory(1).run(jobs_quant.make_checkpoint, str(folder / "llama"), True)
    jobs_quant.corpus(folder / "text.jsonl")
    return folder


def paths(work) -> tuple[str, str, str]:
    return str(work / "llama"), str(work / "text.jsonl"), str(work)


def files_of(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("size", "tp", "pp", "runs"),
    [
        (1, 1, 1, [{**AWQ, "hf": True}, {"algorithm": "int8_sq", "hf": True}, {"algorithm": "fp8"}]),
        pytest.param(1, 1, 1, [AUTO_W4A8], marks=needs_search),
        (2, 2, 1, [{**AWQ, "hf": True}]),
        pytest.param(2, 2, 1, [AUTO], marks=needs_search),
        (2, 1, 2, [{"algorithm": "w4a8_awq", "awq_block_size": 16}]),
        (2, 1, 1, [{"algorithm": "fp8"}]),
    ],
    ids=["one", "one auto", "tp2", "tp2 auto", "pp2", "dp2"],
)
def test_a_loaded_state_is_the_calibrated_model(ranks, work, size, tp, pp, runs):
    results = ranks(size).run(save_and_load, *paths(work), tp, pp, runs, timeout=300)
    for result in results:
        for run, outcome in zip(runs, result, strict=True):
            assert not outcome["unequal"], (run, outcome["unequal"][:8])
            assert outcome["size"] > 50 and outcome["reports"][0] == outcome["reports"][1]
            assert outcome["forward"][0] > 0 and outcome["forward"][1:] == (0, 0)
            # Data-parallel replicas share a file.
            assert outcome["state"] == [f"tp{t}_pp{p}_ep0.safetensors" for t in range(tp) for p in range(pp)]
            if outcome["hf"]:
                calibrated, loaded = (files_of(work / path.rpartition("/")[2]) for path in outcome["hf"])
                assert len(calibrated) > 5 and calibrated == loaded


REFUSED = {
    "nothing calibrated": ["call quantize(model) first"],
    "algorithm": ["algorithm was 'fp8', now 'int8'", "Without load_state, quantize calibrates"],
    "option": ["bmm_quantizer", "now 'absent'"],
    "sequence": ["calibration_seq_len was 32, now 16"],
    "data": ["calibration_dataset was", "other.jsonl"],
    "weights": ["model.decoder.final_layernorm.weight was '[64] float32 checksum", "now '[64] float32 checksum"],
    "broken": ["tp0_pp0_ep0.safetensors cannot be read"],
    "pickle": ["tp0_pp0_ep0.safetensors is a pickle", "can run any code, so it is not read"],
    "old": ["tp0_pp0_ep0.pt", "were written by torch.save: reading them can run any code"],
    "foreign": ["save_state: ", "holds thesis.tex, which this package did not write and will not replace"],
    "empty": ["it has no tp0_pp0_ep0.safetensors but []"],
    "missing": ["there is no folder", "save_state writes one"],
}


@pytest.fixture(scope="module")
def refusals(ranks_factory, work):
    """Return the error of each attempt to use a state that does not fit."""
    return ranks_factory(1).run(load_errors, *paths(work), installed.KV_CACHE)[0]


@pytest.mark.parametrize("label", REFUSED)
def test_a_state_is_refused_where_it_does_not_belong(refusals, label):
    if label == "option" and not installed.KV_CACHE:
        pytest.skip("this modelopt does not support KV-cache quantizers: see test_model_utils")
    for word in REFUSED[label]:
        assert word in refusals[label]


def test_a_state_is_refused_at_another_layout(ranks, work, refusals):
    for error in ranks(2).run(wrong_layout, *paths(work)[:2], str(work / "one-state")):
        assert "it has no tp1_pp0_ep0.safetensors" in error or "tensor parallel size was 1, now 2" in error


def test_a_planted_pickle_runs_no_code(ranks, work):
    planted = work / "planted"
    result = ranks(1).run(plant_pickles, *paths(work)[:2], str(planted))[0]
    assert not (planted / "ran").exists()
    assert result["forward"] > 0, "the model was calibrated again"
    assert result["left"] == ["planted.calibration-state", "tp0_pp0_ep0.pt"]


def test_a_folder_of_the_users_is_refused_before_the_model_is_loaded(cpu_backend, tmp_path):
    from nemo.collections import llm
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization import quantizer as q

    thesis = tmp_path / "work" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("years")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "some words"}))
    out, state = tmp_path / "out", tmp_path / "state"
    for paths, message in {
        (out, thesis.parent): r"calibration_state: .*holds thesis\.tex, which this package did not write",
        (thesis.parent, state): r"path: .*holds thesis\.tex, which this package did not write",
        (out, out / "state"): r"calibration_state .*state lies inside path .*out, or is the same",
    }.items():
        config = q.QuantizationConfig(calibration_dataset=str(tmp_path / "text.jsonl"), calibration_state=str(paths[1]))
        export = q.ExportConfig(path=str(paths[0]), export_format="hf")
        with pytest.raises(ModelOptConfigError, match=message):
            llm.ptq(model_path="there is no model", export_config=export, quantization_config=config)
    assert thesis.read_text() == "years"


def test_a_folder_that_fills_while_the_model_is_loaded_is_not_touched(ranks, work):
    error, left = ranks(1).run(fill_before_quantize, *paths(work)[:2], str(work / "late"))[0]
    assert "calibration_state: " in error and "holds thesis.tex" in error
    assert left == ["thesis.tex"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_checksum_sees_every_bit_and_every_place(dtype):
    from nemo.collections.llm.modelopt.quantization.calibration import fingerprint

    value = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    swapped, changed = value.clone(), value.clone()
    swapped[[3, 700]] = value[[700, 3]]
    changed[5] = torch.nextafter(changed[5:6], torch.full((1,), 9, dtype=dtype))[0] if dtype.itemsize > 2 else 0.0
    sums = [fingerprint.checksum(tensor) for tensor in (value, swapped, changed, value.clone())]
    assert len(set(sums)) == 3 and sums[0] == sums[3]


def test_data_in_memory_is_told_apart():
    from nemo.collections.llm.modelopt.quantization.calibration import fingerprint
    from nemo.collections.llm.modelopt.quantization.config import QuantizationConfig

    def stamp(data):
        return fingerprint.settings_of(QuantizationConfig(calibration_dataset=data), {}, {}, False)

    assert fingerprint.differences(stamp(["a b", "c"]), stamp(["a b", "c"])) == []
    (line,) = fingerprint.differences(stamp(["a b", "c"]), stamp(["a b", "d"]))
    assert line.startswith("calibration_content was '2 rows, checksum")
    assert fingerprint.differences(stamp([[1, 2]]), stamp([[1, 3]]))


# --- failures in the middle of an export ---


@pytest.mark.parametrize("fmt", ["nemo", "hf"])
def test_a_full_disk_leaves_the_state_and_nothing_else(ranks, work, fmt):
    out = work / f"full-{fmt}"
    checkpoint, data, _ = paths(work)
    failed = ranks(1).run(ptq_that_fails, checkpoint, data, str(out), fmt, "full")[0]
    # Megatron's writer fails in the middle of a tensor, or at the end of the archive that lacks what was not written.
    assert re.search("File too large|unexpected pos", failed["error"]), failed["error"]
    assert failed["left"] == [f"{out.name}.calibration-state"] and failed["forward"] > 0
    again = ranks(1).run(ptq_that_fails, checkpoint, data, str(out), fmt, "")[0]
    assert again["error"] == "" and again["left"] == [out.name]
    for name, amax in failed["amax"].items():
        assert torch.equal(again["amax"][name], amax)


def test_killed_in_the_middle_of_an_export(work, tmp_path):
    out, (checkpoint, data, _) = work / "killed", paths(work)
    run = (ptq_that_fails, checkpoint, data, str(out), "nemo")
    pool = RankPool(2, tmp_path)
    try:
        with pytest.raises(RankError, match="the process died"):
            pool.run(*run, "killed", tp=2, **AWQ)
        assert not out.exists() and (work / ".killed.partial").is_dir()
        assert (work / "killed.calibration-state").is_dir()
        again = pool.run(*run, "", tp=2, **AWQ)
    finally:
        pool.close()
    assert again[0]["error"] == "" and again[0]["forward"] == 0 and again[0]["left"] == ["killed"]
    assert (out / "weights" / "modelopt_state").is_dir() and (out / "context").is_dir()


def test_a_kept_state_of_another_run_is_not_used(ranks, work):
    out, (checkpoint, data, _) = work / "changed", paths(work)
    run = (ptq_that_fails, checkpoint, data, str(out), "nemo")
    failed = ranks(1).run(*run, "full")[0]
    again = ranks(1).run(*run, "", "int8")[0]
    assert failed["error"] and again["error"] == "" and again["forward"] > 0
    # int8 does not quantize the KV cache.
    fewer = {name for name in failed["amax"] if "bmm_quantizer" in name}
    assert set(again["amax"]) == {*failed["amax"]} - fewer and bool(fewer) is installed.KV_CACHE
    assert again["left"] == ["changed"]


def test_a_path_that_cannot_be_written_is_refused_before_anything_is_loaded(cpu_backend, tmp_path):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization import quantizer as q

    (tmp_path / "file").write_text("")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "some words"}))
    config = q.QuantizationConfig(calibration_dataset=str(tmp_path / "text.jsonl"))
    for path, reason in {
        tmp_path / "file" / "out": "is a file",
        tmp_path / "file": "is a file",
        "/proc/no/such": "cannot be written",
    }.items():
        with pytest.raises(ModelOptConfigError, match=f"path=.*{reason}"):
            q.Quantizer(config, q.ExportConfig(path=str(path), export_format="nemo"))._check_inputs()

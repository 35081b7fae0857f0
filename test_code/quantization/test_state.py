"""The calibrated state: saved, loaded bit for bit, refused where it does not belong, kept when an export fails."""

from __future__ import annotations

import json
import re

import pytest
import torch

from test_code.support import installed, jobs_quant, jobs_state
from test_code.support.ranks import RankError, RankPool

needs_search = pytest.mark.skipif(not installed.AUTO, reason="refused on this modelopt: see test_old_modelopt")

AWQ = {"algorithm": "int4_awq", "awq_block_size": 16}
AUTO = {"algorithm": "auto", "awq_block_size": 16, "auto_quantize_bits": 9.0}
# A format in two steps, of which a search may choose one for this layer and the other for that.
AUTO_W4A8 = {**AUTO, "auto_quantize_formats": ["w4a8_awq", "fp8"]}


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
    results = ranks(size).run(jobs_state.save_and_load, *paths(work), tp, pp, runs, timeout=300)
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
    """Return the error of each attempt to use a state where it does not belong."""
    return ranks_factory(1).run(jobs_state.load_errors, *paths(work), installed.KV_CACHE)[0]


@pytest.mark.parametrize("label", REFUSED)
def test_a_state_is_refused_where_it_does_not_belong(refusals, label):
    if label == "option" and not installed.KV_CACHE:
        pytest.skip("KV-cache quantizers are refused on this modelopt: see test_model_utils")
    for word in REFUSED[label]:
        assert word in refusals[label]


def test_a_state_is_refused_at_another_layout(ranks, work, refusals):
    for error in ranks(2).run(jobs_state.wrong_layout, *paths(work)[:2], str(work / "one-state")):
        assert "it has no tp1_pp0_ep0.safetensors" in error or "tensor parallel size was 1, now 2" in error


def test_a_planted_pickle_runs_no_code(ranks, work):
    planted = work / "planted"
    result = ranks(1).run(jobs_state.plant_pickles, *paths(work)[:2], str(planted))[0]
    assert not (planted / "ran").exists()
    assert result["forward"] > 0, "the model was calibrated anew"
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
    error, left = ranks(1).run(jobs_state.fill_before_quantize, *paths(work)[:2], str(work / "late"))[0]
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
    failed = ranks(1).run(jobs_state.ptq_that_fails, checkpoint, data, str(out), fmt, "full")[0]
    # Megatron's writer fails in the middle of a tensor, or at the end of the archive that lacks what was not written.
    assert re.search("File too large|unexpected pos", failed["error"]), failed["error"]
    assert failed["left"] == [f"{out.name}.calibration-state"] and failed["forward"] > 0
    again = ranks(1).run(jobs_state.ptq_that_fails, checkpoint, data, str(out), fmt, "")[0]
    assert again["error"] == "" and again["left"] == [out.name]
    for name, amax in failed["amax"].items():
        assert torch.equal(again["amax"][name], amax)


def test_killed_in_the_middle_of_an_export(work, tmp_path):
    out, (checkpoint, data, _) = work / "killed", paths(work)
    run = (jobs_state.ptq_that_fails, checkpoint, data, str(out), "nemo")
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
    run = (jobs_state.ptq_that_fails, checkpoint, data, str(out), "nemo")
    failed = ranks(1).run(*run, "full")[0]
    again = ranks(1).run(*run, "", "int8")[0]
    assert failed["error"] and again["error"] == "" and again["forward"] > 0
    # int8 leaves the KV cache alone.
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

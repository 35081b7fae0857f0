"""Compression to a budget on a tiny model: the search, the steps after it, and what is reused."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_modelopt_cli.compress import command, fit_plan, fit_search, quantizing, settings
from nemo_modelopt_dropin.fit import files, formats, grid
from nemo_modelopt_dropin.preflight import model_sizes
from test_code.support import hf_folders, installed, jobs_compress, jobs_fit

FORMATS = ("no_quant", "fp8", "int4_awq")
BUDGET = {"disk": "0.62x", "formats": FORMATS, "candidates": 3, "context": 64}


@pytest.fixture(scope="module")
def teacher(ranks_factory, tmp_path_factory):
    """The folder of a tiny teacher and its texts."""
    folder = tmp_path_factory.mktemp("teacher")
    ranks_factory(1).run(jobs_compress.make_teacher, str(folder), llama=True, timeout=240)
    return folder


@pytest.fixture(scope="module")
def found(ranks_factory, teacher, tmp_path_factory):
    """The folder and the results of a whole run with a budget."""
    output = tmp_path_factory.mktemp("run") / "out"
    return output, ranks_factory(1).run(jobs_fit.run, str(teacher), str(output), BUDGET, timeout=500)[0]


def test_the_exported_folder_keeps_the_budget_as_predicted(teacher, found):
    output, results = found
    plan = json.loads((output / "search" / "plan.json").read_text())
    point = plan["points"][plan["chosen"] - 1]
    folder = output / "export" / "hf"
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert size <= plan["budgets"]["disk"] and point["in_budget"]
    weights = (folder / "model.safetensors").stat().st_size
    shape = grid.with_sizes(model_sizes.read(teacher / "checkpoint"), point["sizes"])
    one = formats.Format(point["attention"], point["mlp"], point["fp8_cache"], 32)
    assert files.weight_bytes(shape, one) + files.header_bytes(shape, one) == pytest.approx(weights, rel=0.01)
    # A model of 0.3 MB is small against its config and model card, whose sizes are estimates.
    assert point["figures"]["disk"] == pytest.approx(size, rel=0.01, abs=2500)
    assert results["prune"]["shape"]["num_layers"] == point["sizes"]["num_layers"]


def test_points_are_measured_and_the_best_is_chosen(found):
    output, results = found
    plan = results["search"]["plan"]
    tried = [point for point in plan["points"] if point["measured"] is not None and point["in_budget"]]
    assert len(tried) == 3
    assert plan["points"][plan["chosen"] - 1]["expected"] == min(point["expected"] for point in tried)
    sensitivities = results["search"]["sensitivities"]
    assert set(sensitivities) == {"fp8", "int4_awq"}
    assert all(set(losses) == {"attention", "mlp", "all"} for losses in sensitivities.values())


def test_importance_is_measured_once(found):
    output, _ = found
    assert (output / "search" / "scores" / "fingerprint.json").is_file()
    assert not (output / "prune" / "scores").exists()


@pytest.mark.cpu
@installed.prunes
def test_two_ranks_measure_what_one_does(commands, teacher, found, tmp_path):
    output = tmp_path / "two"
    flags = f"""--cpu --devices 2 --teacher {teacher}/checkpoint --train-text {teacher}/train.jsonl
        --heldout-text {teacher}/heldout.jsonl --output {output} --fit-disk {BUDGET["disk"]}
        --fit-formats {" ".join(FORMATS)} --fit-candidates {BUDGET["candidates"]} --context {BUDGET["context"]}
        --seq-length 32 --prune-samples 8 --prune-batch-size 4 --heldout-batches 2 --distill-steps 2
        --distill-warmup-steps 1 --distill-global-batch-size 8 --distill-micro-batch-size 4 --calibration-size 8
        --calibration-batch-size 4 --calibration-seq-len 32 --awq-block-size 32"""
    script = Path(__file__).resolve().parents[2] / "scripts" / "compress.py"
    done = commands.run([sys.executable, str(script), *flags.split()], timeout=400)
    assert done.returncode == 0, done.stderr
    one, two = (
        json.loads((folder / "search" / fit_search.MEASURED).read_text())["losses"] for folder in (found[0], output)
    )
    assert [*two] == [*one]
    for name, loss in one.items():
        # Two ranks add up in another order than one.
        assert two[name] == pytest.approx(loss, abs=1e-5), name


def test_the_page_and_the_terminal_show_every_point(found, teacher):
    output, _ = found
    plan = fit_plan.read(output)
    page = (output / "search" / "report" / "report.html").read_text()
    assert "Points of the search" in page and "--fit-point N" in page
    rows = fit_plan.rows(plan, jobs_fit.job(str(teacher), BUDGET).fit)
    assert [row["point"].endswith("*") for row in rows].count(True) == 1
    assert [int(row["point"].split()[0]) for row in rows] == list(range(1, len(plan["points"]) + 1))


def test_another_budget_uses_what_was_measured(ranks, teacher, found):
    output, before = found
    known = json.loads((output / "search" / "measured.json").read_text())["losses"]
    results = ranks(1).run(jobs_fit.run, str(teacher), str(output), {**BUDGET, "disk": "0.5x", "candidates": 1})[0]
    after = json.loads((output / "search" / "measured.json").read_text())["losses"]
    assert known.items() <= after.items() and len(after) <= len(known) + 2
    assert results["search"]["sensitivities"] == before["search"]["sensitivities"]
    point = results["search"]["plan"]
    assert results["export"]["hf"]["bytes"] <= point["budgets"]["disk"]
    # Each other point is one flag away: the original has nothing to prune, and is not quantized.
    last = point["points"][-1]
    assert last["sizes"] == point["original"]["sizes"] and last["mlp"] == "no_quant"
    fit = {**BUDGET, "disk": "0.5x", "candidates": 1, "point": last["number"]}
    plain = ranks(1).run(jobs_fit.run, str(teacher), str(output), fit)[0]
    assert plain["prune"]["skipped"] and plain["distill"]["skipped"] and plain["quantize"]["skipped"]
    assert not (output / "prune" / "checkpoint").exists()
    tensors = hf_folders.tensors_of(output / "export" / "hf")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.bfloat16"}
    assert plain["export"]["hf"]["heldout_loss"] == pytest.approx(plain["teacher"]["heldout_loss"], abs=0.02)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_each_rank_reads_its_own_mixture(tmp_path, monkeypatch, rank):
    monkeypatch.setenv("RANK", rank)
    paths = []
    for attention, algorithm, cache in (
        ("no_quant", "fp8", False),
        ("fp8", "no_quant", False),
        ("no_quant", "fp8", True),
    ):
        wanted = settings.Quantization(algorithm=algorithm, attention_algorithm=attention, enable_kv_cache=cache)
        paths.append(quantizing.config_of(wanted, "texts.jsonl", tmp_path).algorithm)
    assert len({*paths}) == 3
    assert len({Path(path).read_text() for path in paths}) == 3
    assert len([*tmp_path.iterdir()]) == 3


def test_attention_and_mlp_can_have_different_formats(ranks, teacher, tmp_path):
    quantization = {"algorithm": "fp8", "attention_algorithm": "no_quant"}
    output = tmp_path / "out"
    ranks(1).run(jobs_fit.run, str(teacher), str(output), {}, quantization, target_num_layers=3, timeout=400)
    tensors = hf_folders.tensors_of(output / "export" / "hf")
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            expected = "torch.float8_e4m3fn" if ".mlp." in name else "torch.bfloat16"
            assert str(tensor.dtype) == expected, name
    shape = replace(model_sizes.read(teacher / "checkpoint"), num_layers=3)
    mixed = formats.Format("no_quant", "fp8")
    size = sum(file.stat().st_size for file in (output / "export" / "hf").iterdir())
    tokenizer = files.tokenizer_bytes(teacher / "checkpoint")
    assert files.disk_bytes(shape, mixed, tokenizer) == pytest.approx(size, rel=0.01, abs=2500)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fit", "more", "problem"),
    [
        ({"disk": "1KB"}, {}, "fit-disk 1KB is below the smallest that can be reached"),
        ({"disk": "much"}, {}, "fit-disk much is not a number of bytes"),
        ({"latency": "0.5x", "device": "abacus"}, {}, "is not in the table"),
        ({"disk": "0.5x", "formats": ("fp9",)}, {}, "unknown format 'fp9'.*did you mean fp8"),
        ({"disk": "0.5x", "formats": ()}, {}, "must name at least one"),
        ({"disk": "0.5x", "recovery": 2.0}, {}, "recovery must be between 0 and 1"),
        ({"disk": "0.5x", "minutes": 0.0}, {}, "minutes must be positive"),
        ({"disk": "0.5x", "batch": 0}, {}, "batch must be at least 1"),
        ({"disk": "0.5x"}, {"drop_layers": (1,)}, "cannot be combined with drop_layers"),
        ({"disk": "0.5x"}, {"target_params": "70%"}, "cannot be combined with target_params"),
        ({"point": 3}, {"target_num_layers": 2}, "fit-point 3 needs a budget"),
    ],
)
def test_budgets_that_cannot_work(teacher, fit, more, problem):
    with pytest.raises(settings.SettingsError, match=problem):
        jobs_fit.job(str(teacher), fit, None, more).check()


def test_budgets_are_those_of_hugging_face_files(teacher):
    job = jobs_fit.job(str(teacher), {"disk": "0.5x"})
    with pytest.raises(settings.SettingsError, match="add hf to the formats"):
        replace(job, quantization=replace(job.quantization, formats=("nemo",))).check()
    found = {"fit": {"disk": "0.5x"}, "quantization": {}}
    assert ("quantization", "formats") in command.fill_in(found)
    assert found["quantization"] == {"formats": ["hf"]}


@pytest.mark.parametrize(
    ("attention", "mlp", "problem"),
    [("fp8", "int4_awq", "cannot quantize only a part"), ("fp9", "fp8", "unknown attention_algorithm")],
)
def test_mixtures_that_cannot_be_made(attention, mlp, problem):
    found = settings.Quantization(algorithm=mlp, attention_algorithm=attention).problems()
    assert any(problem in one for one in found)


def test_a_plan_without_such_a_point_raises_an_error(found, teacher):
    output, _ = found
    fit = jobs_fit.job(str(teacher), {**BUDGET, "point": 99}).fit
    with pytest.raises(settings.SettingsError, match="fit-point 99: the search found the points 1 to"):
        fit_plan.point_of(fit_plan.read(output), fit)


@installed.prunes
@pytest.mark.skipif(not installed.EXPERTS_PRUNE, reason="modelopt 0.37 prunes no experts")
def test_a_mixture_of_experts_keeps_the_budget(ranks, tmp_path):
    ranks(1).run(jobs_fit.make_moe_teacher, str(tmp_path))
    output = tmp_path / "out"
    fit = {"disk": "0.5x", "formats": ("no_quant", "fp8"), "candidates": 2, "context": 64}
    results = ranks(1).run(jobs_fit.run, str(tmp_path), str(output), fit, timeout=500)[0]
    plan = results["search"]["plan"]
    point = plan["points"][plan["chosen"] - 1]
    folder = output / "export" / "hf"
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert size <= plan["budgets"]["disk"] and point["in_budget"]
    assert {point["sizes"]["experts"] for point in plan["points"]} >= {2, 4}, "fewer experts are among the choices"
    config = json.loads((folder / "config.json").read_text())
    assert config["num_experts"] == point["sizes"]["experts"] >= config["num_experts_per_tok"] == 2
    shape = grid.with_sizes(model_sizes.read(tmp_path / "checkpoint"), point["sizes"])
    one = formats.Format(point["attention"], point["mlp"], point["fp8_cache"], 32)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert files.weight_bytes(shape, one) + files.header_bytes(shape, one) == pytest.approx(weights, rel=0.02)

"""The compression job's parts, and the whole job on a tiny model, killed on the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_modelopt_cli.compress import corpus, heldout, plan, stages
from nemo_modelopt_cli.compress import settings as job_settings
from nemo_modelopt_cli.compress.settings import Layout
from nemo_modelopt_dropin import files, versions
from nemo_modelopt_dropin.preflight import output_checks
from nemo_modelopt_dropin.report import charts as report_charts
from test_code.support import command_lines, devices, installed, jobs_compress, started, tolerances

ROOT = Path(__file__).resolve().parents[2]


def measure(folder: str, layout: dict) -> dict:
    """Return what `heldout.measure` finds under a layout."""
    here = Path(folder)
    return heldout.measure(
        here / "checkpoint", here / "heldout.npy", Layout(cpu=not devices.machine().on_gpus, **layout), 32, 4
    )


# --- settings ---------------------------------------------------------------------------------------------------------


def test_every_problem_is_reported_at_once(tmp_path):
    job = job_settings.Job(
        teacher=str(tmp_path / "none"),
        train_text=str(tmp_path / "a"),
        heldout_text=str(tmp_path / "b"),
        layout=job_settings.Layout(devices=3, tp=2),
        pruning=job_settings.Pruning(target_num_attention_heads=2),
        quantization=job_settings.Quantization(algorithm="fp9", formats=("hff",)),
    )
    with pytest.raises(job_settings.SettingsError) as caught:
        job.check()
    lines = str(caught.value).splitlines()
    # Where the installed modelopt cannot prune, that is a problem, too.
    assert len(lines) == 7 + bool(versions.pruning_problem())
    for part in (
        "3 ranks cannot",
        "go together",
        "did you mean fp8?",
        "did you mean hf?",
        "none: there is no such folder",
    ):
        assert any(part in line for line in lines), part


@pytest.mark.parametrize(
    ("pruning", "problem"),
    [
        ({}, "nothing to prune"),
        ({"target_num_layers": 0}, "target_num_layers must be positive"),
        ({"target_num_layers": 2, "drop_layers": (1,)}, "cannot be combined"),
        ({"target_params": "70%", "drop_layers": (1,)}, "cannot be combined with target_params"),
        ({"target_params": "much"}, "use a fraction of the original model"),
        ({"target_params": "70%", "max_candidates": 0}, "max_candidates must be positive"),
        ({"target_num_layers": 2, "num_samples": 2, "micro_batch_size": 4}, "less than one batch"),
    ],
)
def test_pruning_that_cannot_work(pruning, problem):
    assert any(problem in line for line in job_settings.Pruning(**pruning).problems())


def test_unknown_settings_name_the_nearest_one():
    with pytest.raises(job_settings.SettingsError, match="in distillation 'stepps'.*did you mean steps"):
        job_settings.from_dict(job_settings.Job, {"distillation": {"stepps": 3}})


def test_saving_more_often_does_not_undo_a_stage():
    training = job_settings.Training(save_every=10)
    assert plan.outcome(training) == plan.outcome(job_settings.Training(save_every=20))
    assert plan.outcome(training) != plan.outcome(job_settings.Training(lr=1.0))


# --- corpus and tokens ------------------------------------------------------------------------------------------------


def test_heldout_text_is_not_in_the_training_text():
    training, held_out = corpus.split(corpus.documents())
    assert len(training) > 50
    assert len(held_out) >= 5
    paragraphs = {paragraph.strip() for text in held_out for paragraph in text.split("\n\n")}
    seen = {paragraph.strip() for text in training for paragraph in text.split("\n\n")}
    assert not paragraphs & seen


@settings(max_examples=30, deadline=None)  # the first example imports torch
@given(st.integers(3, 200), st.integers(2, 40))
def test_consecutive_windows_predict_each_token_once(length, seq_length):
    from nemo_modelopt_cli.tokens import Windows

    ids = np.arange(length, dtype=np.int32)
    if length <= seq_length:
        with pytest.raises(ValueError, match="too short"):
            Windows(ids, seq_length)
        return
    windows = Windows(ids, seq_length)
    labels = [int(label) for i in range(len(windows)) for label in windows[i]["labels"]]
    assert labels == list(range(1, len(labels) + 1))
    assert length - 1 - len(labels) < seq_length


def test_random_windows_depend_on_seed_and_number_alone():
    from nemo_modelopt_cli.tokens import Windows

    ids = np.arange(1000, dtype=np.int32)
    one, two = Windows(ids, 8, samples=50, seed=1), Windows(ids, 8, samples=20, seed=1)
    assert [one[i]["tokens"].tolist() for i in range(20)] == [two[i]["tokens"].tolist() for i in range(20)]
    other = Windows(ids, 8, samples=20, seed=2)
    assert [one[i]["tokens"].tolist() for i in range(20)] != [other[i]["tokens"].tolist() for i in range(20)]
    assert one[3]["labels"].tolist() == [token + 1 for token in one[3]["tokens"].tolist()]
    assert one[3]["attention_mask"][0, 2].tolist() == [False] * 3 + [True] * 5


# --- held-out loss, on real ranks -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(ranks_factory, tmp_path_factory) -> Path:
    """Write a tiny teacher checkpoint, and texts next to it."""
    folder = tmp_path_factory.mktemp("compress")
    ranks_factory(1).run(jobs_compress.make_teacher, str(folder), llama=True, timeout=240)
    return folder


@pytest.mark.parametrize("layout", [{"devices": 2}, {"devices": 2, "tp": 2}, {"devices": 2, "pp": 2}])
def test_every_layout_measures_the_same(ranks, teacher, layout):
    alone = ranks(1).run(measure, str(teacher), {}, timeout=240)[0]
    split = ranks(2).run(measure, str(teacher), layout, timeout=240)
    for found in split:
        # Sums in another order.
        assert found["heldout_loss"] == pytest.approx(alone["heldout_loss"], rel=tolerances.of_scripts("loss"))
        for name in ("heldout_tokens", "parameters", "body_parameters"):
            assert found[name] == alone[name]


@pytest.mark.parametrize(("passes", "said"), [(1.5, False), (30, True)])
def test_a_text_that_is_gone_over_again_and_again_is_mentioned(teacher, monkeypatch, cpu_backend, passes, said):
    from nemo_modelopt_cli import tokens

    heard: list[str] = []
    monkeypatch.setattr(tokens.screen, "warn", heard.append)
    count = len(tokens.encode(teacher / "train.jsonl", tokens.checkpoint_tokenizer(teacher / "checkpoint")))
    samples = round(passes * count / 32)
    sizes = {"seq_length": 32, "micro_batch_size": 1, "global_batch_size": 1, "train_samples": samples}
    data = tokens.TextDataModule(teacher / "train.jsonl", teacher / "checkpoint", **sizes)
    assert len(data._ids("heldout")) == len(data._ids("train")) == len(data._ids("train")) == count
    wanted = [f"{teacher / 'train.jsonl'} has {count:,} tokens: {samples:,} samples of 32 tokens go over it 30 times."]
    assert heard == (wanted if said else [])


EMPTY = {"models": [], "curves": [], "stages": [], "exports": {}}


def test_a_teacher_at_tensor_parallelism_is_pruned_to_a_number_of_parameters(ranks, teacher):
    pruning = {"target_params": "70%", "max_candidates": 3, "heldout_batches": 1}
    job = job_settings.Job("t", "a", "b", pruning=job_settings.Pruning(**pruning))
    assert not [problem for problem in job.pruning.problems() if "pruning" in problem]
    ranks(1).run(jobs_compress.tokenize, str(teacher))
    one, two = ranks(2).run(jobs_compress.prune, str(teacher), {"devices": 2, "tp": 2}, pruning, timeout=240)
    assert one["importance"] == two["importance"]
    tried = one["importance"]["candidates"]
    whole = json.loads((teacher / "pruned" / "report" / "report.json").read_text())
    assert tried == whole["candidates"] and len(tried) == 3
    chosen = [found for found in tried if found["chosen"]]
    assert chosen == [min(tried, key=lambda found: found["loss"])]
    assert one["parameters"] == chosen[0]["parameters"] <= 0.7 * whole["before"]["parameters"]
    # The page of the whole run shows these very numbers.
    figure = report_charts.charts({**EMPTY, "importance": one["importance"]})["candidates"]
    drawn = figure["spec"]["layer"][1]["data"]["values"]
    for found in tried:
        assert [row for row in drawn if (row["parameters"], row["loss"]) == (found["parameters"], found["loss"])]


# --- the whole job ----------------------------------------------------------------------------------------------------


def _command(teacher: Path, output: Path, *more: str) -> list[str]:
    flags = {
        "--teacher": str(teacher / "checkpoint"),
        "--train-text": str(teacher / "train.jsonl"),
        "--heldout-text": str(teacher / "heldout.jsonl"),
        "--output": str(output),
        "--seq-length": "32",
        "--target-ffn-hidden-size": "64",
        "--target-num-layers": "3",
        "--prune-samples": "8",
        "--distill-steps": "12",
        "--distill-global-batch-size": "4",
        "--distill-micro-batch-size": "2",
        "--distill-warmup-steps": "2",
        "--distill-save-every": "2",
        "--distill-evaluate-every": "6",
        "--calibration-size": "4",
        "--calibration-batch-size": "2",
        "--calibration-seq-len": "32",
    }
    words = [word for pair in flags.items() for word in pair]
    return [sys.executable, str(ROOT / "scripts" / "compress.py"), *words, "--scratch", "--cpu", *more]


def _wait_for(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def _run(command: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)


@pytest.mark.cpu
@installed.prunes
def test_the_whole_job_killed_while_distilling(commands, teacher, tmp_path):
    command = _command(teacher, tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with commands.start(command, environment, stderr=subprocess.DEVNULL) as process:
        _wait_for(lambda: started.has_file(tmp_path / "distill" / "steps", "step-*[0-9]") or process.poll(), 300)
        process.kill()
    pruned = stages.read_record(tmp_path / "prune")
    assert pruned is not None, (tmp_path / "log" / "rank0.txt").read_text()[-3000:]
    assert stages.read_record(tmp_path / "distill") is None

    done = commands.run(command, environment)
    assert done.returncode == 0, done.stderr + (tmp_path / "log" / "rank0.txt").read_text()[-3000:]
    assert "distill   was interrupted, running again" in done.stderr
    assert stages.read_record(tmp_path / "prune") == pruned
    report = json.loads((tmp_path / "report.json").read_text())
    assert [model["name"] for model in report["models"]] == [
        "teacher",
        "pruned",
        "distilled",
        "from scratch",
        "quantized",
    ]
    steps = [point["step"] for point in _curve(report, "distilled") if "loss" in point]
    assert steps == sorted(set(steps)), "a resumed run must not repeat steps in the curve"
    assert steps[-1] == 12
    shape = report["models"][1]["shape"]
    assert (shape["ffn_hidden_size"], shape["num_layers"]) == (64, 3)
    assert [layer["fate"] for layer in report["importance"]["layers"]].count("kept") == 3
    assert {(one["kind"], one["layer"]) for one in report["importance"]["units"]} == {
        (kind, layer) for kind in ("attention", "ffn") for layer in (1, 2, 3, 4)
    }
    errors = {(one["layer"], one["matrix"]): one["error"] for one in report["sensitivity"]}
    assert {layer for layer, _ in errors} == {1, 2, 3}
    assert min(errors.values()) > 0 and max(errors.values()) < 0.1, "FP8 keeps 3 bits of mantissa"
    assert (tmp_path / "report.html").stat().st_size > 100_000
    assert not list(tmp_path.rglob("*.part"))

    again = _run([sys.executable, str(ROOT / "scripts" / "compress.py"), "--config", str(tmp_path / "run.yaml")])
    assert again.returncode == 0
    assert again.stderr.count("kept") == 7
    assert "loading NeMo" not in again.stderr

    planned = _run([*command, "--dry-run", "--algorithm", "int8"])
    states = [line.split(maxsplit=1)[1] for line in planned.stdout.splitlines()[:7]]
    changed = "algorithm was fp8 and is now int8"
    assert states == ["finished"] * 5 + [f"would run again: {changed}", "would run again after quantize"]
    assert "pruned    3 layers, hidden 64, ffn 64" in planned.stdout
    for flags, code in (["--dry-run"], 2), ([], 2), (["--dry-run", "--redo", "quantize"], 0):
        refused = _run([*command, "--algorithm", "int8", *flags])
        assert refused.returncode == code
        assert (f"quantize (finished): {changed}" in refused.stderr) is (code == 2)
        assert "loading NeMo" not in refused.stderr
    quantized = stages.read_record(tmp_path / "quantize")
    redone = commands.run([*command, "--algorithm", "int8", "--redo", "quantize"], environment)
    assert redone.returncode == 0, redone.stderr + (tmp_path / "log" / "rank0.txt").read_text()[-3000:]
    assert redone.stderr.count("running again; the old result is kept") == 2  # quantize and export
    assert redone.stderr.count("finished before, kept") == 5
    assert stages.read_record(tmp_path / "quantize") != quantized
    assert not list(tmp_path.glob("*.new")) and not list(tmp_path.glob("*.old"))


@pytest.mark.parametrize(("name", "value"), [("evaluate_every", 11), ("save_every", -1)])
def test_what_happens_every_so_many_steps_fits_into_the_training(name, value):
    training = job_settings.Training(steps=10, warmup_steps=1, **{name: value})
    assert training.problems("distillation", job_settings.Layout()) == [
        f"distillation: {name} {value} must be between 0 (never) and the 10 steps"
    ]


@pytest.mark.cpu
@installed.prunes
def test_layers_that_do_not_divide_by_the_pipeline_stages(ranks, teacher, tmp_path):
    layout = ["--devices", "2", "--pp", "2", "--distill-steps", "2", "--distill-warmup-steps", "1", "--no-scratch"]
    layout += ["--distill-evaluate-every", "0", "--distill-save-every", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done, addresses = command_lines.watched([*_command(teacher, tmp_path), *layout], 400, env=environment)
    assert done.returncode == 0, done.stderr + (tmp_path / "log" / "rank0.txt").read_text()[-3000:]
    assert addresses == {"127.0.0.1"}, "no port is open to other machines"
    report = json.loads((tmp_path / "report.json").read_text())
    losses = {model["name"]: model["heldout_loss"] for model in report["models"]}
    for name in ("distill", "quantize"):
        shutil.copy(teacher / "heldout.npy", tmp_path / name)
        alone = ranks(1).run(measure, str(tmp_path / name), {}, timeout=240)[0]
        assert alone["shape"]["num_layers"] == 3
        # Sums in another order.
        assert losses[plan.MODELS[name]] == pytest.approx(alone["heldout_loss"], rel=tolerances.of_scripts("loss"))


def _curve(report: dict, model: str) -> list[dict]:
    return next(curve["points"] for curve in report["curves"] if curve["model"] == model)


# --- the exported files -----------------------------------------------------------------------------------------------


def _export_llama(folder: Path, fp8: bool) -> float:
    """Write a tiny Llama, its linear weights as FP8 with scales where asked, and return its exact held-out loss."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from nemo_modelopt_cli.tokens import Windows

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    stored = {}
    for name, value in model.state_dict().items():
        stored[name] = value.clone()
        if fp8 and "proj" in name:
            scale = value.abs().max() / 448  # 448 is FP8 E4M3's largest value
            stored[name] = (value / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale"] = scale
            value.copy_(stored[name].float() * scale)
    save_file(stored, folder / "model.safetensors")
    model.config.save_pretrained(folder)
    if fp8:
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    windows = Windows(np.arange(60, dtype=np.int32), 8)
    tokens, labels = (torch.stack([windows[i][key] for i in range(len(windows))]) for key in ("tokens", "labels"))
    with torch.no_grad():
        logits = model.eval()(tokens).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


@pytest.mark.parametrize("fp8", [False, True])
def test_an_export_is_read_back_exactly(tmp_path, fp8, cpu_backend):
    from nemo_modelopt_cli.compress import exported

    expected = _export_llama(tmp_path, fp8)
    found = exported.heldout_loss(tmp_path, np.arange(60, dtype=np.int32), 8, 3)
    assert found == pytest.approx(expected, abs=1e-5)  # fp32 sums in another order


def test_the_card_of_an_export_has_method_data_and_measurements(ranks, teacher):
    (found,) = ranks(1).run(jobs_compress.quantize_and_export, str(teacher), timeout=240)
    text = (teacher / "export" / "hf" / "README.md").read_text()
    assert "# checkpoint, compressed to fp8\n" in text and "- Original model: `checkpoint`" in text
    assert "- Quantized: fp8." in text and "- Algorithm: `fp8`, weights FP8 E4M3, activations FP8" in text
    assert "at most 8 rows of `train.jsonl`, at most 32 tokens each" in text
    assert f"| quantized | {found['heldout_loss']:.4f} | {found['parameters']:,} |" in text
    kl = f"KL of the quantized model to the one before: {found['kl_to_original']:.2e} nats"
    assert 0 < found["kl_to_original"] < 0.1 and kl in text
    assert "vllm serve FOLDER" in text and "trtllm-serve FOLDER" in text and "base_model" not in text


def test_the_card_names_the_model_on_the_hub(tmp_path):
    from nemo_modelopt_dropin.preflight import readers
    from nemo_modelopt_dropin.report import model_card

    (tmp_path / "config.json").write_text("{}")
    model_card.write(tmp_path, "student", {"FP8"}, readers.MODELOPT)
    for base in ("", "org/teacher", "org/another"):
        model_card.set_base(tmp_path, base)
    header = (tmp_path / "README.md").read_text().split("---\n")[1]
    assert header.startswith("base_model: org/teacher\nlibrary_name:") and "another" not in header


def test_an_export_with_a_weight_missing_is_refused(tmp_path, cpu_backend):
    from safetensors.torch import load_file, save_file

    from nemo_modelopt_cli.compress import exported

    _export_llama(tmp_path, False)
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.norm.weight"]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(Exception, match="model.norm.weight is missing"):
        exported.heldout_loss(tmp_path, np.arange(60, dtype=np.int32), 8, 3)


def test_a_run_that_goes_on_withdraws_its_report(tmp_path):
    from nemo_modelopt_dropin.report import page

    files.own(tmp_path, files.COMPRESSION_RUN, *output_checks.REPORT_FILES, "run.yaml")
    (tmp_path / "figures").mkdir()
    for name in ("report.json", "report.html", "figures/loss.png", "run.yaml"):
        (tmp_path / name).write_text("{}")
    page.withdraw(tmp_path)
    page.withdraw(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".nemo-modelopt.json", "run.yaml"]


def test_a_report_that_is_not_ours_is_not_withdrawn(tmp_path):
    from nemo_modelopt_dropin.report import page

    (tmp_path / "figures").mkdir()
    (tmp_path / "report.json").write_text("mine")
    page.withdraw(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures", "report.json"]


def test_formats_of_unknown_numbers_are_not_judged(tmp_path, cpu_backend):
    from nemo_modelopt_cli.compress import exported

    _export_llama(tmp_path, False)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "W3A3"}}))
    assert exported.heldout_loss(tmp_path, np.arange(60, dtype=np.int32), 8, 3) is None

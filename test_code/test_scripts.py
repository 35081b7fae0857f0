"""The command lines: quick help, every wrong argument reported before NeMo is imported, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("compress", "demo", "distill", "prune", "ptq")
# Run the script and then say which heavy packages it imported, whatever it exited with.
_WATCHED = """
import runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    heavy = [name for name in ("torch", "nemo", "megatron", "lightning", "altair", "numpy") if name in sys.modules]
    print("HEAVY", heavy)
"""


def _run(script: str, *arguments: str, cwd=ROOT) -> subprocess.CompletedProcess:
    path = str(ROOT / "scripts" / f"{script}.py")
    return subprocess.run(
        [sys.executable, "-c", _WATCHED, path, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_imports_nothing_heavy(script):
    found = _run(script, "--help")
    assert found.returncode == 0, found.stderr
    assert "usage:" in found.stdout
    assert "HEAVY []" in found.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_takes_no_time(script):
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), "--help"]
    best = float("inf")
    for _ in range(5):  # the machine may be busy: the best of five counts
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60)
        best = min(best, time.perf_counter() - started)
    assert best < 0.3


@pytest.mark.parametrize(
    ("script", "arguments", "lines"),
    [
        ("compress", [], ["missing: --teacher, --train-text, --heldout-text"]),
        (
            "compress",
            ["--teacher", "no", "--train-text", "a", "--heldout-text", "b", "--algorithm", "int9", "--tp", "2"],
            [
                "1 devices x 1 nodes",
                "nothing to prune",
                "'int9'; allowed",
                "did you mean int8?",
                "a does not exist",
                "no is not a folder",
                "needs tp=1",
            ],
        ),
        ("compress", ["--config", "none.yaml"], ["--config none.yaml cannot be read"]),
        ("compress", ["--target-ffn-hiden-size", "3"], ["did you mean --target-ffn-hidden-size?"]),
        ("demo", ["--algorithm", "fp88"], ["did you mean fp8?"]),
        (
            "compress",
            "--teacher t --train-text a --heldout-text b --target-num-layers 2 --algorithm int8 --formats hf".split(),  # noqa: SIM905
            ["int8 cannot be exported as hf"],
        ),
        ("demo", ["--devices", "3"], ["not a multiple of micro batch size 8 x 3"]),
        ("demo", ["--steps", "3", "--vorbose"], ["--vorbose; did you mean --verbose?"]),
        ("ptq", ["-nc", "no", "-bs", "0", "-ctp", "3", "--devices", "2"], ["no such folder", "--batch_size must", "3"]),
        ("ptq", ["-nc", "no", "--algoritm", "fp8"], ["did you mean --algorithm?"]),
        ("ptq", ["-nc", "no", "-algo", "fp9"], ["unknown algorithm 'fp9'", "did you mean fp8?"]),
        ("ptq", ["-nc", "no", "-algo", "auto"], ["--algorithm auto and --auto_quantize_bits go together"]),
        ("ptq", ["-nc", "no", "--auto_quantize_bits", "6"], ["--auto_quantize_bits go together"]),
        (
            "prune",
            [
                "--restore_path",
                "no",
                "--save_path",
                "x",
                "--target_hidden_size",
                "8",
                "--tp_size",
                "2",
                "--devices",
                "2",
            ],
            ["no such folder", "--tp_size must be 1", "--seq_length is required"],
        ),
        (
            "prune",
            ["--restore_path", "no", "--save_path", "x", "--target_num_layers", "8", "--drop_layers", "2"],
            ["cannot be combined with --target_num_layers"],
        ),
        ("prune", ["--restore_path", "no", "--save_path", "x"], ["nothing to prune"]),
        (
            "distill",
            [
                "--name",
                "n",
                "--log_dir",
                "l",
                "--model_path",
                "no",
                "--teacher_path",
                "no",
                "--max_steps",
                "0",
                "--gbs",
                "4",
                "--mbs",
                "2",
                "--seq_length",
                "8",
            ],
            ["--model_path no", "--teacher_path no", "exactly one of", "--max_steps must"],
        ),
    ],
)
def test_wrong_arguments_are_reported_before_nemo_is_imported(script, arguments, lines, tmp_path):
    found = _run(script, *arguments, cwd=tmp_path)
    assert found.returncode == 2, found.stdout + found.stderr
    assert "HEAVY []" in found.stdout
    for line in lines:
        assert line in found.stderr
    assert not list(tmp_path.iterdir()), "wrong arguments leave no files"


@pytest.mark.parametrize(
    ("script", "module", "other"),
    [("ptq", "--calibration-tp", "--calibration_tp"), ("distill", "--use_chat_data", "--use-chat-data")],
)
def test_dashes_and_underscores_are_the_same(script, module, other):
    command = [sys.executable, "-c", f"import {script}; print({script}.parser()._known_spelling({module!r}))"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == other


def test_flags_win_over_the_config_file(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "teacher: here\nlayout: {cpu: true, devices: 2}\npruning: {target_num_layers: 3}\n"
    )
    code = (
        "import compress, pathlib; parsed = compress.parser().parse_args(['--config', 'run.yaml', '--devices', '4']);"
        "print(compress.settings(parsed))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'scripts'}{os.pathsep}{ROOT}"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert found.stdout.strip() == str(
        {"teacher": "here", "layout": {"cpu": True, "devices": 4}, "pruning": {"target_num_layers": 3}}
    )


def test_distill_and_ptq_and_prune_on_cpu(ranks, tmp_path):
    """The three scripts in a row on a tiny checkpoint: prune, distill into a checkpoint, quantize."""
    from test_code import jobs_compress

    ranks(1).run(jobs_compress.make_teacher, str(tmp_path), timeout=240)
    text = str(tmp_path / "train.jsonl")
    common = ["--cpu", "--text", text, "--seq_length", "32"]
    pruned = tmp_path / "pruned"
    prune = [*common, "--restore_path", str(tmp_path / "checkpoint"), "--save_path", str(pruned)]
    _works("prune", *prune, "--target_ffn_hidden_size", "64", "--num_train_samples", "4", "--mbs", "2", cwd=tmp_path)

    distill = [*common, "--name", "kd", "--log_dir", str(tmp_path / "log"), "--model_path", str(pruned)]
    distill += ["--teacher_path", str(tmp_path / "checkpoint"), "--max_steps", "2", "--gbs", "4", "--mbs", "2"]
    _works("distill", *distill, "--limit_val_batches", "2", cwd=tmp_path)
    distilled = sorted((tmp_path / "log" / "kd" / "checkpoints").glob("*-last"))
    assert distilled

    quantized = tmp_path / "quantized"
    ptq = ["--cpu", "-nc", str(distilled[0]), "-out", str(quantized), "--export_format", "nemo", "-calib_ds", text]
    _works("ptq", *ptq, "-algo", "int8", "-bs", "2", "-calib_size", "4", "-sl", "32", cwd=tmp_path)
    assert (quantized / "weights" / "modelopt_state").exists()
    assert (tmp_path / "quantized.report" / "report.html").exists()
    assert not (tmp_path / "quantized.calibration-state").exists(), "it is kept for a failed export only"


def _works(script: str, *arguments: str, cwd: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]

"""The command lines: quick help, every wrong argument reported before NeMo is imported, exit codes."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import pytest

from nemo.collections.llm.modelopt.errors import ModelOptConfigError
from nemo_modelopt_cli import run_file
from nemo_modelopt_cli.compress import runner
from nemo_modelopt_dropin.console import screen
from test_code.support import command_lines, installed
from test_code.support.started import Server

ROOT = Path(__file__).resolve().parents[2]
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


def guarded_works(folder: str) -> dict[str, tuple[int, list[str]]]:
    """Return exit code and lines on the screen of works that end in different ways; their logs go below ``folder``."""
    here = Path(folder)
    found = {}
    for name, work in WORKS.items():
        screen_file = here / f"{name}.screen"
        kept = os.dup(2)
        with open(screen_file, "w") as file:
            os.dup2(file.fileno(), 2)
        try:
            code = runner.guarded(work, None if name == "verbose" else here / name, "stopped")
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            logging.disable(logging.NOTSET)
        found[name] = code, screen_file.read_text().replace("\r", "\n").splitlines()
    return found


def _as_from(file: str, level: int, text: str) -> None:
    """Log through NeMo's logger as a line of ``file`` would."""
    logger = logging.getLogger("nemo_logger")
    logger.handle(logger.makeRecord(logger.name, level, file, 1, text, (), None, func="f"))


def _as_before_2_7(file: str, text: str) -> None:
    """Log through NeMo's logger, which names its own file for every record, from a line of ``file``."""
    logger, nemo = logging.getLogger("nemo_logger"), "/x/nemo/utils/nemo_logging.py"
    record = logger.makeRecord(logger.name, logging.WARNING, nemo, 1, text, (), None, func="f")
    log = eval(compile("lambda: handle()", nemo, "eval"), {"handle": functools.partial(logger.handle, record)})
    eval(compile("log()", file, "eval"), {"log": log})


def _done(out) -> None:
    ours, theirs = "/x/nemo/collections/llm/modelopt/a.py", "/x/site-packages/megatron/core/b.py"
    for _ in range(2):  # each text is shown once
        _as_from(ours, logging.WARNING, "ours matters")
    _as_from(ours, logging.INFO, "noise of ours")
    with screen.results():  # the mark counts, not the file that logs
        for name in (ours, "/x/renamed.py", theirs):
            _as_from(name, logging.INFO, f"a result from {name}")
    package = Path(screen.__file__).parents[1]
    for name in ("renamed", "room/_report", "pruner"):
        _as_from(str(package / f"{name}.py"), logging.INFO, f"noise of {name}")
        _as_from(str(package / f"{name}.py"), logging.WARNING, f"a warning from {name}")
    # A library in an environment below a folder that is named like the package.
    _as_from("/home/nemo_modelopt_dropin/.venv/lib/library.py", logging.WARNING, "noise of a library nearby")
    _as_from(theirs, logging.WARNING, "noise of a library")
    _as_from(theirs, logging.ERROR, "theirs matters")
    logging.getLogger("another.package").warning("noise of a library with another logger")
    _as_before_2_7(str(package / "console.py"), "ours matters on NeMo 2.6")
    _as_before_2_7("/x/site-packages/megatron/core/b.py", "noise of a library with NeMo 2.6")
    _as_before_2_7(warnings.__file__, "/x/modelopt/q.py:3: UserWarning: python's matters")
    _import_noise()
    os.write(2, b"noise on a descriptor\n")
    for _ in screen.bar(range(2), desc="a bar", mininterval=100):
        pass


def _import_noise() -> None:
    """Import a module that warns as one of ours would."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "noisy_at_import.py").write_text(
            "from test_code.cli.test_scripts import _as_from\n_as_from('/x/modelopt/a.py', 30, 'noise of an import')\n"
        )
        sys.path.insert(0, folder)
        try:
            importlib.import_module("noisy_at_import")
        finally:
            sys.path.remove(folder)


def _settings(out) -> None:
    raise ModelOptConfigError("this cannot work")


def _failure(out) -> None:
    raise KeyError("x")


def _interrupt(out) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)


def _verbose(out) -> None:
    os.write(2, b"noise on a descriptor\n")


WORKS = {"done": _done, "settings": _settings, "failure": _failure, "interrupt": _interrupt, "verbose": _verbose}


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


# What any command line of the standard library needs.
_PLAIN = "import argparse, dataclasses, importlib.metadata, inspect, json, subprocess, typing"


def _cpu_seconds(*arguments: str) -> float:
    """Return the processor time of a Python process, the least of five: time on the clock depends on what else runs."""
    best = float("inf")
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return best


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_takes_no_time(script):
    """Measured: 2 to 3 times as much. With PyTorch, 15 times as much and more."""
    assert _cpu_seconds(str(ROOT / "scripts" / f"{script}.py"), "--help") < 5 * _cpu_seconds("-c", _PLAIN)


@pytest.mark.parametrize(
    ("script", "arguments", "lines"),
    [
        ("compress", [], ["missing: --teacher, --train-text, --heldout-text"]),
        (
            "compress",
            ["--teacher", "no", "--train-text", "a", "--heldout-text", "b", "--algorithm", "int9", "--tp", "2"]
            + ["--devices", "1"],
            [
                "1 devices x 1 nodes",
                "nothing to prune",
                "'int9'; allowed",
                "did you mean int8?",
                "a: there is no such file",
                "no: there is no such folder",
            ],
        ),
        ("compress", ["--config", "none.yaml"], ["--config none.yaml cannot be read"]),
        ("compress", ["--target-ffn-hiden-size", "3"], ["did you mean --target-ffn-hidden-size?"]),
        ("demo", ["--algorithm", "fp88"], ["did you mean fp8?"]),
        (
            "compress",
            ["--teacher", "t", "--train-text", "a", "--heldout-text", "b", "--verify", "some", "--target-params", "60"],
            [
                "unknown verify 'some'; allowed: full, files, none",
                "60 means 60 parameters; for a fraction",
                "use '60%'",
            ],
        ),
        (
            "ptq",
            ["-nc", "no", "--export_format", "hf", "--max-shard-size", "5 apples", "--hf-layout", "compressed-tensors"]
            + ["-algo", "w4a8_awq"],
            ["--max-shard-size 5 apples is not a size", "the layout compressed-tensors cannot hold W4A8_AWQ weights"],
        ),
        ("ptq", ["-nc", "no", "--hf-layout", "gguf"], ["--hf-layout", "modelopt", "compressed-tensors"]),
        (
            "compress",
            ["--teacher", "t", "--train-text", "a", "--heldout-text", "b", "--hf-layout", "modelop", "--formats", "hf"]
            + ["--max-shard-size", "big", "--target-num-layers", "2"],
            ["unknown hf_layout 'modelop'", "did you mean modelopt?", "max_shard_size big is not a size of a file"],
        ),
        ("demo", ["--devices", "3"], ["not a multiple of micro-batch size 8 x 3"]),
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
            ["no such folder", "--seq_length is required"],
        ),
        (
            "prune",
            ["--restore_path", "no", "--save_path", "x", "--target_num_layers", "8", "--drop_layers", "2"],
            ["cannot be combined with --target_num_layers"],
        ),
        ("prune", ["--restore_path", "no", "--save_path", "x"], ["nothing to prune"]),
        (
            "prune",
            ["--restore_path", "no", "--save_path", "x", "--target_num_layers", "1.5", "--max_candidates", "0"],
            ["--target_num_layers must be a size of at least 1, or a share", "--max_candidates must be at least 1"],
        ),
        (
            "prune",
            ["--restore_path", "no", "--save_path", "x", "--target_params", "70%", "--drop_layers", "2"],
            ["cannot be combined with --target_params"],
        ),
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
    command = [
        sys.executable,
        "-c",
        f"from nemo_modelopt_cli import {script}; print({script}.parser()._known_spelling({module!r}))",
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert found.stdout.strip() == other


def test_a_dry_run_imports_nothing_heavy(tmp_path):
    command_lines.shell(tmp_path / "model")
    (tmp_path / "model" / "context" / "model.yaml").write_text("_target_: a.B\nconfig: {num_layers: 2}\n")
    found = _run("ptq", "-nc", "model", "--dry-run", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "sizes unknown: its configuration has no hidden_size" in found.stdout
    assert "HEAVY []" in found.stdout


NO_GPU = {
    "ptq": "-nc model -calib_ds wikitext -out out",
    "distill": "--name n --log_dir out --model_path model --use_mock_data --seq_length 8 --max_steps 1 --gbs 1 --mbs 1",
    "compress": "--teacher model --train-text a.jsonl --heldout-text b.jsonl --target-num-layers 1 --output out",
}


@pytest.mark.cpu
@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=[installed.prunes] if name == "compress" else []) for name in NO_GPU]
)
def test_without_a_gpu_and_without_cpu_it_is_said_what_to_give(script, tmp_path):
    command_lines.shell(tmp_path / "model")
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}')
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *NO_GPU[script].split()]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.returncode == 1
    assert "error: PyTorch sees no GPU on this machine; pass --cpu to run on CPU ranks" in found.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "model"]


@pytest.mark.cpu
@pytest.mark.parametrize("layout", [[], ["--tp", "2"]], ids=["one rank", "two ranks"])
def test_ctrl_c_ends_with_130_and_leaves_nothing(layout, tmp_path):
    command_lines.shell(tmp_path / "model")
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, str(ROOT / "scripts" / "ptq.py"), "--cpu", "-nc", "model", "-out", "out", *layout]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline() == "ptq: loading NeMo\n"
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert rest.splitlines()[-1] == "interrupted; nothing was written", rest
    assert process.returncode == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "tmp"]
    assert not list((tmp_path / "tmp").iterdir()), "the log of a run that did not fail is not kept"


def test_exit_codes_and_what_is_seen(ranks, tmp_path):

    found = ranks(1).run(guarded_works, str(tmp_path))[0]
    assert {name: code for name, (code, _) in found.items()} == {
        "done": 0,
        "settings": 2,
        "failure": 1,
        "interrupt": 130,
        "verbose": 0,
    }
    assert found["settings"][1] == ["error: this cannot work"], "no traceback for what a user can put right"
    assert found["failure"][1] == [
        "error on rank 0: KeyError: 'x'",
        f"see {tmp_path / 'failure'} for the full traceback",
    ]
    assert "Traceback" in (tmp_path / "failure").read_text()
    assert found["interrupt"][1] == ["stopped"]
    shown = "\n".join(found["done"][1])
    for part in (
        "warning: ours matters\n",
        "warning: ours matters on NeMo 2.6",
        "error: theirs matters",
        *(f"a result from {name}" for name in ("/x/nemo/collections", "/x/renamed.py", "/x/site-packages/megatron")),
        *(f"warning: a warning from {name}" for name in ("renamed", "room/_report", "pruner")),
        "UserWarning: python's matters",
        "a bar: 100%",
    ):
        assert shown.count(part) == 1, f"{part!r} in\n{shown}"
    assert "noise" not in shown
    # Four of libraries, and one of ours that came up in an import.
    assert found["done"][1][-1] == "5 warnings of libraries are not shown here; -v shows them"
    log = (tmp_path / "done").read_text()
    for part in ("noise of a library", "noise on a descriptor", "ours matters"):
        assert part in log
    assert "noise on a descriptor" in "\n".join(found["verbose"][1])


@pytest.mark.cpu
def test_distill_and_ptq_and_prune_on_cpu(ranks, commands, tmp_path, monkeypatch):
    """The three scripts in a row on a tiny checkpoint: prune, distill into a checkpoint, quantize through NeMo-Run."""
    from test_code.support import jobs_compress

    # In bf16, as checkpoints are that come from Hugging Face: CPU ranks train them in fp32.
    ranks(1).run(jobs_compress.make_teacher, str(tmp_path), in_bf16=True, timeout=240)
    text = str(tmp_path / "train.jsonl")
    common = ["--cpu", "--text", text, "--seq_length", "32"]
    pruned = tmp_path / "pruned"
    prune = [*common, "--restore_path", str(tmp_path / "checkpoint"), "--save_path", str(pruned)]
    prune += ["--target_ffn_hidden_size", "64", "--num_train_samples", "4", "--mbs", "2"]
    seen = _works(None, "prune", *prune, cwd=tmp_path)
    assert "importance: 100%" in seen
    assert "ffn_hidden_size" in seen, "the table of sizes before and after is a result"
    assert f"prune: wrote {pruned}" in seen
    assert "WARNING" not in seen and "INFO" not in seen, "what libraries write is not shown"
    assert (tmp_path / "pruned.report" / "report.html").exists()
    assert not (tmp_path / "nemo_experiments").exists(), "nothing is left where the command was given"

    # The checkpoint of the pruned model holds a run file too; no reader minds.
    settings = run_file.read(pruned / "run.yaml")
    assert (settings["target_ffn_hidden_size"], settings["restore_path"]) == ("64", str(tmp_path / "checkpoint"))
    config = {"name": "kd", "log_dir": "log", "model_path": "pruned", "teacher_path": "checkpoint", "max_steps": 2}
    config |= {"gbs": 4, "mbs": 2, "limit_val_batches": 2, "cpu": True, "text": "train.jsonl", "seq_length": 32}
    run_file.write(tmp_path / "kd.yaml", {**config, "lr": "1e-4"})
    seen = _works(commands, "distill", "--config", "kd.yaml", cwd=tmp_path)
    assert "distill: 100%" in seen and "loss=" in seen
    assert re.search(r"training loss +\d\.\d{4} \(this run began at \d\.\d{4}\)", seen)
    assert re.search(r"top-1 agreement +0\.\d{4}", seen), "measured in a run shorter than the log interval"
    assert run_file.read(tmp_path / "log" / "kd" / "run.yaml")["lr"] == "0.0001"
    distilled = sorted((tmp_path / "log" / "kd" / "checkpoints").glob("*-last"))
    assert distilled

    config = {**config, "name": "plain", "model_path": "checkpoint", "teacher_path": None, "max_steps": 1}
    run_file.write(tmp_path / "plain.yaml", config)
    seen = _works(commands, "distill", "--config", "plain.yaml", cwd=tmp_path)
    assert "warning: No --teacher_path: this is plain training" in seen and "train: 100%" in seen

    quantized = tmp_path / "quantized"
    ptq = ["--cpu", "--tp", "2", "-nc", str(distilled[0]), "-out", str(quantized), "--export_format", "nemo"]
    ptq += ["-calib_ds", text, "-algo", "int8", "-bs", "2", "-calib_size", "4", "-sl", "32"]
    _works_through_nemo_run("ptq", ptq, tmp_path, monkeypatch)
    assert (quantized / "weights" / "modelopt_state").exists()
    assert "devices" not in run_file.read(quantized / "run.yaml"), "what nobody set is derived again in another run"
    assert (tmp_path / "quantized.report" / "report.html").exists()
    assert not (tmp_path / "quantized.calibration-state").exists(), "it is kept for a failed export only"


def _works(commands: Server | None, script: str, *arguments: str, cwd: Path) -> str:
    """Run a script that must succeed, in an interpreter of its own without a server; return what is on the terminal."""
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if commands is None:
        found, addresses = command_lines.watched(command, 300, cwd=cwd, env=environment)
    else:
        addresses = set()
        watch = functools.partial(command_lines.listening, found=addresses)
        found = commands.run(command, environment, cwd, 300, watch)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-4000:]
    assert addresses == {"127.0.0.1"}, "no port is open to other machines"
    return found.stdout + found.stderr


def _works_through_nemo_run(script: str, arguments: list[str], folder: Path, monkeypatch) -> None:
    """Run a script on two ranks that NeMo-Run starts with torchrun on this machine, and wait for it."""
    import nemo_run as run

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(run.config, "_NEMORUN_HOME", str(folder / "nemo_run"))
    job = run.Script(path=str(ROOT / "scripts" / f"{script}.py"), entrypoint="python", args=arguments)
    executor = run.LocalExecutor(launcher="torchrun", ntasks_per_node=2, env_vars={"OMP_NUM_THREADS": "1"})
    with run.Experiment(script, executor=executor) as experiment:
        experiment.add(job, executor=executor, name=script)
        experiment.run(detach=False, tail_logs=False)
    (job_status,) = experiment.status(return_dict=True).values()
    assert str(job_status["status"]) == "SUCCEEDED", job_status

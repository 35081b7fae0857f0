"""The installed command ``nemo-modelopt``: its commands, exit codes, processes and shell completion."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_modelopt_cli import completion, docs, main
from nemo_modelopt_cli.process import launch
from test_code.support import command_lines

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("ptq", "prune", "distill", "compress", "fit", "evaluate", "compare", "demo")


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Return a file as installers write it for an entry of ``[project.scripts]``."""
    entry = re.search(r'^nemo-modelopt = "([\w.]+):(\w+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    path = tmp_path_factory.mktemp("bin") / "nemo-modelopt"
    path.write_text(
        f"#!{sys.executable}\nimport re, sys\nfrom {entry[1]} import {entry[2]}\nif __name__ == '__main__':\n"
        f"    sys.argv[0] = re.sub(r'(-script\\.pyw|\\.exe)?$', '', sys.argv[0])\n    sys.exit({entry[2]}())\n"
    )
    path.chmod(0o755)
    return str(path)


def _run(*words: str, cwd=ROOT, **more) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, **more)


# --- commands ---------------------------------------------------------------------------------------------------------


def test_help_lists_the_commands(command):
    shown = _run(command, "--help")
    assert shown.returncode == 0 and not shown.stderr
    assert tuple(main.COMMANDS) == NAMES
    assert all(re.search(rf"^    {name} ", shown.stdout, re.M) for name in NAMES)


def test_help_takes_no_time(command):
    seconds = []
    for _ in range(5):
        before = os.times()
        subprocess.run([command, "--help"], check=True, stdout=subprocess.DEVNULL, timeout=60)
        after = os.times()
        # Of the processor: the machine may be busy with other tests.
        seconds.append(sum(after[2:4]) - sum(before[2:4]))
    assert min(seconds) < 0.15


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["ptg"], *([name, "--help"] for name in NAMES)])
def test_nothing_heavy_is_imported(words):
    code = (
        "import sys\nfrom nemo_modelopt_cli import main\n"
        f"try:\n    main.run({words})\nexcept SystemExit:\n    pass\n"
        "print('HEAVY', [name for name in ('torch', 'nemo', 'megatron', 'lightning', 'altair', 'numpy', 'shtab') "
        "if name in sys.modules])"
    )
    shown = _run(sys.executable, "-c", code)
    assert "HEAVY []" in shown.stdout, shown.stderr


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("fit", "compare", "evaluate")])
def test_commands_have_the_flags_of_the_scripts(name, command):
    shown = _run(command, name, "--help").stdout
    script = _run(sys.executable, str(ROOT / "scripts" / f"{name}.py"), "--help").stdout
    assert f"usage: nemo-modelopt {name} " in shown
    assert shown.partition("\n\n")[2] == script.partition("\n\n")[2]


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        ([], 2, "usage: nemo-modelopt"),
        (["ptg"], 2, "nemo-modelopt: unknown command 'ptg'; did you mean ptq?"),
        (["bananas"], 2, "nemo-modelopt: the commands are ptq, prune, distill, compress, fit, evaluate, compare, demo"),
        (["--versoin"], 2, "unrecognized arguments: --versoin"),
        (["--print-completion", "tcsh"], 2, "invalid choice: 'tcsh'"),
        (["ptq"], 2, "nemo-modelopt ptq: missing: --nemo_checkpoint"),
        (
            ["prune", "--sav_path", "x"],
            2,
            "nemo-modelopt prune: unknown argument --sav_path; did you mean --save_path",
        ),
        (["compare", "only"], 2, "nemo-modelopt compare: missing: B"),
    ],
)
def test_wrong_lines(command, words, code, expected):
    shown = _run(command, *words)
    assert shown.returncode == code and not shown.stdout
    assert expected in shown.stderr


def test_version(command):
    shown = _run(command, "--version")
    assert shown.returncode == 0
    assert re.fullmatch(r"nemo-modelopt-dropin \d+\.\d+\.\d+\n", shown.stdout)


def test_compare_is_compress_compare(tmp_path, command):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    by_command = _run(command, "compare", "a", "b", cwd=tmp_path)
    by_flag = _run(command, "compress", "--compare", "a", "b", cwd=tmp_path)
    assert by_command.returncode == by_flag.returncode == 2
    assert by_command.stderr.count("no report.json") == 2
    assert "--compare" not in by_command.stderr
    assert by_command.stderr.replace("nemo-modelopt compare", "nemo-modelopt compress") == by_flag.stderr.replace(
        "--compare ", ""
    )


def test_a_dry_run_as_a_module(tmp_path):
    command_lines.inputs(tmp_path)
    line = f"{command_lines.RUNS['ptq']} --dry-run".split()
    shown = _run(sys.executable, "-m", "nemo_modelopt_cli", "ptq", *line, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert "int8" in shown.stdout


def test_closed_screens_end_it_quietly(command):
    line = f"{command} ptq --help | true; echo ${{PIPESTATUS[0]}}"
    shown = _run("bash", "-c", line)
    assert shown.stdout.strip() in {"0", "141"}
    assert not shown.stderr


def test_the_page_of_the_command_line_is_up_to_date():
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == docs.page(), "run: python -m nemo_modelopt_cli.docs > docs/cli.md"


# --- processes --------------------------------------------------------------------------------------------------------

_RANKS = """
import os, sys
from pathlib import Path
from nemo_modelopt_cli.process import launch
from nemo_modelopt_dropin import ranks

if ranks.is_rank():
    Path(sys.argv[1], os.environ["RANK"]).write_text(" ".join(sys.argv[1:]))
else:
    sys.exit(launch.run_ranks(2))
"""


@pytest.mark.parametrize("form", ["script", "module"])
def test_ranks_run_the_same_command(tmp_path, form):
    package, out = tmp_path / "my_package", tmp_path / "out"
    package.mkdir()
    out.mkdir()
    (package / "__main__.py").write_text(_RANKS)
    script = tmp_path / "my-command"
    script.write_text(_RANKS)
    start = [str(script)] if form == "script" else ["-m", "my_package"]
    shown = _run(sys.executable, *start, str(out), "--name", "a b", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert [(out / rank).read_text() for rank in "01"] == [f"{out} --name a b"] * 2


def test_a_module_is_started_again_as_one(monkeypatch):
    monkeypatch.setattr("sys.argv", [str(ROOT / "nemo_modelopt_cli" / "__main__.py"), "ptq", "--cpu"])
    assert launch.own_arguments() == ["-m", "nemo_modelopt_cli", "ptq", "--cpu"]
    monkeypatch.setattr("sys.argv", ["/usr/bin/nemo-modelopt", "ptq"])
    assert launch.own_arguments() == ["/usr/bin/nemo-modelopt", "ptq"]


# The command with children of its own instead of a model.
_SPAWNING = """
import multiprocessing, sys
from nemo_modelopt_cli import main
import stay

def work(argv):
    for method in ("fork", "spawn"):
        multiprocessing.get_context(method).Process(target=stay.until_killed, args=argv).start()
    stay.until_killed(*argv)

if __name__ == "__main__":
    main.run = work
    sys.exit(main.main())
"""
_STAY = """
import os, time
from pathlib import Path

def until_killed(folder):
    Path(folder, str(os.getpid())).touch()
    time.sleep(100)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux signals a child when its parent ends")
def test_spawned_children_end_with_a_killed_command(tmp_path):
    script, pids = tmp_path / "nemo-modelopt", tmp_path / "pids"
    script.write_text(_SPAWNING)
    (tmp_path / "stay.py").write_text(_STAY)
    pids.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, str(script), str(pids)], env=environment) as process:
        _wait_until(lambda: len(list(pids.iterdir())) == 3)
        process.kill()
    _wait_until(lambda: not any(_runs(int(path.name)) for path in pids.iterdir()))


def _wait_until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# --- completion -------------------------------------------------------------------------------------------------------

_COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_shtab_nemo_modelopt
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def bash_script(tmp_path_factory, command):
    """Return the completion script for bash, as the command prints it."""
    if not shutil.which("bash"):
        pytest.skip("needs bash")
    path = tmp_path_factory.mktemp("completion") / "nemo-modelopt.bash"
    path.write_text(_run(command, "--print-completion", "bash").stdout)
    return str(path)


def test_the_bash_script_is_valid(bash_script):
    shown = _run("bash", "-n", bash_script)
    assert shown.returncode == 0 and not shown.stderr
    registered = _run("bash", "-c", f"source {bash_script}; complete -p nemo-modelopt").stdout
    assert registered.strip().endswith("_shtab_nemo_modelopt nemo-modelopt")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([""], set(NAMES)),
        (["p"], {"ptq", "prune"}),
        (["ptq", "--export"], {"--export_path", "--export_format"}),
        (["ptq", "--export_format", ""], {"trtllm", "nemo", "hf"}),
        (["ptq", "-nc", "scri"], {"scripts"}),
        (["prune", "--drop_layers", "1", "--restore"], {"--restore_path"}),
        (["distill", "--data_paths", "scripts", "--teacher"], {"--teacher_path", "--teacher-topk"}),
        (["compress", "--distill-min"], {"--distill-min-lr"}),
        (["compare", "scripts", "test_co"], {"test_code"}),
        (["--print-completion", ""], {"bash", "zsh"}),
    ],
)
def test_bash_completes(bash_script, words, expected):
    shown = _run("bash", "-c", _COMPLETE, "-", bash_script, "nemo-modelopt", *words)
    assert shown.returncode == 0 and not shown.stderr
    assert set(shown.stdout.split()) == expected


@pytest.mark.parametrize("shell", main.SHELLS)
def test_every_flag_is_in_the_completion_script(shell):
    line = main.parser(with_options=True)
    shown = completion.script(line, main.command_parsers(line).values(), shell)
    parsers = main.command_parsers(main.parser(with_options=True))
    flags = {flag for parser in parsers.values() for action in parser._actions for flag in action.option_strings}
    assert {"--target-params", "--kd_config", "-algo"} <= flags
    assert not [flag for flag in flags if flag not in shown]

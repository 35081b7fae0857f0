"""The drop-in: who serves ``nemo.collections.llm.modelopt``, how it is installed, switched off and taken away."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import py_compile
import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

from nemo_modelopt_dropin import finder, versions
from test_code.support.installed import NEMO

ROOT = Path(__file__).resolve().parents[2]
SITE = Path(sysconfig.get_paths()["purelib"])
OURS = ROOT / "nemo" / "collections" / "llm" / "modelopt"
# A child imports NeMo: 15 s alone, more on a busy machine.
CHILD_TIMEOUT = 240


def run(*command, cwd, env=None, check=True):
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=CHILD_TIMEOUT,
    )
    if check:
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def test_finder_answers_for_one_name_only():
    assert finder.DropInFinder.find_spec("nemo.collections.llm.modelopt").origin == str(OURS / "__init__.py")
    for other in ("nemo", "nemo.collections.llm", "nemo.collections.llm.modelopt.distill", "modelopt"):
        assert finder.DropInFinder.find_spec(other) is None


@pytest.mark.parametrize("value, ours", [("", True), ("ours", True), ("stock", False), (" STOCK ", False)])
def test_the_switch(monkeypatch, value, ours):
    monkeypatch.setenv("NEMO_MODELOPT", value)
    assert finder.is_enabled() is ours
    assert (finder.DropInFinder.find_spec(finder.PACKAGE) is not None) is ours


def test_install_is_idempotent_and_can_be_undone(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if f is not finder.DropInFinder])
    finder.install()
    finder.install()
    assert sys.meta_path.count(finder.DropInFinder) == 1
    assert sys.meta_path[0] is finder.DropInFinder
    finder.uninstall()
    finder.uninstall()
    assert finder.DropInFinder not in sys.meta_path


CHILD = """
import json, multiprocessing, os, sys

def where(queue=None):
    import nemo.collections.llm as llm
    import nemo.collections.llm.modelopt as package
    import nemo.collections.llm.modelopt.prune.pruner as pruner
    import nemo.collections.llm.api as api
    found = {
        "package": package.__file__,
        "submodule": pruner.__file__,
        "used by llm.api": sys.modules[api.Quantizer.__module__].__file__,
        "llm": llm.__file__,
    }
    return queue.put(found) if queue else found

if __name__ == "__main__":
    out = {"main": where()}
    if os.environ.get("RANK", "0") == "0" and "spawn" in sys.argv:
        context = multiprocessing.get_context("spawn")
        queue = context.Queue()
        child = context.Process(target=where, args=(queue,))
        child.start()
        out["spawn"] = queue.get(timeout=200)
        child.join()
    with open(sys.argv[1] + os.environ.get("RANK", "0") + ".json", "w") as f:
        json.dump(out, f)
"""


def assert_ours(found: dict, folder: Path, site: Path = NEMO) -> None:
    assert Path(found["package"]) == folder / "__init__.py"
    assert Path(found["submodule"]) == folder / "prune" / "pruner.py"
    assert Path(found["used by llm.api"]) == folder / "quantization" / "quantizer.py"
    assert Path(found["llm"]).is_relative_to(site)


def test_plain_interpreter_torchrun_and_spawned_processes_get_ours(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run(*torchrun, script, tmp_path / "rank", "spawn", cwd=tmp_path)
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2)]
    assert_ours(ranks[0]["main"], OURS)
    assert_ours(ranks[0]["spawn"], OURS)
    assert_ours(ranks[1]["main"], OURS)


def test_stock_serves_when_switched_off(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    run(sys.executable, script, tmp_path / "out", cwd=ROOT, env={"NEMO_MODELOPT": "stock"})
    found = json.loads((tmp_path / "out0.json").read_text())["main"]
    assert_ours(found, NEMO / "nemo" / "collections" / "llm" / "modelopt")


def without_our_tree() -> str:
    """Return the path that this run was given, for an interpreter that shall find the installed package only."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(entry for entry in entries if entry and Path(entry).resolve() != ROOT)


def changed_files(distribution: str) -> list[str]:
    """Return the files of an installed distribution that are missing or differ from its RECORD."""
    record = next(f for f in metadata.files(distribution) or () if f.name == "RECORD").locate()
    bad = []
    for name, digest, _ in csv.reader(Path(record).read_text().splitlines()):
        # Scripts: `pip install --target` puts them elsewhere than it writes down.
        if name.startswith(".."):
            continue
        path = NEMO / name
        if not path.exists():
            bad.append(name)
        elif digest:
            actual = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
            if digest != f"sha256={actual}":
                bad.append(name)
    return bad


def test_wheel_in_an_environment_of_its_own(tmp_path):
    """Install the wheel, import through it, uninstall it: nemo-toolkit is as it was."""
    run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ROOT,
        cwd=tmp_path,
    )  # fmt: skip
    (wheel,) = tmp_path.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    site = next((tmp_path / "env" / "lib").glob("python3*")) / "site-packages"
    # Everything else comes from this environment; its own .pth files, the editable install's too, are not read there.
    (site / "everything_else.pth").write_text(f"{SITE}\n")
    python = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python]

    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    run(python, script, tmp_path / "out", cwd=tmp_path, env={"PYTHONPATH": without_our_tree()})
    found = json.loads((tmp_path / "out0.json").read_text())["main"]
    assert_ours(found, site / "nemo_modelopt_dropin" / "_overlay" / "modelopt")
    assert not (site / "nemo").exists()
    assert len(list(site.glob("nemo_modelopt_dropin-*.dist-info/licenses/LICENSE"))) == 1
    command = python.with_name("nemo-modelopt")
    shown = run(command, "ptq", "--help", cwd=tmp_path, env={"PYTHONPATH": without_our_tree()})
    assert shown.stdout.startswith("usage: nemo-modelopt ptq ")

    run(*pip, "uninstall", "--yes", "nemo-modelopt-dropin", cwd=tmp_path)
    left = sorted(p.name for p in site.iterdir() if "modelopt" in p.name)
    assert left == [] and not command.exists()
    show = "import sys; print([str(f) for f in sys.meta_path])"
    finders = run(python, "-c", show, cwd=tmp_path, env={"PYTHONPATH": without_our_tree()}).stdout
    assert "DropInFinder" not in finders
    assert changed_files("nemo-toolkit") == []


def test_start_up_costs_under_two_milliseconds(tmp_path):
    """Processor time of what activate.pth executes, in a fresh interpreter; the best of ten, for a busy machine."""
    # As pip does when it installs; elsewhere the first start would, unless the environment forbids it.
    for name in ("__init__", "finder"):
        py_compile.compile(str(ROOT / "nemo_modelopt_dropin" / f"{name}.py"), doraise=True)
    line = (ROOT / "nemo_modelopt_dropin" / "activate.pth").read_text().strip()
    script = (
        f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r}); before = set(sys.modules)\n"
        "start = time.process_time_ns()\n"
        f"{line}\n"
        "cost = time.process_time_ns() - start\n"
        "print(cost / 1e6, sorted(set(sys.modules) - before))"
    )
    costs = []
    for _ in range(10):
        cost, new_modules = run(sys.executable, "-S", "-c", script, cwd=tmp_path).stdout.split(maxsplit=1)
        assert new_modules.strip() == "['nemo_modelopt_dropin', 'nemo_modelopt_dropin.finder']"
        costs.append(float(cost))
    assert min(costs) < 2.0, costs


GOOD = {"nemo-toolkit": "2.7.3", "megatron-core": "0.15.3", "nvidia-modelopt": "0.43.0"}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"nvidia-modelopt": "0.37.0"},
        {"nvidia-modelopt": "0.47.0"},
        {"nemo-toolkit": "2.6.2"},
        {"nemo-toolkit": "2.5.3", "megatron-core": "0.14.0"},
        {"megatron-core": "0.14.0rc7"},
        {"nemo-toolkit": "2.6.0rc0+a1b2c3", "nvidia-modelopt": "0.37.0.dev12"},
    ],
)
def test_supported_versions_pass(change):
    versions.check({**GOOD, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"nvidia-modelopt": "0.48.0"}, r"nvidia-modelopt 0\.48\.0 .*<0\.48; later versions have not been tested"),
        ({"nvidia-modelopt": "0.48.0rc1"}, r"nvidia-modelopt 0\.48\.0rc1"),
        ({"nvidia-modelopt": "0.31.0"}, r"nvidia-modelopt 0\.31\.0 .*>=0\.37"),
        ({"nvidia-modelopt": None}, r"nvidia-modelopt is not installed"),
        ({"megatron-core": "0.16.0"}, r"megatron-core 0\.16\.0 .*no_weight_decay_cond"),
        (
            {"nemo-toolkit": "2.5.3"},
            r"nemo-toolkit 2\.5\.3 needs megatron-core <0\.15 and 0\.15\.3 is installed",
        ),
        ({"nemo-toolkit": "2.5.3rc1", "megatron-core": "0.15.0rc7"}, r"needs megatron-core <0\.15"),
        ({"nemo-toolkit": "3.0.0"}, r"nemo-toolkit 3\.0\.0 .*dropped its LLM collection"),
        (
            {"nemo-toolkit": "3.0.0", "megatron-core": "0.13"},
            r"toolkit 3.*megatron-core 0\.13.*NEMO_MODELOPT=stock",
        ),
    ],
)
def test_unsupported_versions_are_named(change, message):
    with pytest.raises(versions.UnsupportedVersionError, match=message):
        versions.check({**GOOD, **change})


@pytest.mark.parametrize(
    "modelopt, engine, by_importance",
    [("0.37.0", False, True), ("0.43.0", False, True), ("0.44.0", True, False), ("0.45.1", True, False)],
)
def test_versions_that_prune(modelopt, engine, by_importance):
    assert versions.pruning_problem(modelopt, engine, by_importance) is None


@pytest.mark.parametrize(
    "modelopt, engine, by_importance, message",
    [
        ("0.44.0", False, True, r"0\.44\.0 imports Transformer Engine, which is not installed.*modelopt 0\.43\.$"),
        ("0.44.0", False, False, r"which is not installed.*0\.43, or 0\.44 or 0\.45 with Transformer Engine\.$"),
        ("0.45.0", True, True, r"0\.45\.0 measures importance in .*fused layers only.*nvidia-modelopt 0\.43\.$"),
        ("0.46.0", True, True, r"nvidia-modelopt 0\.46\.0 .*megatron-core before 0\.16 lacks.*modelopt 0\.43\.$"),
        ("0.46.0", True, False, r"megatron-core before 0\.16 lacks.*0\.43, or 0\.44 or 0\.45\.$"),
    ],
)
def test_versions_that_do_not_prune_name_one_that_does(modelopt, engine, by_importance, message):
    assert re.search(message, versions.pruning_problem(modelopt, engine, by_importance))


def pretend(folder, name, version):
    """Put the metadata of a distribution of another version into a folder."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_importing_with_an_unsupported_version_says_so(tmp_path):
    """A newer modelopt's metadata comes first on the path: NeMo's own import of our package shows the error."""
    pretend(tmp_path, "nvidia-modelopt", "0.48.0")
    result = run(
        sys.executable, "-c", "import nemo.collections.llm.modelopt",
        cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}, check=False,
    )  # fmt: skip
    assert result.returncode != 0
    assert "UnsupportedVersionError" in result.stderr
    assert "nvidia-modelopt 0.48.0 is installed (supported: >=0.37,<0.48" in result.stderr


@pytest.mark.parametrize(("switch", "ours"), [("", True), ("stock", False)])
def test_the_cpu_backend_checks_versions_before_nemo_fails_on_them(tmp_path, switch, ours):
    """nemo-toolkit 2.5 cannot be imported with megatron-core 0.15, so our package would never be asked."""
    pretend(tmp_path, "nemo-toolkit", "2.5.3")
    pretend(tmp_path, "megatron-core", "0.15.3")
    # NeMo is not imported: one that says so stands in its place.
    (tmp_path / "nemo").mkdir()
    (tmp_path / "nemo" / "__init__.py").write_text("raise ImportError('NeMo was asked')")
    result = run(
        sys.executable, "-c", "from nemo_modelopt_dropin import cpu_backend; cpu_backend.enable()",
        cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "NEMO_MODELOPT": switch}, check=False,
    )  # fmt: skip
    assert result.returncode != 0
    assert ("nemo-toolkit 2.5.3 needs megatron-core <0.15 and 0.15.3 is installed" in result.stderr) is ours
    assert ("NeMo was asked" in result.stderr) is not ours

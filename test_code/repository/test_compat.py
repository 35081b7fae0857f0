"""The script that runs the suite on other versions: matrix, path, counts, table. No row is installed here."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from nemo_modelopt_dropin import versions

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def compat():
    spec = importlib.util.spec_from_file_location("test_compat_script", ROOT / "scripts" / "test_compat.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_every_row_is_of_supported_versions(compat):
    default = {"nemo-toolkit": "2.7.3", "megatron-core": "0.15.3", "nvidia-modelopt": "0.43.0"}
    rows = [default | dict(pin.split("==") for pin in pins) for pins in compat.MATRIX.values()]
    for row in rows:
        versions.check(row)
    # The promise of the README, and of versions.SUPPORTED's lower bounds.
    assert {row["nemo-toolkit"] for row in rows} == {"2.5.3", "2.6.2", "2.7.3"}
    assert {row["nvidia-modelopt"] for row in rows} == {"0.37.0", "0.43.0", "0.44.0", "0.47.0"}
    assert all((row["megatron-core"] == "0.14.0") == (row["nemo-toolkit"] == "2.5.3") for row in rows)


def test_rows_by_name(compat):
    assert compat.chosen_rows(None) == list(compat.MATRIX)
    assert compat.chosen_rows("nemo-2.6.2") == ["nemo-2.6.2"]
    with pytest.raises(compat.CompatError, match=r"no row 'nemo-9'; rows: modelopt-0\.37\.0, "):
        compat.chosen_rows("nemo-9")


def test_what_a_row_runs(compat):
    words = compat.suite(whole=False)
    ignored = [word.removeprefix("--ignore=") for word in words if word.startswith("--ignore=")]
    assert ignored == [f"test_code/{name}" for name in compat.LEFT_OUT]
    assert all((ROOT / name).exists() for name in ignored)
    assert compat.suite(whole=True) == [word for word in words if not word.startswith("--ignore=")]


def test_a_folder_is_reused_until_its_pins_change(compat, tmp_path):
    assert not compat.is_installed(tmp_path, ["a==1", "b==2"])
    (tmp_path / compat.MARKER).write_text(compat.recorded(["b==2", "a==1"]))
    assert compat.is_installed(tmp_path, ["a==1", "b==2"])
    assert not compat.is_installed(tmp_path, ["a==1", "b==3"])
    assert not compat.is_installed(tmp_path, ["a==1"])


def test_the_row_comes_first_and_our_tree_second_on_the_path(compat, tmp_path):
    base = {"PYTHONPATH": os.pathsep.join(["/elsewhere", str(ROOT)]), "NEMO_MODELOPT": "stock", "HOME": "/home"}
    env = compat.environment(tmp_path, base)
    assert env == {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), "/elsewhere"]), "HOME": "/home"}


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("======= 3 passed in 0.52s =======", {"passed": 3}),
        ("1 failed in 1.92s", {"failed": 1}),
        (
            "= 2 failed, 400 passed, 1 skipped, 3 deselected, 1 error in 725.31s (0:12:05) =",
            {"failed": 2, "passed": 400, "skipped": 1, "deselected": 3, "errors": 1},
        ),
        ("===== 1 passed, 2 errors in 3.00s =====\nsomething after it", {"passed": 1, "errors": 2}),
        ("no tests ran in 0.01s", {}),
        ("killed", {}),
    ],
)
def test_counts_of_the_closing_line(compat, line, counts):
    assert compat.parse_counts(f"collected 3 items\nit took 3 passed chances\n{line}\n") == counts


def found(folder, **changes):
    entry = {"version": "2.6.2", "imported": "2.6.2", "file": f"{folder}/nemo/__init__.py"}
    other = {"version": "0.43.0", "imported": "0.43.0", "file": "/site-packages/modelopt/__init__.py"}
    return {"nemo-toolkit": entry | changes, "nvidia-modelopt": other}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"imported": "2.7.3"}, r"nemo-2\.6\.2: nemo-toolkit 2\.7\.3 \(metadata 2\.6\.2\), not 2\.6\.2"),
        ({"version": "2.7.3"}, r"metadata 2\.7\.3"),
        ({"file": "/site-packages/nemo/__init__.py"}, r"imported from /site-packages/nemo/__init__\.py, not from"),
    ],
)
def test_a_row_that_imports_something_else_is_an_error(compat, tmp_path, changes, message):
    with pytest.raises(compat.CompatError, match=message):
        compat.check_imports("nemo-2.6.2", found(tmp_path, **changes), tmp_path)


def test_versions_that_are_imported(compat, tmp_path):
    versions_found = compat.check_imports("nemo-2.6.2", found(tmp_path), tmp_path)
    assert versions_found == {"nemo-toolkit": "2.6.2", "nvidia-modelopt": "0.43.0"}


@pytest.mark.parametrize(
    ("exit_code", "counts", "good"),
    [
        (0, {"passed": 5, "skipped": 1}, True),
        (1, {"passed": 5, "failed": 1}, False),
        (1, {"passed": 5, "errors": 1}, False),
        (5, {}, False),
        (0, {}, False),
        (-9, {}, False),
    ],
)
def test_what_counts_as_good(compat, exit_code, counts, good):
    result = compat.Result("nemo-2.6.2", {}, exit_code, 60.0, counts)
    assert result.is_good is good
    assert ("FAILED" in compat.table([result])) is not good


def test_table(compat):
    imported = {"nemo-toolkit": "2.6.2", "megatron-core": "0.15.3", "nvidia-modelopt": "0.43.0"}
    result = compat.Result("nemo-2.6.2", imported, 0, 90.0, {"passed": 12, "deselected": 3})
    head, rule, row = compat.table([result]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, row)]
    assert dict(zip(*cells, strict=True)) == {
        "row": "nemo-2.6.2", **imported, "passed": "12", "failed": "0", "errors": "0", "skipped": "0", "xfailed": "0",
        "deselected": "3", "minutes": "1.5",
    }  # fmt: skip
    assert set(rule) == {"|", "-", " "}
    assert len(head) == len(rule) == len(row)


def test_an_unknown_row_ends_with_status_one(compat, capsys):
    assert compat.main(["--row", "nemo-9"]) == 1
    assert "no row 'nemo-9'" in capsys.readouterr().err

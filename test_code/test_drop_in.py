"""The tests in ``drop_in/``, which the test files of their functions run on our package, run on stock as well.

So they are true by construction: whatever a unit test of the stock subpackage could rely on holds for ours too.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from test_code.support import installed

FOLDER = Path(__file__).parent / "drop_in"
FILES = (
    "test_quantizer.py",
    "test_pruner.py",
    "test_distillation_utils.py",
    "test_teacher_provider.py",
    "test_get_tensor_shapes_adjust_fn.py",
    "test_model_utils.py",
    "speculative/test_speculative.py",
)
# The child writes what became of each test; its own conftest.py and markers apply.
CHILD = """
import json, sys
import pytest

class Outcomes:
    def __init__(self):
        self.found = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.found[report.nodeid.partition("::")[2]] = report.outcome

outcomes = Outcomes()
pytest.main([*sys.argv[2:], "-m", "drop_in", "-q", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore"], [outcomes])
from nemo.collections.llm.modelopt.quantization import quantizer
with open(sys.argv[1], "w") as file:
    json.dump({"served from": quantizer.__file__, "outcomes": outcomes.found}, file)
"""


class Collected:
    """Remember which tests of ours were collected."""

    def pytest_collection_finish(self, session):
        self.names = [item.nodeid.partition("::")[2] for item in session.items]


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Return what became of each test on stock, all of them run in one child process."""
    result = tmp_path_factory.mktemp("stock") / "outcomes.json"
    modules = sorted(str(path) for path in FOLDER.glob("*.py") if path.name != "__init__.py")
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(result), *modules],
        cwd=FOLDER.parent.parent,
        env={**os.environ, "NEMO_MODELOPT": "stock"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.is_file(), child.stdout + child.stderr
    return {**json.loads(result.read_text()), "log": child.stdout[-5000:]}


def drop_in_classes(module):
    return {
        value
        for name, value in vars(module).items()
        if name.startswith("Test") and inspect.isclass(value) and value.__module__.startswith("test_code.drop_in.")
    }


def test_the_child_runs_stock(stock):
    assert installed.is_stock(stock["served from"])


@installed.stock_quantizes
def test_every_one_passes_on_stock(stock):
    failed = {name: outcome for name, outcome in stock["outcomes"].items() if outcome != "passed"}
    assert not failed, stock["log"]
    assert len(stock["outcomes"]) >= 250


def test_the_same_ones_run_on_ours(stock):
    collected = Collected()
    arguments = ["--collect-only", "-m", "drop_in", "-q", "-p", "no:cacheprovider"]
    assert pytest.main([*arguments, *(str(FOLDER.parent / name) for name in FILES)], [collected]) == 0
    assert sorted(collected.names) == sorted(stock["outcomes"])


def test_every_class_is_imported_by_one_file():
    import importlib

    own = [drop_in_classes(importlib.import_module("test_code." + name[:-3].replace("/", "."))) for name in FILES]
    there = [
        drop_in_classes(importlib.import_module(f"test_code.drop_in.{path.stem}"))
        for path in FOLDER.glob("*.py")
        if path.name != "__init__.py"
    ]
    assert all(own)
    assert sum(map(len, own)) == len(set().union(*own)) == len(set().union(*there))

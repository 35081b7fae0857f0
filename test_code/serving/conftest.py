"""Fixtures of the tests of readers: models, exports, and vLLM's process."""

from __future__ import annotations

import json

import pytest

from test_code.serving import client
from test_code.support import installed, jobs_serving

# Columns of the table: the divergence and its bound, what quantization changes, and the divergence of wrong folders.
FIGURES = ("served", "bound", "quantization", "doubled scale", "input scale", "swapped")
# Families in the table of the documentation.
TABLE = ("llama", "qwen3-tied", "mixtral")
ROWS = pytest.StashKey[list]()


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """Return the folder of all models and exports."""
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="session")
def made(ranks_factory, work):
    """Return a function that returns the folder, the NeMo checkpoint and the log probabilities of a family."""
    done: dict[str, tuple] = {}

    def make(family: str) -> tuple:
        if family not in done:
            (work / family).mkdir()
            ((checkpoint, plain),) = ranks_factory(1).run(jobs_serving.make, family, str(work / family))
            done[family] = work / family, checkpoint, plain
        return done[family]

    return make


@pytest.fixture(scope="session")
def exported(ranks_factory, made):
    """Return a function that returns the folder of an export and the model in memory, see `jobs_serving.InMemory`."""
    done: dict[tuple, tuple] = {}

    def make(family: str, algorithm: str, layout: str, **settings) -> tuple:
        key = (family, algorithm, layout, json.dumps(settings))
        if key not in done:
            installed.need_preset(algorithm)
            folder, checkpoint, _ = made(family)
            target = folder / f"{algorithm}-{layout}-{len(done)}"
            export = {"hf_layout": layout} | settings.pop("export", {})
            arguments = checkpoint, str(target), algorithm
            (found,) = ranks_factory(1).run(jobs_serving.export, *arguments, export=export, **settings)
            done[key] = target, found
        return done[key]

    return make


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    """Return the process of vLLM."""
    if not client.PYTHON.exists():
        pytest.fail(f"{client.PYTHON} does not exist; run `make test-serving`, which builds it.")
    process = client.Engine(tmp_path_factory.mktemp("engine") / "vllm.log")
    yield process
    process.close()


@pytest.fixture(scope="session")
def rows(pytestconfig):
    """Return the rows of the table that is printed at the end."""
    return pytestconfig.stash.setdefault(ROWS, [])


def pytest_terminal_summary(terminalreporter, config):
    """Print what was served, and write it to a file."""
    found = config.stash.get(ROWS, [])
    if not found:
        return
    terminalreporter.section("served by vLLM: mean KL divergence, in nats")
    terminalreporter.write_line(" " * 48 + "".join(f"{key[:8]:>9}" for key in FIGURES) + "  kernels")
    for row in found:
        figures = "".join(f"{row[key]:9.1e}" if key in row else " " * 9 for key in FIGURES)
        names = f"{row['family']:11}{row['algorithm']:18}{row['layout']:19}"
        terminalreporter.write_line(f"{names}{figures}  {row['kernels']}")
    client.RESULTS.parent.mkdir(parents=True, exist_ok=True)
    client.RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    client.RESULTS.with_suffix(".md").write_text(markdown(found))


def markdown(found: list[dict]) -> str:
    """Return the table of divergences in `docs/load-exports.md`, in thousandths of a nat."""
    heads = ["export", "layout", *(f"{family}: vLLM (allowed)" for family in TABLE), "quantization", "doubled scale"]
    lines = [heads, ["---"] * len(heads)]
    for algorithm, layout in dict.fromkeys((row["algorithm"], row["layout"]) for row in found):
        rows = {row["family"]: row for row in found if (row["algorithm"], row["layout"]) == (algorithm, layout)}
        served = [rows.get(family) for family in TABLE]
        lines.append(
            [f"`{algorithm}`", layout]
            + ["" if row is None else f"{_thousandths(row['served'])} ({_thousandths(row['bound'])})" for row in served]
            + [_thousandths(rows.get(TABLE[0], {}).get(key)) for key in ("quantization", "doubled scale")]
        )
    return "".join("|" + "|".join(f" {cell} " if cell else " " for cell in line) + "|\n" for line in lines)


def _thousandths(value: float | None) -> str:
    return "" if value is None else f"{float(f'{1000 * value:.2g}'):g}"

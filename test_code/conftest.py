"""Fixtures of the suite: the pools of live ranks, and which tests run on the device that `devices` chooses."""

from __future__ import annotations

import os
import types
import warnings
from pathlib import Path

import pytest

from nemo_modelopt_cli.process import imports
from test_code.support import devices

# GPUs are hidden before anything uses them.
devices.prepare()

_ROOT = Path(__file__).resolve().parent

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Importing NeMo raises dozens of deprecation warnings in third parties. They are let pass here, once; from then on a
# warning is an error unless pyproject.toml names it, and one of ours is an error even here.
with warnings.catch_warnings(), imports.uncollected():
    warnings.simplefilter("ignore")
    warnings.filterwarnings("error", module=r"nemo\.collections\.llm\.modelopt")
    import nemo.collections.llm  # noqa: F401

from nemo_modelopt_dropin import versions  # noqa: E402
from test_code.support import other_sums  # noqa: E402

other_sums.enable_if_asked()


def _pools(tmp_path_factory, label: str, env: dict[str, str]):
    """Yield a function that returns the pool of n live ranks, and close all pools at the end."""
    from test_code.support.ranks import RankPool

    pools: dict[int, RankPool] = {}

    def get(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(world_size, tmp_path_factory.mktemp(f"{label}{world_size}-"), env=env)
        return pools[world_size]

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def ranks_factory(tmp_path_factory):
    """Return the pools of live ranks, for fixtures of a wider scope than one test."""
    yield from _pools(tmp_path_factory, "ranks", {})


@pytest.fixture(scope="session")
def stock_ranks(tmp_path_factory):
    """Return the pools of live ranks that run the stock subpackage: ``stock_ranks(2).run(jobs.function)``."""
    yield from _pools(tmp_path_factory, "stock", {"NEMO_MODELOPT": "stock"})


@pytest.fixture
def ranks(ranks_factory):
    """Return the pool of that many live ranks: ``ranks(2).run(jobs.function, argument)``."""
    return ranks_factory


@pytest.fixture(scope="session")
def commands():
    """Return the server that starts commands without importing NeMo again (`support/started.py`)."""
    from test_code.support.started import Server

    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def cpu_backend():
    """Enable the CPU backend in the test process itself, unless the tests run on GPUs."""
    from nemo_modelopt_dropin import cpu_backend as backend

    if not devices.machine().on_gpus:
        backend.enable()
    return backend


# Files that take longest, the longest first: 180 to 25 s of a process on two busy cores. They are dealt out in this
# order, before all others, so that no process is left alone with one of them at the end.
_LONGEST = (
    "quantization/test_awq_search.py",
    "cli/test_interruptions.py",
    "distill/test_distill_model.py",
    "compress/test_compress.py",
    "test_pruner.py",
    "families/test_exports.py",
    "test_checkpoints.py",
    "installation/test_dropin.py",
    "repository/test_docs.py",
    "distill/test_distill_state.py",
    "test_parity.py",
    "serving/test_rules.py",
    "quantization/test_export.py",
    "quantization/test_state.py",
    "cli/test_scripts.py",
    "repository/test_benchmarks.py",
    "quantization/test_hf_check.py",
    "distill/test_fused_logits.py",
    "distill/test_recorded_teacher.py",
    "commands/test_commands_unchanged.py",
    "fake_gpu/test_distill.py",
    "serving/test_exporter.py",
    "fit/test_pipeline.py",
    "quantization/test_qat.py",
    "compress/test_work_done_once.py",
    "quantization/test_hf_layouts.py",
    "end_to_end/test_functional.py",
    "quantization/test_hf_scales.py",
    "quantization/test_shared_scales.py",
    "distill/test_memory.py",
    "cpu_backend/test_cpu_backend.py",
    "families/test_steps.py",
    "prune/test_prune_budget.py",
    "distill/test_distill_loss.py",
    "distill/test_packed.py",
    "test_quantizer.py",
    "quantization/test_ptq_report.py",
)


def pytest_collection_modifyitems(config, items):
    """Leave out the tests of the other device, and begin with the files that take longest."""
    kept, others = devices.select(items)
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = kept
    ranking = {str(_ROOT / name): number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: ranking.get(str(item.path), len(ranking)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Count a test as skipped if the installed modelopt cannot prune, and that is what stopped the test."""
    report = yield
    reason = versions.pruning_problem() if report.failed else None
    # Only how it begins: pytest shortens what it shows of long strings.
    if reason and reason[:40] in report.longreprtext + "".join(text for _, text in report.sections):
        report.outcome = "skipped"
        report.longrepr = (str(item.path), item.location[1] or 0, f"Skipped: {reason}")
    return report


def pytest_deselected(items):
    """Keep the numbers for `pytest_testnodedown`: test processes side by side do not report them by themselves."""
    if items and hasattr(items[0].config, "workeroutput"):
        output = items[0].config.workeroutput
        output.setdefault("deselected", []).extend(devices.other_device(item) or "" for item in items)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Let the closing line count what was deselected, as it does for a single process; every process has the same."""
    reporter = node.config.pluginmanager.get_plugin("terminalreporter")
    names = getattr(node, "workeroutput", {}).get("deselected", ())
    if reporter is not None and "deselected" not in reporter.stats and names:
        reporter.stats["deselected"] = [types.SimpleNamespace(other_device=name) for name in names]


def pytest_report_header():
    return f"device: {devices.machine()}"


def pytest_terminal_summary(terminalreporter):
    """End with the device, and with the numbers of tests that it leaves out."""
    stats = terminalreporter.stats
    reasons = [str(report.longrepr) for report in stats.get("skipped", ())]
    names = [getattr(item, "other_device", None) or devices.other_device(item) for item in stats.get("deselected", ())]
    for line in devices.closing_lines(reasons, names):
        terminalreporter.write_line(line)

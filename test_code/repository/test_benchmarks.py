"""The benchmarks run, compare like with like, and write what they found."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from test_code.support import installed

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def kd_step(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import kd_step

    return kd_step


@pytest.fixture
def ptq(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "benchmarks.ptq", raising=False)
    from benchmarks import ptq

    return ptq


def _imports(path: Path) -> set[str]:
    """Return the modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_benchmarks_need_live_ranks_and_small_models_of_the_tests_and_nothing_else():
    allowed = ("test_code.support.ranks.RankPool", "test_code.support.tiny", "test_code.support.installed")
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert {name for name in _imports(path) if name.startswith("test_code")} <= set(allowed), path.name
    importers = [
        path
        for path in (ROOT / "test_code").rglob("*.py")
        if any(name.partition(".")[0] == "benchmarks" for name in _imports(path))
    ]
    assert importers == [Path(__file__)]


@installed.stock_quantizes
def test_ptq_benchmark(ptq, ranks, stock_ranks, tmp_path):
    pools = {"stock": stock_ranks(1), "ours": ranks(1), "ours x 2": ranks(2)}
    result = ptq.measure(pools, tmp_path, ptq.QUICK, 1, "fp8")
    ptq.write(result, tmp_path / "results")
    rows = json.loads((tmp_path / "results" / "ptq.json").read_text())["rows"]
    # Stock pads; two ranks share what one does.
    assert rows["stock"]["positions computed"] == 16 * 64 >= rows["stock"]["real tokens"] > 0
    assert rows["ours x 2"]["real tokens"] == rows["ours"]["real tokens"] >= rows["stock"]["real tokens"]
    assert all(row["seconds"]["best"] > 0 and row["peak MiB"] >= 0 for row in rows.values())
    text = (tmp_path / "results" / "ptq.txt").read_text()
    assert all(name in text for name in (*rows, *result["ratios"])) and "target" in text
    assert (tmp_path / "results" / "ptq.png").read_bytes().startswith(b"\x89PNG")


def test_kd_step_benchmark(kd_step, ranks, stock_ranks, tmp_path):
    case = kd_step.SIZES["quick"]
    found = kd_step.measure({"stock": stock_ranks(1), "ours": ranks(1)}, case, 1, 1)
    rows = kd_step.compare(found, case)
    kd_step.write("kd_step", rows, tmp_path, kd_step.notes(rows))
    rows = json.loads((tmp_path / "kd_step.json").read_text())["rows"]
    # fp32 sums over the vocabulary; stock's are the less exact ones.
    assert all(r["gradient difference"] < 1e-5 and r["loss difference"] < 1e-5 for n, r in rows.items() if n[0] != "m")
    peaks = {name: r["peak bytes"] for name, r in found.items()}
    logits = 4 * case["sequences"] * case["length"] * case["vocabulary"]
    # Stock: both logits and 7 L; chunked: both logits, the teacher's taking the gradient.
    assert peaks["stock"] > 9 * logits and peaks["stock"] - peaks["chunked"] > 5 * logits
    assert (tmp_path / "kd_step.svg").read_text().count("<rect") == 1 + 2 * len(rows)
    assert all(name in (tmp_path / "kd_step.md").read_text() for name in rows)


def test_memory_of_the_teachers_logits_is_reused_unless_somebody_sees_them(kd_step, ranks):
    from benchmarks import _kd_step_rank

    off = {"fused_logits": "off"}
    cases = {"alone": off, "with LM loss": {**off, "skip_lm_loss": False}, "seen": off, "fused": {"fused_logits": "on"}}
    found = ranks(1).run(_kd_step_rank.reuses_teacher_logits, kd_step.SIZES["quick"], cases)[0]
    assert found == {"alone": True, "with LM loss": True, "seen": False, "fused": False}


def test_formulas_of_memory_are_what_megatron_takes(monkeypatch, ranks, stock_ranks):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import kd_memory

    checks = kd_memory.check({"stock": stock_ranks(1), "ours": ranks(1)}, {"small": kd_memory.QUICK}, "small")
    for row in checks:
        # Tensors of a few numbers a token (statistics, masks, losses) are in no formula.
        assert abs(row["deviation"]) < 0.1 and abs(row["weights, formula / simulation"] - 1) < 1e-3, row
        assert abs(row["allocator"] / row["simulation"] - 1) < 0.02, row
    table = kd_memory.text(kd_memory.rows(), checks)
    assert table.count("8B -> 4B") == len(kd_memory.LAYOUTS["8B -> 4B"]) and "70B -> 8B" in table
    for row in kd_memory.rows():
        assert row["total"]["chunked"] < row["total"]["stock"]


def test_losses_of_other_projects_need_no_more_than_their_file(monkeypatch, tmp_path, cpu_backend):
    """A project that cannot be imported serves as well; one that is not installed is named."""
    import torch

    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import _kd_peers
    from nemo.collections.llm.modelopt._divergence.vocab_parallel import kl_divergence

    file = tmp_path / "trl" / "experimental" / "gkd" / "gkd_trainer.py"
    file.parent.mkdir(parents=True)
    (tmp_path / "trl" / "__init__.py").write_text("raise ImportError\n")
    file.write_text(
        "import a_stack_that_is_missing\n\nclass Trainer:\n    @staticmethod\n"
        "    def generalized_jsd_loss(student_logits, teacher_logits, beta=0.5):\n"
        "        return beta * F.mse_loss(student_logits, teacher_logits)\n"
    )
    found = {"torchtune": None, "trl": str(tmp_path / "trl")}

    def find_spec(name):
        return found[name] and SimpleNamespace(submodule_search_locations=[found[name]])

    monkeypatch.setattr(_kd_peers.importlib.util, "find_spec", find_spec)
    kl, jsd, missing = _kd_peers.losses()
    assert missing == ["torchtune"] and list(jsd) == ["TRL at beta 0.5"]
    assert sorted(kl) == ["TRL at beta 0", "torch.compile of the naive form"]
    student, teacher = (torch.randn(5, 20, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    assert jsd["TRL at beta 0.5"](student, teacher) == 0.5 * torch.nn.functional.mse_loss(student, teacher)
    torch.testing.assert_close(_kd_peers.naive(student, teacher), kl_divergence(student, teacher).mean())


def test_real_size_benchmark(monkeypatch, tmp_path):
    """Each step runs in a process of its own, and its results are added to those of others."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import real_size

    real_size.prepare(tmp_path, real_size.QUICK)
    parameters = json.loads((tmp_path / "sizes.json").read_text())["parameters"]
    for step in ("import", "fp8"):
        found = real_size.row(step, real_size.run(step, tmp_path, 1), tmp_path, parameters)
        real_size.add(tmp_path / "results", f"quick {step}", {"step": step, **found}, 1)
    rows = json.loads((tmp_path / "results" / "real_size.json").read_text())["rows"]
    assert list(rows) == ["quick import", "quick fp8"]
    phases = rows["quick fp8"]["phases"]
    assert {"load", "calibrate", "compare", "write weights", "check files", "check logits"} <= phases.keys()
    assert sum(phase["seconds"] for phase in phases.values()) == pytest.approx(rows["quick fp8"]["seconds"])
    # FP8 weights and an embedding in 16 bits.
    assert parameters < 1e6 * rows["quick fp8"]["exported MB"] < 2 * parameters + 2**17
    table = (tmp_path / "results" / "real_size.md").read_text()
    assert "| import |" in table and "fp8: comparison / calibration" in table and "target 1.25" in table
    assert (tmp_path / "results" / "real_size.png").read_bytes().startswith(b"\x89PNG")

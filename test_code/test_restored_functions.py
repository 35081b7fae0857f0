"""After a failed or interrupted operation, other models of the process run as they did before."""

from __future__ import annotations

import types
from pathlib import Path

import pytest

from test_code.support import jobs_distill, jobs_quant, jobs_restored


@pytest.fixture(scope="module")
def teacher(ranks_factory, tmp_path_factory) -> Path:
    """Train a tiny checkpoint."""
    folder = tmp_path_factory.mktemp("restored")
    ranks_factory(1).run(jobs_distill.teacher, str(folder / "teacher"))
    return folder / "teacher"


@pytest.mark.parametrize("error", ["error", "interruption"])
@pytest.mark.parametrize("kind", ["fp8", "int4_awq", "quantized", "prune", "distill"])
def test_other_models_train_as_before_after_a_failure(ranks, teacher, kind, error):
    given = {}
    if kind == "distill":
        given = {"teacher": str(teacher)}
    if kind == "quantized":
        given = {"checkpoint": str(teacher.parent / "quantized")}
        if not Path(given["checkpoint"]).exists():
            text = jobs_quant.corpus(teacher.parent / "text.jsonl")
            data = {"calibration_dataset": text, "calibration_dataset_size": 8}
            ranks(1).run(jobs_quant.ptq, str(teacher), given["checkpoint"], quant=data, timeout=240)
    found = ranks(1).run(jobs_restored.fail_then_train, kind, error, **given, timeout=240)[0]
    # Lightning ends a training that is interrupted with SystemExit.
    expected = {"error": {"RuntimeError"}, "interruption": {"KeyboardInterrupt", "SystemExit"}}
    assert found["failed"] in expected[error]
    assert found["left"] == []
    assert found["after"] == found["before"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("cached", [False, True])
def test_a_replaced_function_is_put_back(error, cached):
    from nemo.collections.llm.modelopt._functions import replace_function

    def before():
        return "before"

    package = types.SimpleNamespace(work=before, **({"_work": before} if cached else {}))
    names = dict(vars(package))
    with pytest.raises(error, match="inside"), replace_function(package, "work", lambda: package._work() + " after"):
        assert package.work() == "before after"
        raise error("inside")
    assert vars(package) == names


def test_all_of_modelopt_replaces_functions_safely():
    import sys

    from nemo.collections.llm.modelopt import _functions

    _functions.always_put_back()
    found = [m for name, m in sys.modules.items() if name.startswith("modelopt.") and hasattr(m, "replace_function")]
    assert len(found) >= 2
    assert all(module.replace_function is _functions.replace_function for module in found)

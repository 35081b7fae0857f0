"""A run that replaces results keeps the report and the settings of the old ones until the first is replaced."""

from __future__ import annotations

import pytest

from nemo_modelopt_cli import run_file
from nemo_modelopt_cli.compress import runner, stages
from nemo_modelopt_cli.compress.stages import Stage
from nemo_modelopt_dropin import files
from nemo_modelopt_dropin.preflight.output_checks import REPORT_FILES


def chain(steps: int, fails: str = "") -> list[Stage]:
    def stage(name: str, after: tuple[str, ...], **settings) -> Stage:
        def run(folder, records, out):
            if name == fails:
                raise KeyboardInterrupt
            return {}

        return Stage(name, run, settings, after, False)

    return [stage("prune", ()), stage("distill", ("prune",), steps=steps), stage("quantize", ("distill",))]


def go(root, steps: int, fails: str = "", redo: tuple[str, ...] = ()) -> None:
    """Run the stages as `runner.execute` does."""
    made = chain(steps, fails)
    tell = runner._renewing(lambda event, stage, record: None, made, root, {"steps": steps})
    stages.run_stages(made, root, on_event=tell, redo=redo)


def state(root) -> tuple[str, bool]:
    return run_file.read(root / run_file.NAME)["steps"], (root / "report.html").exists()


@pytest.fixture
def finished(tmp_path):
    files.own(tmp_path, files.COMPRESSION_RUN, run_file.NAME, "prune", "distill", "quantize")
    go(tmp_path, 300)
    files.own(tmp_path, files.REPORT, *REPORT_FILES)
    (tmp_path / "report.html").write_text("300 steps")
    return tmp_path


def test_nothing_is_removed_if_nothing_is_to_do(finished):
    go(finished, 300)
    assert state(finished) == ("300", True)


def test_an_interrupted_replacement_leaves_report_and_settings(finished):
    with pytest.raises(KeyboardInterrupt):
        go(finished, 400, fails="distill", redo=("distill",))
    assert state(finished) == ("300", True)
    assert stages.pending(chain(300), finished) == [], "the old settings find everything finished"
    go(finished, 400, redo=("distill",))
    assert state(finished) == ("400", False)


def test_the_first_replaced_result_makes_the_report_outdated(finished):
    with pytest.raises(KeyboardInterrupt):
        go(finished, 400, fails="quantize", redo=("distill",))
    assert state(finished) == ("400", False)


def test_a_new_run_has_its_settings_at_once(tmp_path):
    files.own(tmp_path, files.COMPRESSION_RUN, run_file.NAME, "prune", "distill", "quantize")
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, 300, fails="prune")
    assert state(tmp_path) == ("300", False)

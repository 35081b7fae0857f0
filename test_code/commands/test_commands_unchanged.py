"""Check that every command does what `data/commands.json` records: flags, plans, settings, files and exit codes.

After an intended change, ``python -m test_code.commands.record`` records the commands again; the difference of the file
shows what changes for users.
"""

from __future__ import annotations

import pytest

from test_code.commands import jobs, lines, observe, recording
from test_code.support import installed
from test_code.support.ranks import RankPool

pytestmark = pytest.mark.cpu

RECORDED = recording.read()


def _cases(by_script):
    return [
        pytest.param(script, line, id=f"{script}-{number}")
        for script, several in by_script.items()
        for number, line in enumerate(several)
    ]


ACCEPTED = _cases({script: lines.accepted(script) for script in lines.SCRIPTS})
PLANNED = _cases({script: lines.accepted(script) for script in lines.SCRIPTS if script != "demo"})
WRONG = _cases(lines.WRONG)
# Scripts whose plans need a modelopt that prunes.
PRUNING = ("prune", "compress")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Return the current folder, with everything that the command lines name."""
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    observe.inputs(tmp_path)
    return tmp_path


@pytest.mark.parametrize("script", lines.SCRIPTS)
def test_flags(script, tmp_path):
    assert observe.flags(script, tmp_path) == RECORDED["flags"][script]


@pytest.mark.parametrize("script", lines.SCRIPTS)
def test_every_flag_is_in_a_line_whose_settings_are_compared(script):
    used = {word for line in lines.accepted(script) for word in line.split()}
    assert {option for option in RECORDED["flags"][script] if not used & set(option.split())} <= lines.NO_SETTINGS


@pytest.mark.parametrize(("script", "line"), ACCEPTED)
def test_settings(script, line, here):
    assert observe.settings(script, line, here) == RECORDED["settings"][script][line]


@pytest.mark.parametrize(("script", "line"), PLANNED)
def test_plan(script, line, here):
    if script in PRUNING:
        installed.need_pruning()
    assert observe.plan(script, line, here) == RECORDED["plans"][script][line]


@pytest.mark.parametrize(("script", "line"), ACCEPTED)
def test_every_spelling_of_a_flag_means_the_same(script, line, here):
    """Aliases, and ``-`` for ``_`` and the other way round."""
    known, words = observe.options(RECORDED["flags"][script]), line.split()
    places = [place for place, word in enumerate(words) if word in known]
    assert places or not words
    for place in places:
        spellings = {other for name in known[words[place]] for other in observe.spellings(name)} - {words[place]}
        for spelling in sorted(spellings):
            other = " ".join([*words[:place], spelling, *words[place + 1 :]])
            assert observe.settings(script, other, here) == RECORDED["settings"][script][line], spelling


@pytest.mark.parametrize(("script", "line"), WRONG)
def test_exit_code_of_what_is_wrong(script, line, here):
    before = observe.files(here)
    shown = observe.run(script, line, here)
    assert shown.returncode == RECORDED["exit codes"][script][line], shown.stderr
    assert shown.stderr and observe.files(here) == before


@pytest.fixture(scope="module")
def rank(tmp_path_factory):
    """Return a rank of its own: what NeMo logs, and where to, depends on what ran before."""
    pool = RankPool(1, tmp_path_factory.mktemp("rank"))
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def work(rank, tmp_path_factory):
    """Return a folder with a tiny checkpoint and texts."""
    folder = tmp_path_factory.mktemp("commands")
    rank.run(jobs.prepare, str(folder))
    return folder


def compare(found, recorded):
    written, expected = set(found["files"]), set(recorded["files"])
    assert (sorted(expected - written), sorted(written - expected)) == ([], []), "files missing, files too many"
    assert found["run files"] == recorded["run files"]


@pytest.mark.parametrize("name", lines.RUNS)
def test_files_of_a_run(name, work, rank):
    script, _, line = lines.RUNS[name].partition(" ")
    if script in PRUNING:
        installed.need_pruning()
    before = observe.files(work)
    assert rank.run(jobs.run, script, line, str(work), timeout=300) == [0]
    compare(observe.results(work, before), RECORDED["runs"][name])


@pytest.mark.slow
@pytest.mark.parametrize("script", lines.WHOLE_JOBS)
def test_files_of_a_whole_job(script, work):
    before = observe.files(work)
    shown = observe.run(script, lines.WHOLE_JOBS[script], work, timeout=900)
    assert shown.returncode == 0, shown.stderr[-3000:]
    compare(observe.results(work, before), RECORDED["runs"][script])

"""A signal that arrives while a module is imported ends the process: the module may catch what a handler raises."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

_MODULE = """
    import os, signal
    from pathlib import Path
    try:
        os.kill(os.getpid(), signal.{name})
    except BaseException:
        pass
    Path("went_on").touch()
"""
_PROGRAM = """
    import sys
    from pathlib import Path
    from nemo_modelopt_cli.compress import runner
    from nemo_modelopt_dropin import locks

    def work(out):
        with locks.lock(Path("output")):
            print("of a library")
            import catches_everything
        out.write("finished")

    sys.exit(runner.guarded(work, Path("log.txt"), "Resume with --resume.", keep_log={keep_log}))
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.parametrize("keep_log", [True, False])
def test_a_signal_during_an_import_ends_the_process(tmp_path, name, code, keep_log):
    (tmp_path / "output").mkdir()
    (tmp_path / "catches_everything.py").write_text(textwrap.dedent(_MODULE.format(name=name)))
    (tmp_path / "program.py").write_text(textwrap.dedent(_PROGRAM.format(keep_log=keep_log)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == code, found.stderr
    assert "Resume with --resume." in found.stdout + found.stderr
    assert "finished" not in found.stdout and not (tmp_path / "went_on").exists()
    assert (tmp_path / "log.txt").exists() == keep_log
    # The lock of the output is gone with the process.
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__", "log.txt"}
    assert left == {"output", "catches_everything.py", "program.py"} and not list((tmp_path / "output").iterdir())

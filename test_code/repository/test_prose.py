"""The linter of phrases finds prose and only prose."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location(
    "check_prose", Path(__file__).resolve().parents[2] / "scripts" / "check_prose.py"
)
check_prose = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(check_prose)

PYTHON = '''"""Tell the user what happened."""
told = {"told": "a told story", "beside": 1}  # it goes on
message = f"{beside} lies beside {told}"
kept = "so many"  # prose: stock
code = "use `beside` instead"
'''
MARKDOWN = """This lies beside it.

```python
beside = "beside"
```

Call `goes on`, or go on.
"""


def _found(tmp_path, name, text):
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return [problem.removeprefix(f"{file}:").split(": write")[0] for problem in check_prose.problems(file)]


def test_python(tmp_path):
    expected = ["1: 'Tell'", "2: 'told'", "2: 'goes on'", "3: 'beside'"]
    assert _found(tmp_path, "file.py", PYTHON) == expected


def test_markdown(tmp_path):
    assert _found(tmp_path, "page.md", MARKDOWN) == ["1: 'beside'", "7: 'go on'"]


@pytest.mark.parametrize(
    "sentence",
    ["besides, it is untold_story", "refused_by(model)", "forgo one", "the term `wants`", "whereas there is"],
)
def test_other_words_are_left_alone(sentence, tmp_path):
    assert _found(tmp_path, "page.md", sentence) == []


def test_command_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "page.md").write_text("It knows.", encoding="utf-8")
    assert check_prose.main([str(tmp_path)]) == 1
    assert "page.md:1: 'knows'" in capsys.readouterr().out
    (tmp_path / "page.md").write_text("It is stored.", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["check_prose.py", str(tmp_path)])
    assert check_prose.main() == 0

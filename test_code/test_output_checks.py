"""Folders that are written: what would be lost or mixed there is refused before anything is loaded."""

from __future__ import annotations

import pytest

from nemo_modelopt_dropin import output_checks

FILES = {
    "nemo": ["context/model.yaml", "weights/metadata.json"],
    "hf": ["config.json", "model.safetensors"],
    "sharded hf": ["config.json", "model-00001-of-00002.safetensors"],
    "trtllm": ["config.json", "rank0.safetensors"],
    "notes": ["readme.txt"],
    "empty": [],
}


def _fill(folder, files):
    folder.mkdir()
    for file in files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text("")
    return folder


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("nemo", ["nemo"]), ("hf", ["hf"]), ("sharded hf", ["hf"]), ("trtllm", ["trtllm"]), ("notes", []), ("empty", [])],
)
def test_formats_are_told_by_their_files(tmp_path, kind, expected):
    assert output_checks.formats_in(_fill(tmp_path / "x", FILES[kind])) == expected


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ("model", "is --in itself, which would be overwritten"),
        ("./model/", "is --in itself"),
        ("link", "is --in itself"),
        ("model/inside", "lies inside of --in model"),
        ("file", "file is a file; give a folder"),
        ("file/below", "file is a file; give a folder"),
        ("/proc/nowhere", "cannot be written"),
        ("new/folder", None),
        (".", None),
        (None, None),
    ],
)
def test_places(tmp_path, monkeypatch, output, problem):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    found = output_checks.place_problems("--out", output, {"--in": "model", "--other": None, "--missing": "none"})
    assert (problem in " ".join(found)) if problem else found == []
    assert sorted(tmp_path.rglob("*")) == before, "a check leaves nothing"


@pytest.mark.parametrize(
    ("kind", "ours", "wanted", "problem"),
    [
        ("empty", False, "hf", None),
        ("nemo", True, "nemo", None),
        ("nemo", True, "hf", "holds a checkpoint of format nemo already"),
        ("hf", True, "trtllm", "holds a checkpoint of format hf already"),
        ("hf", False, "hf", "was not written by this command"),
        ("notes", False, "nemo", "was not written by this command"),
    ],
)
def test_contents(tmp_path, kind, ours, wanted, problem):
    folder = _fill(tmp_path / "x", FILES[kind])
    if ours:
        (folder / "run.yaml").write_text("")
    found = output_checks.content_problems("--out", str(folder), wanted)
    assert (problem in " ".join(found)) if problem else found == []
    assert output_checks.content_problems("--out", str(tmp_path / "none"), wanted) == []

"""Links between README, CONTRIBUTING, CHANGELOG and docs lead somewhere; `make docs` fails if one does not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[2]
OUTSIDE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
MKDOCS = ROOT / ".venv-docs" / "bin" / "mkdocs"


def _tokens(page: Path) -> list:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def _links(page: Path) -> list[str]:
    """Return the targets of a page's links and images."""
    spans = [child for token in _tokens(page) for child in token.children or []]
    targets = [span.attrGet("href") or span.attrGet("src") for span in spans if span.type in ("link_open", "image")]
    return [str(target) for target in targets]


def _anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and mkdocs make them."""
    tokens = _tokens(page)
    titles = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", [*OUTSIDE, *PAGES], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for link in _links(page):
        path, _, anchor = link.partition("#")
        if path.startswith(("https://", "hf://")):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


@pytest.mark.skipif(
    not MKDOCS.exists(), reason="`make docs` builds the environment of mkdocs, on Python 3.11 and later"
)
@pytest.mark.parametrize(
    ("page", "old", "new", "message"),
    [
        (None, "", "", ""),
        ("index.md", "(prune.md)", "(prun.md)", "'prun.md', but the target is not found"),
        ("quantize.md", "security.md#files", "security.md#fils", "does not contain an anchor '#fils'"),
        ("unlisted.md", "", "A page.", 'not included in the "nav" configuration'),
    ],
    ids=["sound", "link", "anchor", "nav"],
)
def test_the_site_fails_on(page, old, new, message, tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    # The reference needs the sources and has no part in this.
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump({**settings, "plugins": []}), encoding="utf-8")
    if page:
        file = tmp_path / "docs" / page
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        assert old in text
        file.write_text(text.replace(old, new) if old else new, encoding="utf-8")
    command = [MKDOCS, "build", "--strict"]
    build = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    )
    assert (build.returncode != 0) == bool(page), build.stderr
    assert message in build.stderr

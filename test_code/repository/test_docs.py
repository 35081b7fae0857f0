"""Every code block of the documentation and every example runs; `make docs` builds the site, warnings being errors."""

from __future__ import annotations

from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from test_code.support import jobs_docs

ROOT = Path(__file__).resolve().parents[2]
# "console" is a transcript: it needs a cluster, a GPU, a network or the reader's own files.
RUN, SHOWN = {"python", "bash", "yaml", "json"}, {"console", "text"}


def _blocks(page: Path) -> list[tuple[str, str, str]]:
    """Return (language, title, code) of a page's fenced blocks."""
    found = []
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "fence":
            language, _, rest = token.info.partition(" ")
            found.append((language, rest.partition('title="')[2].rstrip('"'), token.content))
    return found


PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
RUNNABLE = [page for page in PAGES if any(language in RUN for language, _, _ in _blocks(page))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_says_what_it_is(page):
    assert {language for language, _, _ in _blocks(page)} <= RUN | SHOWN


@pytest.fixture(scope="module")
def prepared(ranks_factory, tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    ranks_factory(1).run(jobs_docs.prepare, str(folder))
    return folder


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_page(page, prepared, ranks, tmp_path):
    for item in prepared.iterdir():
        (tmp_path / item.name).symlink_to(item)
    blocks = [block for block in _blocks(page) if block[0] in RUN]
    assert ranks(1).run(jobs_docs.run_page, blocks, str(tmp_path), timeout=500)[0] == [b[0] for b in blocks]


@pytest.mark.parametrize("example", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_example(example, prepared, ranks, tmp_path):
    for item in prepared.iterdir():
        (tmp_path / item.name).symlink_to(item)
    block = [("bash", "", f"python examples/{example}")]
    assert ranks(1).run(jobs_docs.run_page, block, str(tmp_path), timeout=500)[0] == ["bash"]

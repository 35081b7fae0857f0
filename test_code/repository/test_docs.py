"""Every code block of the documentation and every example runs; `make docs` builds the site, warnings being errors."""

from __future__ import annotations

import itertools
import os
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from nemo_modelopt_cli import main
from test_code.support import jobs_quant, ranks, tiny
from test_code.support.started import Server

ROOT = Path(__file__).resolve().parents[2]
# "console" is a transcript: it needs a cluster, a GPU, a network or the reader's own files.
RUN, SHOWN = {"python", "bash", "yaml", "json"}, {"console", "text"}


def prepare(folder: str) -> None:
    """Write what the pages take for granted: a NeMo checkpoint, a Hugging Face Llama, and texts."""
    import json

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    jobs_quant.make_checkpoint(f"{folder}/my_checkpoint", llama=True, steps=2)
    ranks.reset()
    torch.manual_seed(1)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 256}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=tiny.VOCABULARY, tie_word_embeddings=False, **heads, **sizes))
    llama.save_pretrained(f"{folder}/my_hf_llama")
    tiny.tokenizer().tokenizer.save_pretrained(f"{folder}/my_hf_llama")
    texts = tiny.texts(220)
    for name, rows in (("texts", texts[:160]), ("heldout", texts[160:])):
        lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        Path(folder, f"{name}.jsonl").write_text(lines, encoding="utf-8")


def run_page(blocks: list[tuple[str, str, str]], folder: str) -> list[str]:
    """Run the blocks (language, title, code) in ``folder``; return those that ran.

    Python blocks share one namespace. Our own scripts run in this process, as NeMo is imported here already; any other
    command is started.
    """
    import json

    import tomllib

    done = []
    namespace: dict = {"__name__": "__main__"}
    before = Path.cwd()
    os.chdir(folder)
    try:
        for language, title, code in blocks:
            if language in ("yaml", "json", "toml"):
                {"yaml": _yaml, "json": json.loads, "toml": tomllib.loads}[language](code)
                if title:
                    Path(title).write_text(code, encoding="utf-8")
            elif language == "python":
                exec(compile(code, title or "<block>", "exec"), namespace)
                ranks.reset()
            else:
                for command in _commands(code):
                    _run(command)
            done.append(language)
    finally:
        os.chdir(before)
    return done


def _yaml(code: str) -> None:
    import yaml

    yaml.safe_load(code)


def _commands(code: str) -> list[str]:
    lines = code.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def _run(command: str) -> None:
    words = shlex.split(command, comments=True)
    path = ROOT / words[1] if len(words) > 1 else ROOT
    if words[0] == "nemo-modelopt":
        _run_here(command, words[1:], lambda: main.run(words[1:]))
        return
    if words[0] == "python" and path.suffix == ".py" and path.is_file():
        _run_here(command, words[2:], lambda: runpy.run_path(str(path), run_name="__main__") and 0)
        return
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "LOCAL_", "WORLD_", "GROUP_", "MASTER_"))}
    plain.pop("TORCHELASTIC_RUN_ID", None)
    found = subprocess.run(words, env=plain, capture_output=True, text=True, timeout=400)
    assert found.returncode == 0, f"{command}\n{found.stdout[-3000:]}\n{found.stderr[-3000:]}"


def _is_alone(block: tuple[str, str, str]) -> bool:
    """Return whether a block's commands each need a process of their own."""
    words = {word for command in _commands(block[2]) for word in shlex.split(command, comments=True)}
    return block[0] == "bash" and bool({"--devices", "--config", "compress", "compare", "demo"} & words)


# What pip installs as the command ``nemo-modelopt``.
_ENTRY = "import sys\nfrom nemo_modelopt_cli.main import main\nif __name__ == '__main__':\n    sys.exit(main())\n"


def _run_alone(commands: Server, blocks: list[tuple[str, str, str]], folder: Path) -> list[str]:
    """Run the commands of blocks as processes of their own; return the blocks' languages."""
    entry = folder / "nemo-modelopt"
    entry.write_text(_ENTRY)
    for command in (command for _, _, code in blocks for command in _commands(code)):
        words = shlex.split(command, comments=True)
        assert words[0] in ("python", "nemo-modelopt"), command
        words[:2] = [str(ROOT / words[1])] if words[0] == "python" else [str(entry), words[1]]
        found = commands.run(words, cwd=folder, timeout=400)
        assert found.returncode == 0, f"{command}\n{found.stdout[-3000:]}\n{found.stderr[-3000:]}"
    return [language for language, _, _ in blocks]


def _run_here(command: str, arguments: list[str], run: Callable[[], int]) -> None:
    """Run a command in this process, where NeMo is imported already."""
    argv, sys.argv = sys.argv, [command.split()[0], *arguments]
    try:
        status = run()
    except SystemExit as stop:
        status = stop.code
    finally:
        sys.argv = argv
    assert not status, f"{command} ended with {status}"
    ranks.reset()


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
    ranks_factory(1).run(prepare, str(folder))
    return folder


@pytest.mark.cpu
@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_page(page, prepared, ranks, commands, tmp_path):
    for item in prepared.iterdir():
        (tmp_path / item.name).symlink_to(item)
    blocks = [block for block in _blocks(page) if block[0] in RUN]
    parts = [(alone, list(part)) for alone, part in itertools.groupby(blocks, _is_alone)]
    assert sum("python" in {language for language, _, _ in part} for _, part in parts) <= 1, "a namespace is lost"
    done = []
    for alone, part in parts:
        if alone:
            done += _run_alone(commands, part, tmp_path)
        else:
            done += ranks(1).run(run_page, part, str(tmp_path), timeout=500)[0]
    assert done == [language for language, _, _ in blocks]


@pytest.mark.parametrize("example", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_example(example, prepared, ranks, tmp_path):
    for item in prepared.iterdir():
        (tmp_path / item.name).symlink_to(item)
    block = [("bash", "", f"python examples/{example}")]
    assert ranks(1).run(run_page, block, str(tmp_path), timeout=500)[0] == ["bash"]

"""Observe a script from outside: its help, its plan, its exit code, and the files that it writes.

Only `settings` calls functions of the scripts: a run file is written after the work, so the resolved settings of a
command line that does not run have to come from them.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

from nemo_modelopt_cli import run_file
from test_code.support import command_lines

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = "FOLDER"
WIDE = "100000"
_SIZES = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 4}
_EXPERTS = {"num_moe_experts": 4, "moe_ffn_hidden_size": 32}
_CHATS = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
_LOSSES = "intermediate_layer_pairs:\n  - [decoder.final_layernorm, decoder.final_layernorm]\nskip_lm_loss: false\n"


def inputs(folder: Path) -> None:
    """Write the inputs of the command lines: checkpoints that consist of a configuration, texts and small files."""
    for name, more in (("my_checkpoint", {}), ("my_experts", _EXPERTS)):
        command_lines.checkpoint(folder / name, **{**_SIZES, **more})
    command_lines.shell(folder / "my_hybrid")
    for name in ("texts", "heldout"):
        (folder / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} {i}"}}\n' for i in range(64)))
    (folder / "losses.yaml").write_text(_LOSSES)
    (folder / "template.jinja").write_text("{{ messages }}")
    (folder / "my_chats").mkdir()
    for name in ("training", "validation"):
        (folder / "my_chats" / f"{name}.jsonl").write_text(_CHATS)
    command_lines.shell(folder / "old_topk")
    (folder / "old_topk" / "teacher_topk.json").write_text("{}")
    # Megatron's tokenized files: one document of 8 tokens in 16 bits.
    (folder / "my_corpus.bin").write_bytes(bytes(16))
    index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 1, 2) + struct.pack("<iqqq", 8, 0, 0, 1)
    (folder / "my_corpus.idx").write_bytes(index)


def command(script: str, line: str) -> list[str]:
    """Return a command line of a script as a list of words."""
    return [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *line.split()]


def run(script: str, line: str, folder: Path, timeout: float = 120) -> subprocess.CompletedProcess:
    """Run a command line in a process of its own, with ``folder`` as the current folder."""
    ranks = ("RANK", "LOCAL_", "WORLD_", "GROUP_", "MASTER_", "TORCHELASTIC")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ranks)}
    environment |= {"COLUMNS": WIDE, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(script, line), cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout
    )


# --- flags ------------------------------------------------------------------------------------------------------------


def flags(script: str, folder: Path) -> dict[str, Any]:
    """Return the options that ``--help`` lists, by their spellings: metavar or choices, and the printed default.

    Help texts are not included, nor are defaults that the help describes in words.
    """
    shown = run(script, "--help", folder)
    assert shown.returncode == 0, shown.stderr
    found = {}
    for spellings, text in _entries(shown.stdout):
        parts = [part.partition(" ") for part in spellings.split(", ")]
        values = {value for _, _, value in parts}
        assert len(values) == 1, spellings
        default = re.search(r"\(default: ([^\s()]+)\)", text)
        found[" ".join(sorted(flag for flag, _, _ in parts))] = {
            "takes": values.pop(),
            "default": default[1] if default and default[1] not in ("not", "[]") else None,
        }
    usage = shown.stdout.partition("\n\n")[0]
    for spellings, option in found.items():
        one = next(f"{flag} {option['takes']}".strip() for flag in spellings.split() if flag in _words(usage))
        assert one in usage, f"the usage does not list {one} as the options do"
    return found


def _words(usage: str) -> set[str]:
    return set(re.split(r"[\s\[\]|]+", usage))


def _entries(shown: str) -> list[tuple[str, str]]:
    """Return the spellings and the help text of each option."""
    found: list[tuple[str, str]] = []
    for line in shown.splitlines():
        start = re.match(r"  (-\S.*?)(?:  +(.*))?$", line)
        if start:
            found.append((start[1], start[2] or ""))
        elif line.startswith(" " * 24) and found:
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
    return found


def options(recorded: dict[str, Any]) -> dict[str, list[str]]:
    """Return a mapping from each spelling in the help to all spellings of that option."""
    return {name: spellings.split() for spellings in recorded for name in spellings.split()}


def spellings(flag: str) -> set[str]:
    """Return a long flag written with ``-`` and with ``_``, and a short flag unchanged."""
    if not flag.startswith("--"):
        return {flag}
    return {flag, "--" + flag[2:].replace("-", "_"), "--" + flag[2:].replace("_", "-")}


# --- plans and settings -----------------------------------------------------------------------------------------------


def plan(script: str, line: str, folder: Path) -> dict[str, Any]:
    """Return the exit code of ``--dry-run``, and the numbers and paths in its output, without the words."""
    before = files(folder)
    shown = run(script, f"{line} --dry-run", folder)
    assert files(folder) == before, "a dry run writes nothing"
    return {"exit": shown.returncode, "figures": " ".join(sorted(_figures(shown.stdout.replace(str(folder), FOLDER))))}


def _figures(text: str) -> list[str]:
    words = (word.strip(",;:()'\"").rstrip(".") for word in text.split())
    return [word for word in words if re.search(r"\d|/|\.(?:html|json|yaml|safetensors)$", word)]


def settings(script: str, line: str, folder: Path) -> Any:
    """Return the settings that the run file of a line would hold; the current folder must be ``folder``."""
    from nemo_modelopt_cli import parser

    module, words = command_lines.script_of(script), line.split()
    if script == "demo":
        arguments = module.parse(words)
        training = module.scaled(module.PRETRAINING, arguments.steps_scale)
        found = {**module.make_job(arguments).as_dict(), "pretraining": vars(training)}
    elif script == "compress":
        job, output, arguments = module.resolve(words)
        found = {"output": str(output), **job.as_dict()}
        for section, name in arguments.derived:
            del found[section][name]
    else:
        found = parser.saved_settings(module.resolve(words), module.PATHS)
    return placed(run_file.as_read(found), folder)


def placed(value: Any, folder: Path) -> Any:
    """Return settings in which a placeholder replaces the folder's path."""
    if isinstance(value, dict):
        return {name: placed(one, folder) for name, one in value.items()}
    if isinstance(value, list):
        return [placed(one, folder) for one in value]
    return value.replace(str(folder), FOLDER) if isinstance(value, str) else value


# --- files ------------------------------------------------------------------------------------------------------------

_VOLATILE = (
    (r"events\.out\.tfevents\..*", "events.out.tfevents.*"),
    (r"_loss=\d+\.\d+", "_loss=*"),
    (r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", "*"),
    (r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", "*"),
    (r"tiny-tokenizer-\d+-\d+", "tiny-tokenizer-*"),
)


def files(folder: Path) -> list[str]:
    """Return the paths of all files below a folder; parts that differ between runs are replaced."""
    found = set()
    for path in folder.rglob("*"):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            for pattern, instead in _VOLATILE:
                name = re.sub(pattern, instead, name)
            found.add(name)
    return sorted(found)


def results(folder: Path, before: list[str]) -> dict[str, Any]:
    """Return the new files in a folder, and the content of the run files among them."""
    new = sorted({*files(folder)} - {*before})
    kept = {}
    for path in sorted(folder.rglob("run.yaml")):
        name = path.relative_to(folder).as_posix()
        if name in new:
            kept[name] = placed(run_file.read(path), folder)
    return {"files": new, "run files": kept}

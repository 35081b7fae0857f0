"""Parse flags and run files, and check arguments, before anything heavy is imported. Every problem is reported.

A run file holds the flags by name (``--config run.yaml``); both go through the same conversions, and flags win.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_modelopt_cli import options, run_file
from nemo_modelopt_dropin import ranks
from nemo_modelopt_dropin.errors import did_you_mean, nearest
from nemo_modelopt_dropin.preflight import checkpoint_files, data_files, model_sizes

USAGE = 2
EXIT_CODES = "Exit codes: 0 done, 1 failed, 2 wrong arguments or settings, 130 interrupted, 143 ended by SIGTERM."
_SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
# Flags that do not describe the run itself, and the list of derived settings.
_DERIVED = "derived"
_NOT_SAVED = ("config", "dry_run", "verbose", "help", _DERIVED)
# Settings that are a path, or a name of something that is not a file.
_MAYBE_NAMES = ("calibration_dataset", "algorithm", "data_paths")


class Parser(argparse.ArgumentParser):
    """An argument parser that reports all problems at once, each with the nearest valid name.

    ``--some-flag`` and ``--some_flag`` are the same, and ``--no-switch`` takes a switch back that a run file turned on.
    """

    def __init__(self, **options):
        super().__init__(**{"allow_abbrev": False, **options})
        self.problems: list[str] = []
        self._reads_run_file = False
        # Arguments that are already reported as invalid; they are not reported as missing too.
        self.told: set[str] = set()

    @classmethod
    def of_command(cls, prog: str | None, description: str | None, fields: type) -> Parser:
        """Return a command's parser: the flags of a dataclass, and those that every command has."""
        found = cls(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        options.add(found, fields)
        found.add_run_options()
        return found

    def add_run_options(self) -> None:
        """Add the flags that every script has; ``--config`` is then read as flags are."""
        self._reads_run_file = True
        group = self.add_argument_group("run")
        group.add_argument(
            "--config", metavar="RUN.YAML", help="file with flags by name; flags on the command line win"
        )
        group.add_argument("--dry-run", action="store_true", help="check the arguments, print the plan and stop")
        group.add_argument("-v", "--verbose", action="store_true", help="show the output of the libraries")

    def parse_args(self, args: Sequence[str] | None = None, namespace=None):  # type: ignore[override]
        """Return the arguments, or exit with status 2 after naming everything that is wrong with them."""
        found = self.read(args)
        self.refuse([])
        return found

    def read(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """Return the arguments and collect their problems; `refuse` reports them with those of the caller."""
        words = [self._known_spelling(word) for word in (sys.argv[1:] if argv is None else argv)]
        self.problems += options.contradictions(self._option_string_actions, words)
        words, undone = self._undone_switches(words)
        with self._nothing_required() as required:
            found, unknown = self._parse(words, self._from_file(words))
        vars(found).update(undone)
        self.problems += self._complaints(unknown)
        unset = [a for a in required if a.dest not in self.told and getattr(found, a.dest) in (None, a.default)]
        missing = [max(action.option_strings, key=len, default=str(action.metavar)) for action in unset]
        if missing:
            self.problems.append(f"missing: {', '.join(missing)}")
        return found

    def refuse(self, problems: Iterable[str]) -> None:
        """Print all problems and exit with status 2 if there are any."""
        self.problems += problems
        if self.problems:
            self.error("")

    def error(self, message: str):
        """Print every problem and exit with status 2."""
        lines = [*dict.fromkeys(self.problems), *message.splitlines(), "see --help"]
        self.exit(USAGE, "".join(f"{self.prog}: {line}\n" for line in lines))

    def format_help(self) -> str:
        """Return the help with the default of every option that has one."""
        for action in self._actions:
            shown = action.default not in (None, argparse.SUPPRESS) and not isinstance(action.default, bool)
            if shown and action.option_strings and "default" not in (action.help or ""):
                action.help = f"{action.help or ''} (default: %(default)s)".strip()
        return super().format_help()

    # --- words --------------------------------------------------------------------------------------------------------

    def _known_spelling(self, word: str) -> str:
        """Return the flag as the parser has it, whether it was written with ``-`` or with ``_``."""
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag not in self._option_string_actions:
            for other in (flag[:2] + flag[2:].replace("-", "_"), flag[:2] + flag[2:].replace("_", "-")):
                if other in self._option_string_actions:
                    return other + equals + value
        return word

    def _undone_switches(self, words: list[str]) -> tuple[list[str], dict[str, bool]]:
        """Return the words without ``--no-switch``, and the switches that those take back."""
        kept, undone = [], {}
        for word in words:
            action = None
            if word.startswith(("--no-", "--no_")) and word not in self._option_string_actions:
                action = self._option_string_actions.get(self._known_spelling("--" + word[5:]))
            if action is not None and action.const is True:
                undone[action.dest] = False
            else:
                kept.append(word)
        return kept, undone

    def _parse(self, words: list[str], namespace: argparse.Namespace) -> tuple[argparse.Namespace, list[str]]:
        """Parse, and again without each flag that lacks its value, so that one such flag hides no other problem."""
        before = list(self.problems)
        self.exit_on_error = False
        for _ in words:
            try:
                return self.parse_known_args(words, namespace)
            except argparse.ArgumentError as error:
                flags = (error.argument_name or "").split("/")
                self.told |= {self._option_string_actions[flag].dest for flag in flags if flag}
                place = next((i for i, word in enumerate(words) if word in flags and _lacks_value(words, i)), None)
                before.append(str(error).removeprefix("argument "))
                self.problems = list(before)
                if place is None:
                    self.error("")
                words = words[:place] + words[place + 1 :]  # type: ignore[operator]
        return self.parse_known_args(words, namespace)

    @contextlib.contextmanager
    def _nothing_required(self) -> Iterator[list[argparse.Action]]:
        """Let parsing continue without required flags: what is missing is reported with the rest."""
        required = [action for action in self._actions if action.required]
        for action in required:
            action.required = False
        try:
            yield required
        finally:
            for action in required:
                action.required = True

    def _complaints(self, unknown: Sequence[str]) -> list[str]:
        """Return a sentence for each unknown flag; the words after it are taken for its values."""
        after_flag, found = False, []
        for word in unknown:
            flag = word.startswith("-")
            if flag or not after_flag:
                known = [name for action in self._actions for name in action.option_strings]
                name = word.partition("=")[0]
                found.append(f"unknown argument {word}{did_you_mean(name, known)}")
                self.told |= {self._option_string_actions[meant].dest for meant in nearest(name, known)}
            after_flag = after_flag or flag
        return found

    # --- values -------------------------------------------------------------------------------------------------------

    def _get_value(self, action, arg_string):
        try:
            found = super()._get_value(action, arg_string)
            if isinstance(found, float) and not math.isfinite(found):
                raise argparse.ArgumentError(action, f"must be a finite number, got {arg_string}")
            return found
        except argparse.ArgumentError as error:
            self.problems.append(str(error).removeprefix("argument "))
            self.told.add(action.dest)
            return action.default

    def _check_value(self, action, value):
        if action.choices is None or value in action.choices or value == action.default:
            return
        name = "/".join(action.option_strings)
        allowed = ", ".join(map(str, action.choices))
        self.told.add(action.dest)
        self.problems.append(f"{name}: {value!r} is none of {allowed}{did_you_mean(str(value), action.choices)}")

    # --- the run file -------------------------------------------------------------------------------------------------

    def _from_file(self, words: list[str]) -> argparse.Namespace:
        """Return what the file of ``--config`` sets; the problems of the file are noted."""
        found = argparse.Namespace()
        if not self._reads_run_file or {"-h", "--help"} & set(words):
            return found
        before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        before.add_argument("--config", nargs="?")
        path = before.parse_known_args(words)[0].config
        if path is None:
            return found
        try:
            content = run_file.read(path)
        except run_file.RunFileError as error:
            self.problems.append(f"--config {path}: {error}")
            return found
        for key, value in content.items():
            self._set(found, key, value, path)
        return found

    def _set(self, found: argparse.Namespace, key: str, value: Any, path: str) -> None:
        """Set one key of a run file as its flag would; None leaves the default."""
        flag = self._known_spelling("--" + key)
        action = self._option_string_actions.get(flag) or next((a for a in self._actions if a.dest == key), None)
        if action is None or action.dest in _NOT_SAVED:
            names = [a.dest for a in self._actions if a.dest not in _NOT_SAVED]
            self.problems.append(f"{path}: unknown setting {key!r}{did_you_mean(key, names)}")
        elif value is None:
            return
        elif action.nargs == 0:
            self._set_switch(found, action, key, value, path)
        elif isinstance(value, Mapping) or (isinstance(value, list) and action.nargs is None):
            self.problems.append(f"{path}: {key} takes one value, got {value}")
        else:
            values = [self._get_value(action, one) for one in (value if isinstance(value, list) else [value])]
            for one in values:
                self._check_value(action, one)
            setattr(found, action.dest, values[0] if action.nargs is None else values)

    def _set_switch(self, found: argparse.Namespace, action: argparse.Action, key: str, value: Any, path: str) -> None:
        on = _SWITCHES.get(value.lower()) if isinstance(value, str) else None
        if on is None:
            self.problems.append(f"{path}: {key} is a switch, true or false, got {value!r}")
            return
        # A pair such as --enable_x and --disable_x shares one name: that name is the setting, not the first flag.
        constant = action.const if f"--{key}" in action.option_strings or key != action.dest else True
        setattr(found, action.dest, constant if on else not constant)


def _lacks_value(words: Sequence[str], place: int) -> bool:
    return place + 1 == len(words) or words[place + 1].startswith("-")


def derive(given: argparse.Namespace, name: str, value: Any) -> None:
    """Set an argument that was not given and follows from others; run files leave it out, so that it follows again."""
    if getattr(given, name) is None:
        setattr(given, name, value)
        setattr(given, _DERIVED, [*getattr(given, _DERIVED, []), name])


def derive_stages(given: argparse.Namespace, path: str | None, stages: int) -> None:
    """Set the layers of the first and last pipeline stage from the model's depth, unless one of them was passed.

    Sets nothing if `model_checks.split_problems` reports a problem.
    """
    if not path or stages < 1 or any(getattr(given, name) for name in model_sizes.STAGES):
        return
    with contextlib.suppress(ValueError):
        for name, layers in model_sizes.unequal_stages(path, stages).items():
            derive(given, name, layers)


def saved_settings(given: argparse.Namespace, paths: Iterable[str] = ()) -> dict[str, Any]:
    """Return what a run file of these arguments holds: settings by name, paths without a working directory.

    Args:
        given: resolved arguments.
        paths: settings that are paths, or may be.
    """
    omitted = (*_NOT_SAVED, *getattr(given, _DERIVED, []))
    found = {name: value for name, value in sorted(vars(given).items()) if name not in omitted}
    return found | absolute_paths(given, [name for name in paths if name in found])


def absolute_paths(given: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Return those of the settings that are given, with paths that work from everywhere."""
    found: dict[str, Any] = {}
    for name in names:
        value = getattr(given, name)
        if isinstance(value, list):
            found[name] = [_absolute(name, one) for one in value]
        else:
            found[name] = value if value is None else _absolute(name, value)
    return found


def _absolute(name: str, value: str) -> str:
    """Return an absolute path; a name that is not an existing path stays if the setting accepts names."""
    here = os.path.exists(value) or os.path.exists(f"{value}.idx")  # Megatron's files are named without their ending
    # Of the hub, a tokenizer has the name owner/name, a data set a word.
    may_be_name = name == "tokenizer" or (name in _MAYBE_NAMES and os.sep not in value)
    return value if (may_be_name and not here) or "://" in value else os.path.abspath(value)


def missing_paths(paths: Mapping[str, str | None], folder: bool = True) -> list[str]:
    """Return a sentence for each path that is set and does not exist."""
    found = []
    for flag, path in paths.items():
        if path and not (Path(path).is_dir() if folder else Path(path).exists()):
            found.append(f"{flag} {path}: there is no such {'folder' if folder else 'file'}")
    return found


def text_problems(paths: Mapping[str, str | None]) -> list[str]:
    """Return a sentence for each file of texts that is set and cannot be read; all of its rows are checked."""
    found = missing_paths(paths, folder=False)
    for flag, path in paths.items():
        if path and Path(path).is_dir():
            found.append(f"{flag} {path} is a folder; pass one file (JSON, JSON lines, Parquet or text)")
        elif path and Path(path).exists():
            # Reading all of a large file once is enough.
            problem = data_files.problem(path, limit=None if ranks.is_first() else 1)
            found += [f"{flag}: {problem}"] if problem else []
    return found


def template_problems(paths: Mapping[str, str | None], tokenizer: str | None, column: str | None = None) -> list[str]:
    """Return a sentence for each text that holds conversations although the tokenizer has no chat template.

    Args:
        paths: flag -> text.
        tokenizer: checkpoint or folder that holds the tokenizer; None or a name on a hub are not checked.
        column: of the texts, None for the usual one.
    """
    if checkpoint_files.has_chat_template(tokenizer) is not False:
        return []
    return [
        f"{flag} {path} holds conversations, but the tokenizer in {tokenizer} has no chat template; use one that "
        "does, or rows with a column text"
        for flag, path in paths.items()
        if path and data_files.holds_chats(path, column)
    ]


def no_checkpoints(paths: Mapping[str, str | None]) -> list[str]:
    """Return a sentence for each path that is set and is not the folder of a complete NeMo 2 checkpoint."""
    found = missing_paths(paths)
    for flag, path in paths.items():
        folder = Path(path or "")
        if not path or not folder.is_dir():
            continue
        if any((folder / name).exists() for name in ("context", "io.json")):
            found += [f"{flag} {one}" for one in checkpoint_files.problems(path)]
            continue
        hint = "it has no folder context"
        last = sorted(folder.glob("checkpoints/*-last"))
        if last:
            hint += f"; did you mean {last[0]}?"
        if (folder / "config.json").is_file():
            hint = "it looks like Hugging Face's format: import it first (llm.import_ckpt)"
        found.append(f"{flag} {path} is not a NeMo 2 checkpoint: {hint}")
        found += [f"{flag} {one}" for one in checkpoint_files.problems(path)]
    return found


def tokenizer_problems(given: argparse.Namespace) -> list[str]:
    """Return what is wrong with the folder of --tokenizer."""
    return [f"--tokenizer {one}" for one in checkpoint_files.tokenizer_problems(given.tokenizer)]


def not_positive(given: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Return a sentence for each number below 1; None stands for a number that was not given."""
    values = {name: getattr(given, name) for name in names}
    return [
        f"--{name} must be at least 1, got {value}" for name, value in values.items() if value is not None and value < 1
    ]


def default_devices(num_nodes: int, *sizes: int) -> int:
    """Return the ranks of each node: those that torchrun started, else what one copy of the model needs."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    product = 1
    for size in sizes:
        product *= max(1, size)
    return -(-product // max(1, num_nodes))


def default_nodes(otherwise: int) -> int:
    """Return the nodes that torchrun started ranks on, else ``otherwise``."""
    if "LOCAL_WORLD_SIZE" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"]) // int(os.environ["LOCAL_WORLD_SIZE"])
    return otherwise


def layout_problems(devices: int, num_nodes: int, tp: int, pp: int, others: int = 1) -> list[str]:
    """Return what is wrong with a number of ranks and the sizes that they are split into."""
    if min(devices, num_nodes, tp, pp, others) < 1:
        return ["devices, nodes and parallel sizes must be at least 1"]
    started = os.environ.get("WORLD_SIZE")
    if started and "LOCAL_WORLD_SIZE" in os.environ and int(started) != devices * num_nodes:
        return [
            f"{devices} devices x {num_nodes} nodes are not the {started} ranks that were started; leave --devices and "
            "--num_nodes out"
        ]
    if devices * num_nodes % (tp * pp * others):
        return [
            f"{devices} devices x {num_nodes} nodes = {devices * num_nodes} ranks cannot be split into "
            f"tp {tp} x pp {pp}{f' x {others}' if others > 1 else ''}"
        ]
    return []


def loading_options(cpu: bool) -> dict[str, int]:
    """Return options of NeMo's data modules: on CPU ranks no loader processes, which would each import NeMo again."""
    return {"num_workers": 0} if cpu else {}

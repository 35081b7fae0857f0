"""Flags from dataclass fields: a field with a help text is a flag, a nested dataclass is a group of flags.

    @dataclass(frozen=True)
    class Layout:
        tp: int = field(default=1, metadata=option("tensor-parallel ranks", "--tp_size", "--tp"))
        cpu: bool = field(default=False, metadata=option("run on CPU ranks"))

    @dataclass(frozen=True)
    class Settings:
        model: str = field(metadata=option("checkpoint folder", path=True))
        layout: Layout = field(default_factory=Layout, metadata=group("layout"))

    add(parser, Settings)
    settings = build(Settings, parser.parse_args())

The annotation decides how a flag is read: ``bool`` is a switch, a tuple or list takes several values, and everything
else takes one value of that type; ``None`` in a union is ignored. A field without metadata has no flag.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING
from typing import Any, TypeVar

_Settings = TypeVar("_Settings")
_SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_KINDS = {int: "a whole number", float: "a number"}
# Ends the help of a flag that a file may set in place of the command line, but that must be set.
REQUIRED = "(required)"
_HELP, _GROUP, _PREFIX = "help", "group", "prefix"


def option(
    text: str,
    *spellings: str,
    off: str | None = None,
    choices: Iterable[Any] | None = None,
    metavar: str | tuple[str, ...] | None = None,
    nargs: str | int | None = None,
    convert: Callable[[str], Any] | None = None,
    path: bool = False,
    group: str | None = None,
) -> dict[str, Any]:
    """Return the metadata that makes a dataclass field a flag.

    Args:
        text: the help, as it is shown; it may be empty. The default is added unless the text mentions one.
        spellings: all names of the flag, aliases included. The first long one names the parsed argument. Default: the
            field's name.
        off: flag that sets a switch to False.
        choices: allowed values.
        metavar: name of the value in the help.
        nargs: number of values, if "+" is not right for a tuple or list.
        convert: function that reads one value, in place of the annotated type.
        path: the value is a path, or may be one (see `paths`).
        group: title of the group in the help, if it is not that of the dataclass.
    """
    return {
        _HELP: text,
        "spellings": spellings,
        "off": off,
        "choices": None if choices is None else tuple(choices),
        "metavar": metavar,
        "nargs": nargs,
        "convert": convert,
        "path": path,
        _GROUP: group,
    }


def group(title: str, prefix: str = "") -> dict[str, str]:
    """Return the metadata of a nested dataclass: the title of its group, and what its flags' names begin with."""
    return {_GROUP: title, _PREFIX: prefix}


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag of a dataclass.

    Args:
        place: names of the fields that lead to the value, outermost first.
        spellings: all names of the flag.
        kind: type of one value.
        several: whether the flag takes several values.
        default: the field's default; ``dataclasses.MISSING`` if it has none.
        group: title of its group in the help, None for the parser's own.
        details: the field's metadata.
    """

    place: tuple[str, ...]
    spellings: tuple[str, ...]
    kind: Any
    several: bool
    default: Any
    group: str | None
    details: Mapping[str, Any]

    @property
    def dest(self) -> str:
        """The name of the parsed argument."""
        long = next((name for name in self.spellings if name.startswith("--")), self.spellings[0])
        return long.lstrip("-").replace("-", "_")


def flags(cls: type, separator: str = "_", title: str | None = None, prefix: str = "") -> list[Flag]:
    """Return the flags of a dataclass and of those nested in it, in the order of the fields.

    Args:
        cls: the dataclass.
        separator: what joins the words of names that are made from fields' names.
        title: group of the flags that are not nested.
        prefix: what their names begin with.
    """
    hints: dict[str, Any] = typing.get_type_hints(cls)
    found = []
    for field in dataclasses.fields(cls):
        details, hint = field.metadata, hints[field.name]
        if is_settings(hint):
            inner = flags(hint, separator, details.get(_GROUP) or title, prefix + details.get(_PREFIX, ""))
            found += [dataclasses.replace(flag, place=(field.name, *flag.place)) for flag in inner]
        elif _HELP in details:
            name = f"--{prefix}{field.name}".replace("_", separator)
            kind, several = one_value(hint)
            found.append(
                Flag(
                    place=(field.name,),
                    spellings=details["spellings"] or (name,),
                    kind=kind,
                    several=several,
                    default=field.default if field.default_factory is MISSING else field.default_factory(),
                    group=details[_GROUP] or title,
                    details=details,
                )
            )
    return found


def is_settings(hint: Any) -> typing.TypeGuard[type[Any]]:
    """Return whether an annotation is a dataclass."""
    return dataclasses.is_dataclass(hint)


def one_value(hint: Any) -> tuple[Any, bool]:
    """Return the type of one value of an annotation, and whether the annotation is of a tuple or list of them."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return one_value(next(kind for kind in typing.get_args(hint) if kind is not type(None)))
    if typing.get_origin(hint) in (tuple, list):
        return one_value(typing.get_args(hint)[0])[0], True
    return hint, False


def may_be_none(hint: Any) -> bool:
    """Return whether None is a value of an annotation."""
    return type(None) in typing.get_args(hint)


def converted(value: Any, hint: Any) -> Any:
    """Return a value, mostly a text from a file, as its annotation has it; None stays None.

    Raises:
        ValueError: if it cannot be read as such a value; the message continues the name of a setting.
    """
    if value is None:
        return None
    kind, several = one_value(hint)
    if several:
        return tuple(_one(item, kind) for item in (value if isinstance(value, (list, tuple)) else [value]))
    return _one(value, kind)


def _one(value: Any, kind: type) -> Any:
    if kind is bool:
        switch = _SWITCHES.get(str(value).lower())
        if switch is None:
            raise ValueError("must be true or false")
        return switch
    if isinstance(value, (list, tuple, Mapping)):
        raise ValueError("takes one value")
    try:
        found = kind(str(value))
    except ValueError:
        raise ValueError(f"must be {_KINDS[kind]}") from None
    if isinstance(found, float) and not math.isfinite(found):
        raise ValueError("must be a finite number")
    return found


def add(
    parser: argparse.ArgumentParser,
    cls: type,
    separator: str = "_",
    title: str | None = None,
    unset: bool = False,
) -> None:
    """Add the flags of a dataclass to a parser, in groups; a group that exists is extended.

    Args:
        parser: the command line.
        cls: the dataclass.
        separator: what joins the words of flags that are named after fields.
        title: group of the flags that are not nested.
        unset: parse a flag that is not on the command line as None, so that a file can set it. The help still shows the
            default of the field, and no flag is required.
    """
    groups: dict[str | None, argparse._ActionsContainer] = {known.title: known for known in parser._action_groups}
    groups[None] = parser
    known_flags = flags(cls, separator, title)
    # A flag that is shown with another dataclass's flags must not decide where their group comes.
    for flag in sorted(known_flags, key=lambda flag: flag.details[_GROUP] is not None):
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
    for flag in known_flags:
        _add(groups[flag.group], flag, unset)


def _add(target: argparse._ActionsContainer, flag: Flag, unset: bool) -> None:
    required = flag.default is MISSING and not unset
    default = None if unset or required else flag.default
    details: Mapping[str, Any] = flag.details
    common: dict[str, Any] = {"dest": flag.dest, "default": default, "required": required}
    if flag.kind is bool:
        target.add_argument(*flag.spellings, **common, action="store_true", help=_help(flag, unset))
        if details["off"]:
            text = f"the opposite of {flag.spellings[0]}"
            target.add_argument(details["off"], **common, action="store_false", help=text)
        return
    more: dict[str, Any] = {name: details[name] for name in ("choices", "metavar")}
    more["nargs"] = details["nargs"] or ("+" if flag.several else None)
    more["type"] = details["convert"] or (None if flag.kind is str else flag.kind)
    target.add_argument(*flag.spellings, **common, **more, help=_help(flag, unset))


def _help(flag: Flag, unset: bool) -> str:
    """Return the help as argparse formats it; the parser adds the defaults that it has itself."""
    text, default = flag.details[_HELP].replace("%", "%%"), flag.default
    if unset and default is MISSING:
        return f"{text} {REQUIRED}"  # the parser does not mark it as required, because a file may set it
    hidden = default in (None, MISSING, ()) or isinstance(default, bool) or "default" in text
    if not unset or hidden:
        return text
    values = default if flag.several else (default,)
    shown = " ".join(f"{value:g}" if isinstance(value, (int, float)) else str(value) for value in values)
    return f"{text} (default: {shown})".strip()


def given(cls: type, namespace: argparse.Namespace) -> dict[str, Any]:
    """Return the parsed values that are not None, nested as the dataclasses are."""
    found: dict[str, Any] = {}
    for flag in flags(cls):
        value = getattr(namespace, flag.dest)
        if value is not None:
            inner = found
            for name in flag.place[:-1]:
                inner = inner.setdefault(name, {})
            inner[flag.place[-1]] = value
    return found


def build(cls: type[_Settings], namespace: argparse.Namespace) -> _Settings:
    """Return the dataclass of parsed arguments; an argument that is None leaves the field's default."""
    return _built(cls, given(cls, namespace))


def _built(cls: type[_Settings], values: Mapping[str, Any]) -> _Settings:
    hints: dict[str, Any] = typing.get_type_hints(cls)
    found = {}
    for name, value in values.items():
        if is_settings(hints[name]):
            found[name] = _built(hints[name], value)
        else:
            as_tuple = isinstance(value, list) and tuple in _containers(hints[name])
            found[name] = tuple(value) if as_tuple else value
    return cls(**found)


def _containers(hint: Any) -> list[Any]:
    """Return the origins of an annotation and of the members of its union."""
    return [typing.get_origin(kind) for kind in (hint, *typing.get_args(hint))]


def dests(cls: type) -> tuple[str, ...]:
    """Return the names of the parsed arguments of a dataclass."""
    return tuple(flag.dest for flag in flags(cls))


def paths(cls: type) -> tuple[str, ...]:
    """Return the names of the parsed arguments that are paths, or may be."""
    return tuple(flag.dest for flag in flags(cls) if flag.details["path"])


def contradictions(actions: Mapping[str, argparse.Action], words: Iterable[str]) -> list[str]:
    """Return a sentence for each pair of flags on a command line that turn one switch both on and off.

    Args:
        actions: the parser's actions by flag.
        words: the command line.
    """
    used: dict[str, dict[bool, str]] = {}
    for word in words:
        if word in actions and isinstance(actions[word].const, bool):
            used.setdefault(actions[word].dest, {})[actions[word].const] = word
    pairs = [list(both.values()) for both in used.values() if len(both) == 2]
    return [f"{one} and {other} contradict each other; use one of them" for one, other in pairs]

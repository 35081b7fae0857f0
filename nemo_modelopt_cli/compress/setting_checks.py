"""Checks that the settings of the compression job share, and reading settings from nested dictionaries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_type_hints

from nemo_modelopt_cli.options import converted, is_settings, may_be_none
from nemo_modelopt_dropin.errors import ModelOptConfigError, did_you_mean

_Settings = TypeVar("_Settings")


class SettingsError(ModelOptConfigError):
    """Settings that cannot work; the message lists every problem found."""


def raise_all(problems: list[str]) -> None:
    """Raise one error that lists every problem, if there are any.

    Raises:
        SettingsError: with one line per problem.
    """
    if problems:
        raise SettingsError("\n".join(problems))


def unknown(what: str, values: Iterable[str], allowed: Iterable[str]) -> list[str]:
    """Return a sentence for each value that is not allowed, with the nearest name."""
    allowed = list(allowed)
    found = []
    for value in values:
        if value not in allowed:
            hint = did_you_mean(value, allowed)
            found.append(f"unknown {what} {value!r}; allowed: {', '.join(allowed)}{hint}")
    return found


def from_dict(cls: type[_Settings], content: Mapping[str, Any], where: str = "") -> _Settings:
    """Build a settings dataclass from nested dictionaries; texts get the type of their setting, as flags do.

    Raises:
        SettingsError: listing unknown names, each with the nearest one, and values that do not fit.
    """
    hints: dict[str, Any] = get_type_hints(cls)
    problems = unknown(f"setting{f' in {where}' if where else ''}", content, hints)
    values = {}
    for name, value in content.items():
        hint = hints.get(name)
        try:
            if hint is None:
                continue  # reported as unknown
            if not is_settings(hint):
                values[name] = converted(value, hint)
            elif isinstance(value, Mapping):
                values[name] = from_dict(hint, value, name)
            elif isinstance(value, hint):
                values[name] = value
            else:
                problems.append(f"{name} must hold settings by name, got {value!r}")
        except SettingsError as error:
            problems += str(error).splitlines()
        except ValueError as error:
            problems.append(f"{where + ': ' if where else ''}{name} {error}, got {value!r}")
    raise_all(problems)
    # None is a value only if the setting may be None; else it stands for the default.
    return cls(**{name: value for name, value in values.items() if value is not None or may_be_none(hints[name])})


def positive(settings: Any, names: Iterable[str], where: str = "") -> list[str]:
    """Return a sentence for each setting that is not above zero."""
    prefix = f"{where}: " if where else ""
    return [
        f"{prefix}{name} must be positive, got {getattr(settings, name)}"
        for name in names
        if not getattr(settings, name) > 0
    ]

"""The one error type for what a user can put right."""

from nemo_modelopt_dropin.errors import ModelOptConfigError

__all__ = ["ModelOptConfigError", "one_of"]


def one_of(name: str, value: object, allowed) -> None:
    """Raise unless ``value`` is among ``allowed``, suggesting the nearest name.

    Raises:
        ModelOptConfigError: naming the setting, the value, the allowed values and the nearest one.
    """
    import difflib

    allowed = list(allowed)
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), [str(a) for a in allowed], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ModelOptConfigError(f"{name}={value!r} is not supported; allowed: {allowed}.{hint}")


class MissingFileError(ModelOptConfigError, FileNotFoundError):
    """A file of settings that is not there; stock raised ``FileNotFoundError``."""


class UnknownSettingError(ModelOptConfigError, TypeError):
    """A setting that does not exist; stock raised ``TypeError``."""

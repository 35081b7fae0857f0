"""Error types of the subpackage; `ModelOptConfigError` marks everything that a user can correct."""

from nemo_modelopt_dropin.errors import ModelOptConfigError, one_of

__all__ = ["MissingFileError", "ModelOptConfigError", "UnknownSettingError", "one_of"]


class MissingFileError(ModelOptConfigError, FileNotFoundError):
    """A missing file of settings; stock raised ``FileNotFoundError``."""


class UnknownSettingError(ModelOptConfigError, TypeError):
    """A setting that does not exist; stock raised ``TypeError``."""

"""Check a quant_cfg that a user wrote by modelopt's definitions of its fields, before a model is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from modelopt.torch.quantization import config as definitions
from nemo_modelopt_dropin.errors import suggestion

from ..errors import ModelOptConfigError
from .quant_cfg_entries import FIELDS, is_by_class

_TOP = ("quant_cfg", "algorithm")


def check(quant_cfg: Mapping[str, Any], where: str) -> None:
    """Check that modelopt has all fields of a quant_cfg and accepts their values.

    Args:
        quant_cfg: A dictionary with "quant_cfg" (see `quant_cfg_entries`) and optionally "algorithm".
        where: The name of the quant_cfg in error messages.

    Raises:
        ModelOptConfigError: With the pattern and the field.
    """
    _check_names(quant_cfg, _TOP, where)
    for path, attributes in _quantizers(quant_cfg["quant_cfg"], where):
        _check_model(definitions.QuantizerAttributeConfig, attributes, path)
    algorithms = quant_cfg.get("algorithm")
    for algorithm in algorithms if isinstance(algorithms, list) else [algorithms]:
        _check_algorithm(algorithm, where)


def _quantizers(settings: Any, where: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the attributes of every quantizer, each with its location for error messages."""
    if isinstance(settings, list):
        for number, entry in enumerate(settings):
            yield from _listed(entry, f"{where}: entry {number}")
        return
    for pattern, value in settings.items():
        path = f"{where}: {pattern!r}"
        if is_by_class(value):
            yield from _quantizers(value, path)
        else:
            yield from _steps(value, path)


def _listed(entry: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the attributes in an entry of a list, after a check of its other fields."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("quantizer_name"), str):
        raise ModelOptConfigError(
            f'{path} is {entry!r}; expected an object such as {{"quantizer_name": "*weight_quantizer", "cfg": '
            '{"num_bits": 8, "axis": 0}} or {"quantizer_name": "*", "enable": false}.'
        )
    path = f"{path} ({entry['quantizer_name']!r})"
    _check_names(entry, FIELDS, path)
    enable, module_class, attributes = (entry.get(name) for name in ("enable", "parent_class", "cfg"))
    if enable is not None and not isinstance(enable, bool):
        raise ModelOptConfigError(f'{path}: "enable" is {enable!r}; expected true or false.')
    if module_class is not None and not isinstance(module_class, str):
        raise ModelOptConfigError(f'{path}: "parent_class" is {module_class!r}; expected a name such as "nn.Linear".')
    if not attributes and enable is None:
        raise ModelOptConfigError(f'{path} sets nothing: "cfg" is {attributes!r} and "enable" is not set.')
    if attributes is not None:
        yield from _steps(attributes, path)


def _steps(value: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for attributes in value if isinstance(value, list) else [value]:
        if not isinstance(attributes, Mapping):
            raise ModelOptConfigError(
                f"{path} is {attributes!r}; expected attributes of a quantizer, such as "
                '{"num_bits": 8, "axis": 0} or {"enable": false}.'
            )
        yield path, attributes


def _check_algorithm(algorithm: Any, where: str) -> None:
    methods = {
        kind.model_fields["method"].default: kind for kind in _with_subclasses(definitions.QuantizeAlgorithmConfig)
    }
    method = algorithm.get("method") if isinstance(algorithm, Mapping) else algorithm
    if isinstance(algorithm, Mapping) and "method" not in algorithm:
        raise ModelOptConfigError(f'{where}: "algorithm" has no "method"; its fields are {sorted(algorithm)}.')
    if method is not None and method not in methods:
        names = sorted(name for name in methods if name)
        hint = suggestion(method, names)
        raise ModelOptConfigError(f'{where}: unknown "algorithm" {method!r}; allowed: {names}.{hint}')
    if isinstance(algorithm, Mapping):
        _check_model(methods[method], algorithm, f'{where}: "algorithm"')


def _with_subclasses(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield kind
    for one in kind.__subclasses__():
        yield from _with_subclasses(one)


def _check_model(kind: type[BaseModel], values: Mapping[str, Any], where: str) -> None:
    _check_names(values, kind.model_fields, where)
    try:
        kind(**values)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"][:1])) or "its fields"
        raise ModelOptConfigError(f"{where}: {field}={values.get(field)!r} is not valid: {first['msg']}.") from None


def _check_names(values: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    names = list(known)
    for name in values:
        if name not in names:
            raise ModelOptConfigError(f"{where}: unknown field {name!r}; allowed: {names}.{suggestion(name, names)}")

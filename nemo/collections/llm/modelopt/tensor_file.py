"""Nested Python values with tensors in one safetensors file: reading it runs no code, unlike a pickle.

The structure is JSON, kept as the bytes of a tensor of its own. Values that JSON does not have (tuples, dictionaries
with other keys than texts, dtypes, slices, tensors) are written as a dictionary with one reserved key, so that what is
read equals what was written, types included.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nemo_modelopt_dropin import files

from .errors import ModelOptConfigError

SUFFIX = ".safetensors"
_STRUCTURE = "structure"
_TUPLE, _ITEMS, _DTYPE, _TENSOR = "__tuple__", "__items__", "__dtype__", "__tensor__"
_SLICE, _ELLIPSIS = "__slice__", "__ellipsis__"  # of quantizers in blocks
_TAGS = (_TUPLE, _ITEMS, _DTYPE, _TENSOR, _SLICE, _ELLIPSIS)
# How files of torch.save begin, as archives and in the format before those.
_PICKLES = (b"PK\x03\x04", b"\x80")
# Bytes before the header of a safetensors file, which is a JSON object.
_HEADER = 8


def save(path: Path, content: Any) -> None:
    """Write a value in one step, with the permissions of the user's other files.

    Args:
        path: The file.
        content: None, booleans, numbers, texts, tensors, dtypes, slices, and lists, tuples and dictionaries of these.

    Raises:
        TypeError: If there is something else in it.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_encoded(content, tensors))
    tensors[_STRUCTURE] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    with files.replacing(path) as beside:
        beside.touch()
        mode = beside.stat().st_mode
        save_file(tensors, str(beside))
        beside.chmod(mode)  # safetensors creates files with mode 0600


def load(path: Path, device: torch.device | str = "cpu") -> Any:
    """Return what `save` wrote.

    Args:
        path: The file.
        device: Where the tensors are wanted.

    Raises:
        ModelOptConfigError: If the file is a pickle or not one of `save`; the message starts with its name.
    """
    from safetensors.torch import load_file

    with open(path, "rb") as file:
        head = file.read(_HEADER + 1)
    # A safetensors file begins with the length of its header, whose first byte can be that of a pickle.
    if head.startswith(_PICKLES) and head[_HEADER:] != b"{":
        raise ModelOptConfigError(
            f"{path.name} is a pickle (a file of torch.save), as earlier versions wrote: reading it can run any code, "
            "so it is not read; delete it."
        )
    try:
        tensors = load_file(str(path), device=str(device))
        structure = tensors.pop(_STRUCTURE).cpu().numpy().tobytes()
        return _decoded(json.loads(structure), tensors)
    except Exception as error:
        # Of safetensors, JSON and the tags: whatever a damaged file leads to.
        raise ModelOptConfigError(f"{path.name} cannot be read ({type(error).__name__}: {error}).") from error


def _encoded(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, torch.Tensor):
        name = f"tensor{len(tensors)}"
        # A copy of its own: safetensors raises an error for tensors that share memory.
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {_TENSOR: name}
    if isinstance(value, torch.dtype):
        return {_DTYPE: str(value).removeprefix("torch.")}
    if isinstance(value, slice):
        return {_SLICE: [_encoded(one, tensors) for one in (value.start, value.stop, value.step)]}
    if value is ...:
        return {_ELLIPSIS: None}
    if isinstance(value, list):
        return [_encoded(one, tensors) for one in value]
    if isinstance(value, tuple):
        return {_TUPLE: [_encoded(one, tensors) for one in value]}
    if isinstance(value, dict):
        if all(type(key) is str and key not in _TAGS for key in value):
            return {key: _encoded(one, tensors) for key, one in value.items()}
        return {_ITEMS: [[_encoded(key, tensors), _encoded(one, tensors)] for key, one in value.items()]}
    if isinstance(value, np.generic):
        return _encoded(value.item(), tensors)
    for plain, convert in ((str, str.__str__), (int, int), (float, float)):
        if isinstance(value, plain):  # an enumeration, for one
            return convert(value)
    raise TypeError(f"a {type(value).__name__} cannot be stored without a pickle")


def _decoded(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1 and (tag := next(iter(value))) in _TAGS:
        return _tagged(tag, value[tag], tensors)
    return {key: _decoded(one, tensors) for key, one in value.items()}


def _tagged(tag: str, inner: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return a value that JSON does not have."""
    if tag == _TENSOR:
        return tensors[inner]
    if tag == _ELLIPSIS:
        return ...
    if tag == _ITEMS:
        return {_decoded(key, tensors): _decoded(one, tensors) for key, one in inner}
    if tag == _DTYPE:
        found = getattr(torch, inner)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"{inner} is not a dtype")
        return found
    parts = [_decoded(one, tensors) for one in inner]
    return slice(*parts) if tag == _SLICE else tuple(parts)

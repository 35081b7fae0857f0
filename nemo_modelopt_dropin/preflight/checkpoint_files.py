"""Check that the files of a checkpoint are present and complete, before anything heavy is imported.

Nothing named in a pickle is imported or called: ``.metadata`` of torch's distributed checkpoints is read into plain
data. Unrecognised forms pass (older formats, adapters, weights without a context): NeMo checks them.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_modelopt_dropin.preflight import families

# Number of missing files that are listed.
_SHOWN = 3
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "*.model")
# Arguments of NeMo's tokenizers that are files or folders.
_ARTIFACTS = ("pretrained_model_name", "model_path", "vocab_file", "merges_file")
# A safetensors file begins with the length of its header.
_LENGTH = struct.Struct("<Q")
_MOST_HEADER = 100_000_000
_HF_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")


def problems(path: str | Path) -> list[str]:
    """Return what is missing or broken in a NeMo 2 checkpoint or a Hugging Face folder; [] for any other folder.

    Args:
        path: The folder.
    """
    folder = Path(path)
    if (folder / "context").is_dir() or (folder / "io.json").is_file():
        found = _context_problems(folder / "context" if (folder / "context").is_dir() else folder)
        return [f"{path}: {one}" for one in found + _weight_problems(folder)]
    if (folder / "config.json").is_file():
        return [f"{path}: {one}" for one in _hf_problems(folder)]
    return []


def tokenizer_problems(name: str | None) -> list[str]:
    """Return what is wrong with a tokenizer's folder; [] for None and for a name that may be on a hub.

    Args:
        name: A folder, or owner/name.
    """
    folder = Path(name or "")
    if not name or folder.is_file():
        return []
    if not folder.is_dir():
        is_path = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1
        return [f"{name}: there is no such folder"] if is_path else []
    places = [folder, *(one for one in folder.rglob("*") if one.is_dir())]
    if any(any(place.glob(pattern)) for place in places for pattern in _TOKENIZER_FILES):
        return [one for file in sorted(folder.glob("tokenizer*.json")) for one in _json_object(file)[1]]
    return [f"{name} holds no tokenizer: none of {', '.join(_TOKENIZER_FILES[:3])}"]


def has_chat_template(path: str | Path | None) -> bool | None:
    """Return whether the tokenizer in a checkpoint or a folder has a chat template, None if it cannot be determined.

    Args:
        path: The folder; None for none.
    """
    folder = Path(path or "")
    if not path or not folder.is_dir():
        return None
    context = folder / "context"
    found = list((context if context.is_dir() else folder).rglob("tokenizer_config.json"))
    if len(found) != 1:
        return None
    content, _ = _json_object(found[0])
    beside = any(found[0].parent.glob("chat_template*")) or (found[0].parent / "additional_chat_templates").is_dir()
    return bool(content.get("chat_template")) or beside


# --- NeMo -------------------------------------------------------------------------------------------------------------


def _context_problems(context: Path) -> list[str]:
    """Return what is wrong with the description of the model: ``model.yaml``, ``io.json`` and the tokenizer's files."""
    found = []
    described, wrong = _json_object(context / "io.json")
    found += wrong
    if (context / "model.yaml").is_file():
        found += _yaml_problems(context / "model.yaml")
    return found + _artifact_problems(context, described)


def _yaml_problems(file: Path) -> list[str]:
    import yaml

    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, yaml.YAMLError) as error:
        return [f"{_name(file)} cannot be read: {' '.join(str(error).split())}"]
    # A missing file is not an error, but an empty or truncated one indicates an interrupted copy.
    if node is None or node.id != "mapping":
        return [f"{_name(file)} does not describe a model"]
    problem = families.kind_problem(next((value.value for key, value in node.value if key.value == "_target_"), None))
    return [problem] if problem else []


def _artifact_problems(context: Path, described: Mapping[str, Any]) -> list[str]:
    """Return the files of a tokenizer that the context names but that are missing or broken."""
    found = [
        f"the tokenizer {context.name}/{name} is missing"
        for name in _artifacts(described)
        if not (context / name).exists()
    ]
    for folder in [one for one in context.iterdir() if one.is_dir() and "tokenizer" in one.name]:
        if not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
            found.append(f"{_name(folder)} holds no tokenizer: none of {', '.join(_TOKENIZER_FILES[:3])}")
        for file in sorted(folder.glob("tokenizer*.json")):
            found += _json_object(file)[1]
    return found


def _artifacts(described: Mapping[str, Any]) -> list[str]:
    """Return the names of the tokenizer's files and folders that NeMo copied next to ``io.json``.

    NeMo stores them as texts and names on a hub as objects; in older versions a text may also be owner/name.
    """
    objects = described.get("objects")
    found = []
    for one in objects.values() if isinstance(objects, dict) else ():
        for key, leaf in one.get("items", ()) if isinstance(one, dict) else ():
            if not isinstance(leaf, dict) or not any(f"'{name}'" in str(key) for name in _ARTIFACTS):
                continue
            name, paths = leaf.get("value"), str(leaf.get("paths"))
            if isinstance(name, str) and name and "tokenizer" in paths and "/" not in name:
                found.append(name)
    return list(dict.fromkeys(found))


def _weight_problems(folder: Path) -> list[str]:
    """Return what is wrong with the weights of a distributed checkpoint."""
    weights = folder / "weights"
    if not weights.is_dir():
        # Older checkpoints have the weights next to the context.
        if (folder / "metadata.json").is_file() or any(folder.glob("*.distcp")):
            weights = folder
        else:
            return ["the folder weights is missing"]
    if not any(weights.iterdir()):
        return ["the folder weights is empty"]
    about, found = _json_object(weights / "metadata.json")
    backend = about.get("sharded_backend")
    sharded = backend == "torch_dist" or (weights / ".metadata").exists() or any(weights.glob("*.distcp"))
    if found or not sharded or backend not in (None, "torch_dist"):
        return found
    if about.get("common_backend") == "torch" and not (weights / "common.pt").is_file():
        found.append(f"{_name(weights / 'common.pt')} is missing")
    return found + _shard_problems(weights)


def _shard_problems(weights: Path) -> list[str]:
    """Return the files of shards that are missing or shorter than ``.metadata`` requires."""
    file = weights / ".metadata"
    if not file.is_file():
        return [f"{_name(file)} is missing"]
    try:
        with open(file, "rb") as stream:
            needed = _bytes_needed(_PlainUnpickler(stream).load())
    except OSError as error:
        return [f"{_name(file)} cannot be read: {error.strerror or error}"]
    except Exception as error:  # a broken pickle can raise any error
        return [f"{_name(file)} is broken: {type(error).__name__}: {error}"]
    missing = [name for name in sorted(needed) if not (weights / name).is_file()]
    sizes = {name: (weights / name).stat().st_size for name in sorted(needed) if name not in missing}
    short = [
        f"{_name(weights / name)} is cut off: it has {size:,} of {needed[name]:,} bytes"
        for name, size in sizes.items()
        if size < needed[name]
    ]
    return _listed(missing, "weights") + short


class _Plain:
    """A stand-in for any object of a pickle: it stores the state of the object and runs nothing."""

    def __new__(cls, *_, **__):
        return object.__new__(cls)

    def __init__(self, *_, **__):
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Accept an item of a dictionary of another class."""

    def append(self, value: Any) -> None:
        """Accept an item of a list of another class."""

    def extend(self, values: Iterable[Any]) -> None:
        """Accept items of a list of another class."""


class _PlainUnpickler(pickle.Unpickler):
    """Read a pickle without importing or calling anything that it names."""

    def find_class(self, module: str, name: str) -> type[_Plain]:
        return type(name, (_Plain,), {})

    def persistent_load(self, pid: Any) -> None:
        return None


def _bytes_needed(metadata: Any) -> dict[str, int]:
    """Return the bytes that each file must have, from torch's ``Metadata``; {} if its form is unknown."""
    storage = _fields(metadata).get("storage_data")
    found: dict[str, int] = {}
    for info in storage.values() if isinstance(storage, dict) else ():
        place = _fields(info)
        name, offset, length = (place.get(key) for key in ("relative_path", "offset", "length"))
        if isinstance(name, str) and isinstance(offset, int) and isinstance(length, int):
            found[name] = max(found.get(name, 0), offset + length)
    return found


def _fields(value: Any) -> Mapping[str, Any]:
    state = getattr(value, "state", None)
    if isinstance(state, tuple):  # a class with slots
        state = next((part for part in reversed(state) if isinstance(part, dict)), None)
    return state if isinstance(state, dict) else {}


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def _hf_problems(folder: Path) -> list[str]:
    """Return what is wrong with a folder of transformers' files."""
    found = _json_object(folder / "config.json")[1]
    for file in sorted(folder.glob("tokenizer*.json")):
        found += _json_object(file)[1]
    for index in sorted(folder.glob("*.index.json")):
        content, wrong = _json_object(index)
        shards = content.get("weight_map")
        names = sorted({str(name) for name in shards.values()}) if isinstance(shards, dict) else []
        found += wrong or _listed([name for name in names if not (folder / name).is_file()], index.name)
    for file in sorted(folder.glob("*.safetensors")):
        found += _safetensors_problems(file)
    if not found and not any(any(folder.glob(pattern)) for pattern in _HF_WEIGHTS):
        found.append("there are no weights, neither *.safetensors nor *.bin")
    return found


def _safetensors_problems(file: Path) -> list[str]:
    """Return what is wrong with a safetensors file, according to its header and size."""
    size = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            (length,) = _LENGTH.unpack(stream.read(_LENGTH.size))
            if length > min(size, _MOST_HEADER):
                return [f"{file.name} is broken: its header does not fit into {size:,} bytes"]
            header = json.loads(stream.read(length))
        ends = [one["data_offsets"][1] for name, one in header.items() if name != "__metadata__"]
    except OSError as error:
        return [f"{file.name} cannot be read: {error.strerror or error}"]
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return [f"{file.name} is broken: its header cannot be read"]
    needed = _LENGTH.size + length + max(ends, default=0)
    return [f"{file.name} is cut off: it has {size:,} of {needed:,} bytes"] if size < needed else []


# --- both -------------------------------------------------------------------------------------------------------------


def _json_object(file: Path) -> tuple[dict[str, Any], list[str]]:
    """Return a file's JSON object, and what is wrong with the file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, [f"{_name(file)} is missing"]
    except OSError as error:
        return {}, [f"{_name(file)} cannot be read: {error.strerror or error}"]
    except ValueError as error:
        return {}, [f"{_name(file)} is not valid JSON: {error}"]
    return (content, []) if isinstance(content, dict) else ({}, [f"{_name(file)} holds no JSON object"])


def _listed(missing: list[str], where: str) -> list[str]:
    if not missing:
        return []
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    return [f"{', '.join(missing[:_SHOWN])}{more} missing, named by {where}"]


def _name(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"

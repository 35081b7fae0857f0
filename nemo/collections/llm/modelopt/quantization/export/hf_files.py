"""Read the files of a written Hugging Face checkpoint, and check their names, shapes, dtypes and values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nemo_modelopt_dropin.console import screen

from ..._staging import ExportError
from . import hf_kv_cache, hf_stored
from .layouts import modelopt

# Values that are converted to fp32 at a time.
_VALUES = 2**22
SCALES = (
    "weight_scale",
    "weight_scale_2",
    "input_scale",
    "pre_quant_scale",
    "weight_global_scale",
    "input_global_scale",
    "k_scale",
    "v_scale",
    "weight_scale_inv",
)


def verify(folder: Path) -> None:
    """Read a Hugging Face checkpoint and check the shape, dtype and values of each tensor and scale.

    Raises:
        ExportError: With a list of the problems.
    """
    tensors = dict(read_tensors(folder))
    formats = hf_stored.formats(folder)
    has_rows = formats.layout is not None and formats.layout.NAME == modelopt.NAME
    if formats.layout is not None and not has_rows:
        tensors = _unpacked(tensors, formats)
    values = screen.bar(tensors.items(), desc="Check of the values", unit="tensor", delay=5.0)
    problems = [problem for name, value in values if (problem := _value_problem(name, value))]
    expected = expected_shapes(folder)
    for name, shape in expected.items():
        if name not in tensors:
            problems.append(f"{name} is missing")
        elif _logical_shape(tensors[name]) not in (list(shape), None):
            problems.append(f"{name} has shape {list(tensors[name].shape)}, not {list(shape)}")
        problems += _scale_problems(name, tensors, has_rows)
    if expected:
        problems += [f"{name} is unexpected" for name in tensors if name not in expected and not is_scale(name)]
    problems += [f"{name} belongs to no weight" for name in tensors if _is_orphan(name, tensors)]
    layout = formats.layout or modelopt
    problems += hf_kv_cache.scale_problems(kv_cache_of(folder), set(tensors), set(expected), layout)
    if problems:
        raise ExportError(f"The checkpoint that was written is wrong: {'; '.join(sorted(problems)[:10])}")


def _unpacked(tensors: dict[str, torch.Tensor], formats: hf_stored.Formats) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint with the codes of packed layers, one in each element, as ``weight``."""
    found = dict(tensors)
    for name in hf_stored.quantized_names(tensors):
        parts = {leaf: value for leaf in formats.leaves() if (value := tensors.get(f"{name}.{leaf}")) is not None}
        if "weight_packed" in parts:
            for leaf in ("weight_packed", "weight_shape"):
                found.pop(f"{name}.{leaf}", None)
            codes = formats.layer(name, parts).codes
            assert codes is not None
            # Dtype and shape are checked; the codes of all layers would be a fifth of the weights in memory.
            found[f"{name}.weight"] = codes.view(torch.int8).to("meta")
    return found


def _logical_shape(tensor: torch.Tensor) -> list[int] | None:
    """Return a tensor's shape, or None if each byte holds several values."""
    return None if tensor.dtype == torch.uint8 else list(tensor.shape)


def _scale_problems(name: str, tensors: dict[str, torch.Tensor], has_rows: bool) -> list[str]:
    """Return what is wrong with the dtype of a weight and the shape of its scale.

    Args:
        name: Name of the weight.
        tensors: All tensors.
        has_rows: Whether integers have one scale for each row, as in modelopt's layout.
    """
    weight, scale = tensors.get(name), tensors.get(f"{name}_scale")
    if weight is None or not name.endswith(".weight"):
        return []
    if scale is None:
        plain = weight.dtype in (torch.bfloat16, torch.float16, torch.float32)
        return [] if plain else [f"{name}_scale is missing for {weight.dtype} codes"]
    found = list(scale.shape) if has_rows else list(scale.shape[:1])
    if weight.dtype == torch.int8 and found != [weight.shape[0]]:
        return [f"{name}_scale has shape {list(scale.shape)}, not [{weight.shape[0]}]"]
    if weight.dtype in (torch.bfloat16, torch.float16, torch.float32):
        return [f"{name} has dtype {weight.dtype}, but also a scale"]
    return []


def _is_orphan(name: str, tensors: dict[str, torch.Tensor]) -> bool:
    prefix, _, leaf = name.rpartition(".")
    return leaf in SCALES[:6] and f"{prefix}.weight" not in tensors


def is_scale(name: str) -> bool:
    """Return whether a tensor is a scale, by its name."""
    return name.rpartition(".")[2] in SCALES


def _value_problem(name: str, tensor: torch.Tensor) -> str | None:
    """Return what is wrong with a tensor's values, or None; FP8 codes are checked too, as they can be NaN."""
    if not tensor.is_floating_point():
        return None
    for part in tensor.flatten().split(_VALUES):
        value = part.float()
        if not bool(torch.isfinite(value).all()):
            return f"{name} is not finite"
        if is_scale(name) and not bool((value > 0).all()):
            return f"{name} is not positive"
    return None


def _files(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return ["model.safetensors"]


def read_tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield name and value of each tensor of a checkpoint."""
    from safetensors import safe_open

    for file in _files(folder):
        with safe_open(str(folder / file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield name, opened.get_tensor(name)


def stored_shapes(folder: Path) -> dict[str, list[int]]:
    """Return name and shape of each tensor of a checkpoint, without reading the values."""
    from safetensors import safe_open

    shapes = {}
    for file in _files(folder):
        with safe_open(str(folder / file), framework="pt") as opened:
            shapes.update({name: opened.get_slice(name).get_shape() for name in opened.keys()})  # noqa: SIM118
    return shapes


def name_dtype(folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write the dtype of all tensors that are not quantized into ``config.json``, under both names that readers use.

    ``transformers`` writes only the newer name; readers of ``torch_dtype`` then use fp32.

    Args:
        folder: The checkpoint.
        dtype: The dtype; None keeps the one in the file.
    """
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    named = str(dtype).removeprefix("torch.") if dtype else content.get("dtype") or content.get("torch_dtype")
    if named:
        content |= {"dtype": named, "torch_dtype": named}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def plain_config(folder: Path) -> Any:
    """Return the ``transformers`` configuration without quantization, or None if it does not support the class."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.__dict__.pop("quantization_config", None)
    return config if type(config) in AutoModelForCausalLM._model_mapping else None


def linear_layers(folder: Path) -> set[str]:
    """Return the names of the linear layers of the `transformers` model; none if it does not support the class."""
    from transformers import AutoModelForCausalLM

    config = plain_config(folder)
    if config is None:
        return set()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def expected_shapes(folder: Path) -> dict[str, torch.Size]:
    """Return name and shape of each tensor that `transformers` loads; none if it does not support the class."""
    from transformers import AutoModelForCausalLM

    config = plain_config(folder)
    if config is None:
        return {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    return {name: value.shape for name, value in model.state_dict().items() if name not in tied}


def obstacle(folder: Path) -> str | None:
    """Return why the logits of a checkpoint cannot be computed in this process, or None."""
    import psutil

    if plain_config(folder) is None:
        return "transformers does not support the architecture"
    needed = 4 * sum(shape.numel() for shape in expected_shapes(folder).values())
    # The tensors are read once more while the fp32 model is in memory.
    if 1.5 * needed > psutil.virtual_memory().available:
        return f"the model in fp32 needs {needed / 2**30:.0f} GiB of host memory, more than is available"
    return hf_stored.formats(folder).obstacle()


def algorithm_of(folder: Path) -> str | None:
    """Return ``quant_algo`` of a checkpoint, or None if it is not quantized."""
    path = folder / "hf_quant_config.json"
    return json.loads(path.read_text())["quantization"]["quant_algo"] if path.exists() else None


def kv_cache_of(folder: Path) -> str | None:
    """Return ``kv_cache_quant_algo`` of a checkpoint, or None if its KV cache is not quantized."""
    path = folder / "hf_quant_config.json"
    if path.exists():
        return json.loads(path.read_text())["quantization"].get("kv_cache_quant_algo")
    scheme = hf_stored.section(folder).get("kv_cache_scheme")
    return "FP8" if isinstance(scheme, dict) else scheme

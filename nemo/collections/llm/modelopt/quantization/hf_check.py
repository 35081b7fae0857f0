"""The check of a written Hugging Face checkpoint: names, shapes, dtypes, scales, and the logits it gives."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from nemo.utils import logging

from nemo.collections.llm.modelopt.quantization import hf_formats
from nemo.collections.llm.modelopt.quantization.export import ExportError

# Sequence of the comparison: long enough for rotary embeddings and masks to matter.
_CHECKED_TOKENS = 32
# Relative error of the logits by the dtypes of the checkpoint and of the model in memory, which is rounded to that of
# the checkpoint for the comparison. Then only the order of sums differs, and 16-bit scales; where the model computes in
# 16 bits itself, each layer adds to that. A lost scale or a wrong cut gives 0.3 or more.
_TOLERANCE_FP32 = 0.01
_TOLERANCE_WRITTEN_16 = 0.03
_TOLERANCE_COMPUTED_16 = 0.08
_SCALES = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "k_scale", "v_scale", "weight_scale_inv")


def verify(folder: Path) -> None:
    """Reopen a Hugging Face checkpoint: every tensor is there with its shape and dtype, and every scale is positive.

    Raises:
        ExportError: Listing what is wrong.
    """
    tensors = dict(read_tensors(folder))
    problems = [f"{name} is not finite" for name, value in tensors.items() if _is_scale(name) and not _sound(value)]
    expected = expected_shapes(folder)
    for name, shape in expected.items():
        if name not in tensors:
            problems.append(f"{name} is missing")
        elif _logical_shape(tensors[name]) not in (list(shape), None):
            problems.append(f"{name} has shape {list(tensors[name].shape)}, not {list(shape)}")
        problems += _scale_problems(name, tensors)
    if expected:
        problems += [f"{name} is unexpected" for name in tensors if name not in expected and not _is_scale(name)]
    problems += [f"{name} belongs to no weight" for name in tensors if _is_orphan(name, tensors)]
    if problems:
        raise ExportError(f"The checkpoint that was written is wrong: {'; '.join(sorted(problems)[:10])}")


def _logical_shape(tensor: torch.Tensor) -> list[int] | None:
    """Return a tensor's shape, or None where bytes hold several values."""
    return None if tensor.dtype == torch.uint8 else list(tensor.shape)


def _scale_problems(name: str, tensors: dict[str, torch.Tensor]) -> list[str]:
    """Return what is wrong with the dtype of a weight and the shape of its scale."""
    weight, scale = tensors.get(name), tensors.get(f"{name}_scale")
    if weight is None or not name.endswith(".weight"):
        return []
    if scale is None:
        plain = weight.dtype in (torch.bfloat16, torch.float16, torch.float32)
        return [] if plain else [f"{name}_scale is missing for {weight.dtype} codes"]
    if weight.dtype == torch.int8 and list(scale.shape) != [weight.shape[0]]:
        return [f"{name}_scale has shape {list(scale.shape)}, not [{weight.shape[0]}]"]
    if weight.dtype in (torch.bfloat16, torch.float16, torch.float32):
        return [f"{name} has dtype {weight.dtype}, but a scale"]
    return []


def _is_orphan(name: str, tensors: dict[str, torch.Tensor]) -> bool:
    prefix, _, leaf = name.rpartition(".")
    return leaf in _SCALES[:4] and f"{prefix}.weight" not in tensors


def _is_scale(name: str) -> bool:
    return name.rpartition(".")[2] in _SCALES


def _sound(scale: torch.Tensor) -> bool:
    value = scale.float()
    return bool(torch.isfinite(value).all()) and bool((value >= 0).all())


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


def _plain_config(folder: Path) -> Any:
    """Return the ``transformers`` configuration without quantization; None for a class it does not know."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    config.__dict__.pop("quantization_config", None)
    return config if type(config) in AutoModelForCausalLM._model_mapping else None


def expected_shapes(folder: Path) -> dict[str, torch.Size]:
    """Return name and shape of each tensor `transformers` will look for; nothing for a class it does not know."""
    from transformers import AutoModelForCausalLM

    config = _plain_config(folder)
    if config is None:
        return {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    return {name: value.shape for name, value in model.state_dict().items() if name not in tied}


def obstacle(folder: Path) -> str | None:
    """Return why the logits of a checkpoint cannot be computed here, or None."""
    import psutil

    if _plain_config(folder) is None:
        return "transformers does not know the architecture"
    needed = 4 * sum(shape.numel() for shape in expected_shapes(folder).values())
    # The tensors are read once more while the fp32 model stands.
    if 1.5 * needed > psutil.virtual_memory().available:
        return f"the model in fp32 takes {needed / 2**30:.0f} GiB of the host's memory"
    algorithm = algorithm_of(folder)
    if algorithm is not None and algorithm not in hf_formats.DECODABLE:
        return f"the numbers of {algorithm} are not known here"
    return None


def algorithm_of(folder: Path) -> str | None:
    """Return ``quant_algo`` of a checkpoint, None for a plain one."""
    path = folder / "hf_quant_config.json"
    return json.loads(path.read_text())["quantization"]["quant_algo"] if path.exists() else None


def load(folder: Path) -> torch.nn.Module:
    """Return the ``transformers`` model in fp32 on the CPU with the weights a checkpoint stands for.

    Inputs of its linear layers are scaled and quantized as the checkpoint says.
    """
    from transformers import AutoModelForCausalLM

    algorithm = algorithm_of(folder)
    tensors = dict(read_tensors(folder))
    model = AutoModelForCausalLM.from_config(_plain_config(folder), torch_dtype=torch.float32).eval()
    weights = {}
    for name in [name for name in tensors if not _is_scale(name)]:
        prefix = name.removesuffix("weight")
        if name.endswith(".weight") and f"{name}_scale" in tensors:
            parts = {leaf: tensors[prefix + leaf] for leaf in ("weight", *_SCALES) if prefix + leaf in tensors}
            weights[name] = hf_formats.decode(algorithm or "", parts)
            module = model.get_submodule(name.removesuffix(".weight"))
            module.register_forward_pre_hook(_input_hook(algorithm or "", parts))
        else:
            weights[name] = tensors[name].float()
    model.load_state_dict(weights, strict=False)
    return model


def _input_hook(algorithm: str, parts: dict[str, torch.Tensor]):
    """Return a hook that gives a layer's input on as its quantizers do."""
    pre, scale = parts.get("pre_quant_scale"), parts.get("input_scale")

    def hook(module, args):
        value = args[0] if pre is None else args[0] * pre.float()
        if scale is None or algorithm.startswith("NVFP4"):
            return (value,)
        return (hf_formats.quantize_input(algorithm, value, scale.float()),)

    return hook


def tokens(vocabulary: int) -> torch.Tensor:
    """Return token ids `[1, s]` for the comparison, the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (1, _CHECKED_TOKENS), generator=generator)


def quantized_logits(core, vocabulary: int) -> torch.Tensor:
    """Return the logits `[1, s, v]` of the quantized model in memory, in fp32, on every rank.

    Args:
        core: This rank's Megatron-Core model; all ranks must call.
        vocabulary: Entries without padding.
    """
    from megatron.core import parallel_state

    from nemo.collections.llm.modelopt.quantization import calibration, hf_writer

    outputs: list[torch.Tensor] = []
    device = next(core.parameters()).device
    was_training = core.training
    core.eval()
    with _not_stored_disabled(core):
        calibration.run_forward(core, [tokens(vocabulary).to(device)], outputs.append, "Logits of the export")
    core.train(was_training)
    logits = torch.zeros(1, _CHECKED_TOKENS, vocabulary, device=device)
    if outputs:
        # `[b, s, v]`, cut along the vocabulary.
        found = outputs[0].detach().float()
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            found = hf_writer.gather(found, found.dim() - 1)
        logits = found[..., :vocabulary].contiguous().to(device)
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast(logits, last, group=parallel_state.get_pipeline_model_parallel_group())
    return logits.cpu()


@contextlib.contextmanager
def _not_stored_disabled(core) -> Iterator[None]:
    """Switch off, inside of the context, the quantizers that `load` does not imitate: the KV cache, dynamic inputs."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    switched = [
        module
        for name, module in core.named_modules()
        if isinstance(module, TensorQuantizer) and module.is_enabled and _is_not_imitated(name, module)
    ]
    for quantizer in switched:
        quantizer.disable_quant()
    try:
        yield
    finally:
        for quantizer in switched:
            quantizer.enable_quant()


@contextlib.contextmanager
def rounded(core: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let a model compute, inside of the context, with what is not quantized as a checkpoint of this dtype holds it.

    Otherwise every input that rounding moves to the neighbouring number of its format moves by a whole step, and the
    difference grows with the depth of the model.
    """
    kept = []
    for module in core.modules():
        quantizer = getattr(module, "weight_quantizer", None)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype == dtype or (name == "weight" and getattr(quantizer, "is_enabled", False)):
                continue
            kept.append((parameter, parameter.data))
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)
    try:
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def _is_not_imitated(name: str, quantizer) -> bool:
    return "bmm_quantizer" in name or (name.endswith("input_quantizer") and bool(quantizer.block_sizes))


def tolerance(written: torch.dtype, computed: torch.dtype) -> float:
    """Return the relative error of logits that rounding explains.

    Args:
        written: The checkpoint's dtype, of what is not quantized.
        computed: The dtype of the model in memory.
    """
    if computed != torch.float32:
        return _TOLERANCE_COMPUTED_16
    return _TOLERANCE_FP32 if written == torch.float32 else _TOLERANCE_WRITTEN_16


def compare(folder: Path, expected: torch.Tensor, limit: float) -> float:
    """Return the relative error of a checkpoint's logits.

    Args:
        folder: The checkpoint.
        expected: What `quantized_logits` returned.
        limit: See `tolerance`.

    Raises:
        ExportError: If it is larger than rounding explains.
    """
    with torch.no_grad():
        found = load(folder)(tokens(expected.shape[-1])).logits.float()
    error = float((found - expected).norm() / expected.norm())
    if not error <= limit:
        raise ExportError(
            f"The checkpoint's logits are not those of the model in memory: relative error {error:.3g}, at most "
            f"{limit:g} is rounding. It was not kept; please report it with the model's class and the algorithm. "
            "ExportConfig(verify='files') writes without this comparison."
        )
    logging.info(f"Logits of the written checkpoint agree with the model in memory: relative error {error:.2g}")
    return error


def check_logits(core, folder: Path, dtype: torch.dtype) -> None:
    """Compare a written checkpoint's logits with the model in memory; all ranks must call.

    Args:
        core: This rank's Megatron-Core model.
        folder: The checkpoint.
        dtype: The checkpoint's, of what is not quantized.

    Raises:
        ExportError: On rank zero, if they differ by more than rounding explains.
    """
    from nemo.utils.get_rank import is_global_rank_zero

    facts: list[Any] = [None, 0]
    if is_global_rank_zero():
        facts[0] = obstacle(folder)
        facts[1] = 0 if facts[0] else _plain_config(folder).vocab_size
    torch.distributed.broadcast_object_list(facts, src=0)
    reason, vocabulary = facts
    if reason is not None:
        logging.warning(f"The logits of the written checkpoint were not compared: {reason}")
        return
    with rounded(core, dtype):
        expected = quantized_logits(core, vocabulary)
    if is_global_rank_zero():
        compare(folder, expected, tolerance(dtype, next(core.parameters()).dtype))


def write_generation_config(model: Any, folder: Path) -> None:
    """Write ``generation_config.json``: the one the model was imported with, or what its tokenizer says.

    Where the model was imported with one, ``config.json`` names the same tokens: NeMo's exporters ask the tokenizer.
    """
    from transformers import GenerationConfig

    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    own = getattr(getattr(model, "config", None), "generation_config", None)
    if isinstance(own, GenerationConfig):
        path = folder / "config.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        content |= {name: value for name in names if (value := getattr(own, name, None)) is not None}
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    else:
        tokenizer = getattr(getattr(model, "tokenizer", None), "tokenizer", None)
        found = {name: getattr(tokenizer, name, None) for name in names}
        own = GenerationConfig(**{name: value for name, value in found.items() if isinstance(value, int)})
    own.save_pretrained(str(folder))

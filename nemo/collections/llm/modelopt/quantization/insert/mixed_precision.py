"""Mixed precision: a format for each layer, by modelopt's ``auto_quantize`` search (gradient scores, integer program).

The searcher below is modelopt's own with what it lacks for Megatron's layouts: its budget counts a rank's weights
while its costs count all tensor-parallel ranks; it solves each pipeline stage by itself; it counts the score of a
row-parallel layer once for each tensor-parallel rank; and it writes and trusts its checkpoint as it is.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import RowParallelLinear
from nemo.utils import logging

from modelopt.torch.opt.conversion import apply_mode
from modelopt.torch.opt.utils import named_hparams
from modelopt.torch.quantization import algorithms
from modelopt.torch.quantization.mode import QuantizeModeRegistry
from modelopt.torch.quantization.nn import QuantModuleRegistry
from nemo.collections.llm.modelopt import tensor_file
from nemo.collections.llm.modelopt.errors import ModelOptConfigError
from nemo.collections.llm.modelopt.quantization import quant_cfg_choices as choices
from nemo.collections.llm.modelopt.quantization.calibration import batching, sources
from nemo.collections.llm.modelopt.quantization.insert import gated_amax, kv_cache

UNQUANTIZED = "none"
_Base: Any = getattr(algorithms, "AutoQuantizeGradientSearcher", object)
# Hooks of data-parallel training that the schedule would call after a backward pass.
_TRAINING_HOOKS = ("finalize_model_grads_func", "no_sync_func", "grad_sync_func", "param_sync_func", "grad_scale_func")


def check_supported() -> None:
    """Raise where the installed modelopt's search is not the one that this module extends.

    Raises:
        ModelOptConfigError: With the reason.
    """
    if not hasattr(_Base, "run_search_with_stats"):
        raise ModelOptConfigError(
            'algorithm="auto" needs nvidia-modelopt 0.43: the search of this version cannot be given a budget over '
            "parallel ranks, and does not store its calibration."
        )


class Searcher(_Base):
    """modelopt's gradient searcher, with one budget over all tensor- and pipeline-parallel ranks."""

    @property
    def default_search_config(self):
        """Add what identifies a search to modelopt's configuration."""
        return {**super().default_search_config, "identity": None}

    @property
    def default_state_dict(self):
        """Store what identifies a search beside its results."""
        return {**super().default_state_dict, "identity": None}

    def _run_func(self, func, num_iters=1, desc=""):
        func(self.model, self.config["data_loader"][:num_iters], desc)

    def _get_checkpoint_path(self):
        """Return this rank's file; in a folder it has the suffix of what it is, which is no pickle."""
        path = super()._get_checkpoint_path()
        return re.sub(r"(^|/)(rank\d+)\.pth$", rf"\1\2{tensor_file.SUFFIX}", path) if path else path

    def load_search_checkpoint(self) -> bool:
        """Use what all ranks have stored of this same search.

        Raises:
            ModelOptConfigError: On all ranks, if one's file cannot be read or belongs to another search.
        """
        state, problem = _read_state(self._get_checkpoint_path(), self.config["identity"])
        offered = self._get_search_recipes(self.config["quantization_formats"])
        recipes = {str(recipe): recipe for recipe in [*offered, algorithms.QuantRecipe(quant_cfg=None)]}
        stored = {name: saved for name, saved in state.get("quantizer_states", {}).items() if _restorable(saved)}
        answers = gather((problem, {*stored} & {*recipes}))
        problems = [text for text, _ in answers if text]
        if problems:
            raise ModelOptConfigError(f"auto_quantize_checkpoint: {problems[0]}")
        common = set.intersection(*(names for _, names in answers))
        scored = all(gather(bool(state.get("candidate_stats"))))
        self.quantizer_states = {recipes[name]: saved for name, saved in stored.items() if name in common}
        if scored:
            self.candidate_stats = {
                name: {**stat, "formats": [recipes[recipe] for recipe in stat["formats"]]}
                for name, stat in state["candidate_stats"].items()
            }
            logging.info("The scores of the mixed-precision search are taken from its checkpoint")
        return bool(self.quantizer_states)

    def save_search_checkpoint(self, verbose=False) -> None:
        """Write what a later search of the same kind can use; formats are written by name."""
        path = self._get_checkpoint_path()
        if path is None:
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        content = {
            "identity": self.config["identity"],
            "quantizer_states": {str(recipe): saved for recipe, saved in self.quantizer_states.items()},
            "candidate_stats": {
                name: {**stat, "formats": [str(recipe) for recipe in stat["formats"]]}
                for name, stat in self.candidate_stats.items()
            },
        }
        tensor_file.save(Path(path), content)

    def estimate_sensitivity_scores(self) -> None:
        """Score as modelopt does, with gradients of activations only, and every layer counted once."""
        self.model.eval()
        with _without_training_hooks(self.model.config):
            # The embedding's gradient is enough for autograd to go through every layer above it.
            self._estimate_auto_quantize_scores(lambda name, _: "embedding" in name)
        for module in self.model.modules():
            if hasattr(module, "output_diff_dict"):
                del module.output_diff_dict
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        for _, hparam in named_hparams(self.model, unique=True):
            for scores in hparam._importance_dict.values():
                for module, score in scores.items():
                    whole = isinstance(module, RowParallelLinear) and not module.config.sequence_parallel
                    if whole and score is not None:
                        scores[module] = score / ranks

    def run_search_with_stats(self, max_weight_size, verbose=False):
        """Choose for the layers of all pipeline stages at once; return this stage's part."""
        own = self.candidate_stats
        stages = gather(own, parallel_state.get_pipeline_model_parallel_group())
        everything = {(i, name): dict(stat) for i, stats in enumerate(stages) for name, stat in stats.items()}
        # The solver's tolerances are absolute: scores of about one.
        largest = max((max(stat["scores"]) for stat in everything.values()), default=0.0) or 1.0
        for stat in everything.values():
            stat["scores"] = [score / largest for score in stat["scores"]]
        total = sum(max(stat["costs"]) for stat in everything.values())
        self.candidate_stats = everything
        try:
            best, is_satisfied = super().run_search_with_stats(
                total * self._get_formatted_weight_compression_constraint(), verbose
            )
        finally:
            self.candidate_stats = own
        self.effective_bits = 16 * sum(chosen["costs"] for chosen in best.values()) / total
        stage = parallel_state.get_pipeline_model_parallel_rank()
        return {name: best[(stage, name)] for name in own}, is_satisfied

    def _verify_constraint(self, search_recipes):
        """Do nothing: `check_reachable` knows the layers that stay as they are."""


def insert(
    mtq: Any,
    core: torch.nn.Module,
    quant_cfg: dict[str, Any],
    formats: dict[str, dict[str, Any]],
    batches: list[torch.Tensor],
    config: Any,
) -> dict[str, Any]:
    """Search, calibrate, and quantize the KV cache where the quant_cfg asks for it; see `quantize`.

    Args:
        mtq: ``modelopt.torch.quantization``.
        core: This rank's Megatron-Core model.
        quant_cfg: Of the KV cache alone.
        formats: Name to quant_cfg, see `settings.auto_formats`.
        batches: This data-parallel rank's microbatches `[b, s]`.
        config: The QuantizationConfig.
    """
    size = (config.calibration_dataset_size, config.calibration_batch_size, config.calibration_seq_len, config.packed)
    data = (sources.label(config.calibration_dataset), config.calibration_column, config.calibration_shuffle_seed)
    with kv_cache.attention_support(choices.has_kv_cache(quant_cfg)):
        kv_cache.settle(core, quant_cfg, config.enable_kv_cache)
        bits, checkpoint = config.auto_quantize_bits, config.auto_quantize_checkpoint
        found = quantize(core, formats, bits, batches, checkpoint, {"calibration data": (*data, *size)})
    gated_amax.mend(core)
    if choices.has_kv_cache(quant_cfg):
        quantize_kv_cache(mtq, core, quant_cfg, batches)
    return found


def quantize(
    core: torch.nn.Module,
    formats: dict[str, dict[str, Any]],
    bits: float,
    batches: list[torch.Tensor],
    checkpoint: str | None = None,
    identity: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Choose a format for each linear layer, in place, and calibrate it.

    Args:
        core: This rank's Megatron-Core model.
        formats: Name to quant_cfg, see `settings.auto_formats`.
        bits: Bits of a weight on average; layers that the formats exclude count 16.
        batches: This data-parallel rank's microbatches `[b, s]`.
        checkpoint: File or folder; a search that it holds goes on from there.
        identity: What else must be equal for a stored search to be gone on with.

    Returns:
        "formats", the name of the format of each layer over all pipeline stages, and "effective_bits".

    Raises:
        ModelOptConfigError: If the bits cannot be reached, or the checkpoint belongs to another search.
    """
    check_supported()
    excluded = excluded_layers(core, formats)
    check_reachable(core, formats, excluded, bits)
    recipes = {str(algorithms.QuantRecipe(quant_cfg, name)): name for name, quant_cfg in formats.items()}
    config = {
        "quantization_formats": [(quant_cfg, name) for name, quant_cfg in formats.items()],
        "data_loader": batches,
        "forward_step": _calibrate,
        "forward_backward_step": _score,
        "num_calib_steps": len(batches),
        "num_score_steps": len(batches),
        "disabled_layers": excluded,
        "verbose": False,
        "checkpoint": checkpoint,
        "identity": {**(identity or {}), **_identity(core, formats)},
    }
    core = apply_mode(core, mode="auto_quantize", registry=QuantizeModeRegistry)
    from modelopt.torch.quantization.conversion import set_quantizer_by_cfg

    set_quantizer_by_cfg(core, {"*": {"enable": False}})
    searcher = Searcher()
    best = searcher.search(core, {"effective_bits": bits}, config=config)
    if not best["is_satisfied"]:
        raise ModelOptConfigError(
            f"auto_quantize_bits={bits}: the search found no choice of formats within it (its best takes "
            f"{searcher.effective_bits:.2f} bits)."
        )
    chosen = {name.removesuffix(".quant_recipe"): recipe for name, recipe in best["recipe"].items()}
    layers = {global_name(core, name): recipes.get(str(recipe), UNQUANTIZED) for name, recipe in chosen.items()}
    stages = gather(layers, parallel_state.get_pipeline_model_parallel_group())
    return {
        "formats": {name: fmt for stage in stages for name, fmt in stage.items()},
        "effective_bits": searcher.effective_bits,
    }


def quantize_kv_cache(mtq: Any, core: torch.nn.Module, quant_cfg: dict[str, Any], batches: list[torch.Tensor]) -> None:
    """Enable and calibrate the KV-cache quantizers of a searched model; all others rest meanwhile."""
    kv_cfg = {p: a for p, a in quant_cfg["quant_cfg"].items() if "bmm_quantizer" in p}
    mtq.set_quantizer_by_cfg(core, kv_cfg)
    with mtq.set_quantizer_by_cfg_context(core, {"*": {"enable": False}, **kv_cfg}):
        mtq.calibrate(core, "max", lambda model: _calibrate(model, batches, "Calibration of the KV cache"))


def linear_layers(core: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Return the layers that modelopt can quantize by their weight `[out, in]`."""
    return {
        name: module
        for name, module in core.named_modules()
        if type(module) in QuantModuleRegistry
        and isinstance(getattr(module, "weight", None), torch.Tensor)
        and module.weight.dim() == 2
        and not isinstance(module, torch.nn.Embedding)
    }


def excluded_layers(core: torch.nn.Module, formats: dict[str, dict[str, Any]]) -> list[str]:
    """Return the layers that one of the formats excludes by name: output layer, routers and the like."""
    patterns = {"vision_projection.*"}
    for quant_cfg in formats.values():
        for pattern, setting in quant_cfg["quant_cfg"].items():
            if pattern not in ("default", "*") and isinstance(setting, dict) and setting.get("enable") is False:
                patterns.add(pattern)
    return [
        name
        for name in linear_layers(core)
        if any(fnmatch.fnmatch(f"{name}.weight_quantizer", pattern) for pattern in patterns)
    ]


def check_reachable(
    core: torch.nn.Module, formats: dict[str, dict[str, Any]], excluded: list[str], bits: float
) -> None:
    """Raise if not even the smallest format everywhere takes as few bits as asked for.

    Raises:
        ModelOptConfigError: With the least that can be reached.
    """
    lowest = min(choices.weight_bits(quant_cfg) for quant_cfg in formats.values())
    taken = total = 0
    for name, module in linear_layers(core).items():
        total += module.weight.numel()
        taken += module.weight.numel() * (16 if name in excluded else lowest)
    sums = torch.tensor([taken, total], dtype=torch.float64, device=next(core.parameters()).device)
    torch.distributed.all_reduce(sums, group=parallel_state.get_model_parallel_group())
    least = float(sums[0] / sums[1])
    if bits < least:
        raise ModelOptConfigError(
            f"auto_quantize_bits={bits} cannot be reached on this model: at least {least:.2f}, with {lowest} bits in "
            f"every layer but those that stay in 16 bits (on this rank: {excluded}). Ask for more bits or give a "
            "smaller format."
        )


def _calibrate(model, batches: list[torch.Tensor], title: str) -> None:
    with batching.output_layer_skipped(model):
        batching.run_forward(model, batches, title=title)


def _score(model, batches: list[torch.Tensor], title: str) -> None:
    """Run forward and backward of each microbatch alone: modelopt keeps the differences of one at a time."""
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    schedule = get_forward_backward_func()
    for batch in batching.ticking(batches, len(batches), title):
        # A single token has no next one to predict.
        if batch.shape[1] < 2:
            continue
        schedule(
            forward_step_func=_loss_step,
            data_iterator=iter([batch]),
            model=model,
            num_microbatches=1,
            seq_length=batch.shape[1],
            micro_batch_size=batch.shape[0],
            forward_only=False,
        )


def _loss_step(data_iterator, model):
    tokens = next(data_iterator)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    output = model(tokens, positions, None, labels=tokens.roll(-1, 1))

    def total(losses):
        # Summed, for a log-likelihood's gradient; the last token has no successor.
        loss = losses[:, :-1].float().sum()
        return loss, {"loss": loss.detach()}

    return output, total


@contextlib.contextmanager
def _without_training_hooks(config) -> Iterator[None]:
    kept = {name: getattr(config, name, None) for name in _TRAINING_HOOKS}
    try:
        for name in kept:
            setattr(config, name, None)
        yield
    finally:
        for name, value in kept.items():
            setattr(config, name, value)


def _identity(core: torch.nn.Module, formats: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what must be equal for a stored search to fit: formats, layout, layers and weights."""
    weights = [module.weight for module in linear_layers(core).values()]
    return {
        "formats": repr(formats),
        "ranks": (
            torch.distributed.get_world_size(),
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
        ),
        "layers": {name: tuple(module.weight.shape) for name, module in linear_layers(core).items()},
        # Another device may sum in another order.
        "weights": f"{sum(float(weight.float().abs().sum()) for weight in weights):.4e}",
    }


def _read_state(path: str | None, identity: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return a stored search, empty where there is none, and what is wrong with it."""
    if path is None or not os.path.exists(path):
        return {}, None
    try:
        state = tensor_file.load(Path(path))
        stored = state["identity"]
    except (ModelOptConfigError, OSError, TypeError, KeyError) as error:
        return {}, f"{path}: {error} Delete it to search anew, or use another path."
    changed = [name for name in identity if (stored or {}).get(name) != identity[name]]
    if changed:
        return {}, f"{path} belongs to a search with other {', '.join(changed)}; delete it or give another path."
    return state, None


def _restorable(saved: dict[str, Any]) -> bool:
    """Return whether modelopt restores a stored calibration: it fails on AWQ's and SmoothQuant's scales of weights.

    Its restoring function runs the weights through scales that it has allocated and not yet filled. Such formats are
    calibrated anew.
    """
    return "pre_quant_scale" not in {key.lstrip("_") for state in saved["state_dict"].values() for key in state}


def gather(value: Any, group=None) -> list[Any]:
    """Return the value of each rank."""
    found: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(found, value, group=group)
    return found


def global_name(core: torch.nn.Module, name: str) -> str:
    """Return a layer's name with its number in the whole model; a pipeline stage counts from zero."""
    head, marker, tail = name.partition("layers.")
    if not marker:
        return name
    number, _, rest = tail.partition(".")
    layer = core.get_submodule(f"{head}layers.{number}")
    return f"{head}layers.{layer.layer_number - 1}.{rest}" if hasattr(layer, "layer_number") else name

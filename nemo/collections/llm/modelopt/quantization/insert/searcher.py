"""modelopt's search for mixed precision, extended to Megatron's parallel layouts.

modelopt's own searcher counts a rank's weights in its budget but the costs of all tensor-parallel ranks; it solves each
pipeline stage on its own; it counts the score of a row-parallel layer once for each tensor-parallel rank; and it reads
its checkpoint without a check.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import RowParallelLinear
from nemo.utils import logging

from modelopt.torch.opt.utils import named_hparams
from modelopt.torch.quantization import algorithms
from nemo_modelopt_dropin.console import screen

from ... import tensor_file
from ..._parallel import gather_objects
from ...errors import ModelOptConfigError
from ..calibration import awq_search

_Base: Any = getattr(algorithms, "AutoQuantizeGradientSearcher", object)
# The experts of a layer share a format, because readers of Hugging Face files have one kernel for all of them.
_EXPERTS = r"^(.*\.experts)\.local_experts\.\d+\.linear_fc[12]$"
# How modelopt 0.46 and later name what they compare with the search that they continue.
_SIGNATURE = "_signature"
# From 0.47, modelopt stores more of a search, and checks it before it continues.
_SIGNS = hasattr(getattr(algorithms, "QuantRecipe", None), "checkpoint_signature")
# Hooks of data-parallel training that Megatron's schedule would call around a backward pass.
_TRAINING_HOOKS = ("finalize_model_grads_func", "no_sync_func", "grad_sync_func", "param_sync_func", "grad_scale_func")


def check_supported() -> None:
    """Check that this module can extend the search of the installed modelopt.

    Raises:
        ModelOptConfigError: With the reason.
    """
    if parallel_state.model_parallel_is_initialized() and parallel_state.get_expert_model_parallel_world_size() > 1:
        raise ModelOptConfigError(
            'algorithm="auto" needs expert parallel size 1, not '
            f"{parallel_state.get_expert_model_parallel_world_size()}: the search of modelopt does not add up the "
            "scores of experts on several ranks. Use tensor or pipeline parallelism."
        )
    if not hasattr(_Base, "run_search_with_stats"):
        raise ModelOptConfigError(
            'algorithm="auto" needs nvidia-modelopt 0.43: the search of this version does not support a budget over '
            "parallel ranks, and does not store its calibration."
        )


class Searcher(_Base):
    """modelopt's gradient searcher, with one budget over all tensor- and pipeline-parallel ranks.

    Megatron fuses q, k and v, and gate and up, so each of these groups is one layer with one format.
    """

    # The title of the last passes over the data, and the function that runs them.
    _awq_loop: tuple[str | None, Callable] = (None, print)
    quant_grouping_rules = (_EXPERTS, *getattr(_Base, "quant_grouping_rules", ()))

    def layers_of(self, name: str) -> list[str]:
        """Return the layers that share the format of an entry of the result."""
        return list(self.candidate_stats.get(name, {}).get("module_names") or [name.removesuffix(".quant_recipe")])

    @property
    def default_search_config(self):
        """Return modelopt's configuration and what identifies a search."""
        return {**super().default_search_config, "identity": None}

    @property
    def default_state_dict(self):
        """Return the state that is stored: modelopt's, and what identifies the search."""
        return {**super().default_state_dict, "identity": None}

    def _run_func(self, func, num_iters=1, desc=""):
        # AWQ's calibration calls twice, with one title; the second call needs what the first one recorded.
        batches = self.config["data_loader"][:num_iters]
        if self._awq_loop[0] != desc:
            self._awq_loop = desc, awq_search.one_batch_a_layer(lambda model: func(model, batches, desc))
        self._awq_loop[1](self.model)

    def _get_checkpoint_path(self):
        """Return this rank's file; in a folder it has the suffix of our format, which is not a pickle."""
        path = super()._get_checkpoint_path()
        return re.sub(r"(^|/)(rank\d+)\.pth$", rf"\1\2{tensor_file.SUFFIX}", path) if path else path

    def load_search_checkpoint(self) -> bool:
        """Use the results of the same search that all ranks have stored.

        Raises:
            ModelOptConfigError: On all ranks, if the file of one rank cannot be read or belongs to another search.
        """
        state, problem = _read_state(self._get_checkpoint_path(), self.config["identity"])
        offered = self._get_search_recipes(self.config["quantization_formats"])
        recipes = {str(recipe): recipe for recipe in [*offered, algorithms.QuantRecipe(quant_cfg=None)]}
        stored = {name: saved for name, saved in state.get("quantizer_states", {}).items() if _restorable(saved)}
        answers = gather_objects((problem, {*stored} & {*recipes}))
        problems = [text for text, _ in answers if text]
        if problems:
            raise ModelOptConfigError(f"auto_quantize_checkpoint: {problems[0]}")
        common = set.intersection(*(names for _, names in answers))
        scored = all(gather_objects(bool(state.get("candidate_stats"))))
        self.quantizer_states = {recipes[name]: saved for name, saved in stored.items() if name in common}
        for name, signature in state.get("signatures", {}).items():
            setattr(self, name, signature)
        if scored:
            self.candidate_stats = {
                name: {**stat, "formats": [recipes[recipe] for recipe in stat["formats"]]}
                for name, stat in state["candidate_stats"].items()
            }
            with screen.results():
                logging.info("The scores of the mixed-precision search are read from its checkpoint")
        return bool(self.quantizer_states)

    def save_search_checkpoint(self, verbose=False) -> None:
        """Write what a later run of the same search can use; formats are stored by name."""
        path = self._get_checkpoint_path()
        if path is None:
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        content = {
            "identity": self.config["identity"],
            "signatures": {name: getattr(self, name) for name in self.default_state_dict if name.endswith(_SIGNATURE)},
            "quantizer_states": {str(recipe): saved for recipe, saved in self.quantizer_states.items()},
            "candidate_stats": {
                name: {**stat, "formats": [str(recipe) for recipe in stat["formats"]]}
                for name, stat in self.candidate_stats.items()
            },
        }
        tensor_file.save(Path(path), content)

    def estimate_sensitivity_scores(self) -> None:
        """Compute modelopt's scores with gradients of activations only, and count every layer once."""
        self.model.eval()
        with _without_training_hooks(self.model.config):
            # With a gradient for the embedding, autograd passes through every layer after it.
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
        """Choose the formats of all pipeline stages together; return this stage's part."""
        own = self.candidate_stats
        stages = gather_objects(own, parallel_state.get_pipeline_model_parallel_group())
        everything = {(i, name): dict(stat) for i, stats in enumerate(stages) for name, stat in stats.items()}
        # The solver's tolerances are absolute, so the scores are scaled to about one.
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
        """Do nothing: `mixed_precision.check_reachable` accounts for the layers that are not quantized."""

    def _verify_resolved_constraint(self, quant_recipe_hparams):
        """Do nothing, as above; modelopt would check the layers of one pipeline stage."""


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


def _read_state(path: str | None, identity: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Return a stored search, empty if there is none, and what is wrong with it."""
    if path is None or not os.path.exists(path):
        return {}, None
    try:
        state = tensor_file.load(Path(path))
        stored = state["identity"]
    except (ModelOptConfigError, OSError, TypeError, KeyError) as error:
        return {}, f"{path}: {error} Delete it to search again, or use another path."
    stored = stored or {}
    if not _SIGNS:  # earlier searches on these versions of modelopt have stored none
        stored = {"modelopt": identity.get("modelopt"), **stored}
    changed = [name for name in {**identity, **stored} if stored.get(name) != identity.get(name)]
    if "modelopt" in changed:
        writer = stored.get("modelopt", "before 0.47")
        versions = f"nvidia-modelopt {writer}, and {identity['modelopt']} is installed"
        return {}, f"{path} belongs to a search with {versions}; delete it or use another path."
    if changed:
        return {}, f"{path} belongs to a search with other {', '.join(changed)}; delete it or use another path."
    return state, None


def _restorable(saved: dict[str, Any]) -> bool:
    """Return whether modelopt can restore a stored calibration; with AWQ's and SmoothQuant's scales it cannot.

    Its restoring function applies the scales to the weights before it loads the scales. Such formats are calibrated
    again.
    """
    return "pre_quant_scale" not in {key.lstrip("_") for state in saved["state_dict"].values() for key in state}

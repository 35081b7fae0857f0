"""Settings of the compression job, checked before anything heavy is imported; each is one field and one flag."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nemo_modelopt_cli.compress import fit_settings
from nemo_modelopt_cli.compress.fit_settings import Fit
from nemo_modelopt_cli.compress.setting_checks import SettingsError as SettingsError
from nemo_modelopt_cli.compress.setting_checks import from_dict as from_dict
from nemo_modelopt_cli.compress.setting_checks import positive, raise_all, unknown
from nemo_modelopt_cli.evaluation.harness_settings import Evaluation
from nemo_modelopt_cli.options import group, option
from nemo_modelopt_cli.parser import no_checkpoints, template_problems, text_problems
from nemo_modelopt_dropin import versions
from nemo_modelopt_dropin.fit.formats import GROUPS, Format, mixture_problem
from nemo_modelopt_dropin.preflight import (
    algorithms,
    budget,
    loss_file,
    model_checks,
    model_sizes,
    pair_checks,
    prune_layout,
    readers,
    shard_sizes,
)
from nemo_modelopt_dropin.preflight.model_sizes import Shape

ALGORITHMS = (*algorithms.TABLE, algorithms.NO_QUANT)
EXPORT_FORMATS = ("nemo", "hf")
VERIFY = ("full", "files", "none")
TARGETS = (
    "target_ffn_hidden_size",
    "target_hidden_size",
    "target_num_attention_heads",
    "target_num_query_groups",
    "target_num_layers",
    "target_num_moe_experts",
    "target_moe_ffn_hidden_size",
)

_NOTHING = "pruning: nothing to prune"
_TOGETHER = "pruning: target_num_attention_heads and target_num_query_groups go together"


@dataclass(frozen=True)
class Layout:
    """Ranks of the job, and how the model is split over them."""

    devices: int = field(
        default=1, metadata=option("ranks on each node (default: torchrun's, or as many as the model needs)")
    )
    num_nodes: int = field(default=1, metadata=option("nodes (default: torchrun's, or 1)"))
    tp: int = field(default=1, metadata=option("tensor-parallel size"))
    pp: int = field(default=1, metadata=option("pipeline-parallel size"))
    cpu: bool = field(default=False, metadata=option("run on CPU ranks over gloo"))

    def problems(self) -> list[str]:
        """Return what is wrong with the layout."""
        found = positive(self, ("devices", "num_nodes", "tp", "pp"))
        world = self.devices * self.num_nodes
        if not found and world % (self.tp * self.pp):
            found.append(
                f"{self.devices} devices x {self.num_nodes} nodes = {world} ranks cannot be split into tp={self.tp} x "
                f"pp={self.pp}; choose --devices as a multiple of {self.tp * self.pp}"
            )
        return found


@dataclass(frozen=True)
class Training:
    """One training run with Adam, linear warm-up and cosine decay."""

    steps: int = field(default=1000, metadata=option("optimizer steps"))
    global_batch_size: int = field(default=16, metadata=option("samples per optimizer step"))
    micro_batch_size: int = field(
        default=4, metadata=option("samples per forward pass, also when the held-out loss is measured")
    )
    lr: float = field(default=1e-4, metadata=option("highest learning rate"))
    min_lr: float = field(default=1e-5, metadata=option("last learning rate"))
    warmup_steps: int = field(
        default=50,
        metadata=option("steps of learning-rate warm-up (default: 50, or a tenth of the steps if that is less)"),
    )
    weight_decay: float = field(default=0.1, metadata=option("Adam's weight decay"))
    clip_grad: float = 1.0
    seed: int = field(default=1234, metadata=option("seed of the training samples"))
    evaluate_every: int = field(default=0, metadata=option("steps between held-out losses during training, 0 for none"))
    save_every: int | None = field(
        default=None,
        metadata=option("steps between checkpoints to resume from, 0 for none (default: every few minutes)"),
    )

    def problems(self, name: str, layout: Layout) -> list[str]:
        """Return what is wrong with the run called ``name``."""
        found = positive(self, ("steps", "global_batch_size", "micro_batch_size", "lr"), name)
        found += [
            f"{name}: {setting} must not be negative, got {getattr(self, setting)}"
            for setting in ("min_lr", "warmup_steps", "weight_decay", "clip_grad", "seed")
            if getattr(self, setting) < 0
        ]
        data_parallel = max(1, layout.devices * layout.num_nodes // (layout.tp * layout.pp or 1))
        unit = self.micro_batch_size * data_parallel
        if not found and self.global_batch_size % unit:
            found.append(
                f"{name}: global batch size {self.global_batch_size} is not a multiple of micro-batch size "
                f"{self.micro_batch_size} x {data_parallel} data parallel ranks"
            )
        for setting in ("evaluate_every", "save_every"):
            every = getattr(self, setting)
            if not found and every is not None and not 0 <= every <= self.steps:
                found.append(f"{name}: {setting} {every} must be between 0 (never) and the {self.steps} steps")
        if not found and self.warmup_steps >= self.steps:
            found.append(
                f"{name}: warm-up of {self.warmup_steps} steps does not fit into {self.steps} steps: lower "
                "warmup_steps (--distill-warmup-steps)"
            )
        if not found and self.min_lr > self.lr:
            found.append(f"{name}: min_lr {self.min_lr:g} is above lr {self.lr:g}, the highest learning rate")
        return found


@dataclass(frozen=True)
class Pruning:
    """Targets of llm.prune, or the layers to drop; None leaves a dimension unchanged."""

    target_ffn_hidden_size: int | None = field(default=None, metadata=option("inner size of the MLP"))
    target_hidden_size: int | None = field(default=None, metadata=option("hidden size"))
    target_num_attention_heads: int | None = field(
        default=None, metadata=option("attention heads; requires --target-num-query-groups")
    )
    target_num_query_groups: int | None = field(
        default=None, metadata=option("query groups; requires --target-num-attention-heads")
    )
    target_num_layers: int | None = field(default=None, metadata=option("layers to keep, chosen by importance"))
    drop_layers: tuple[int, ...] | None = field(
        default=None, metadata=option("layers to drop, counted from 1; excludes the targets")
    )
    num_samples: int = field(
        default=256, metadata=option("sequences on which importance is measured", "--prune-samples")
    )
    micro_batch_size: int = field(
        default=4, metadata=option("sequences per forward pass of the measurement", "--prune-batch-size")
    )
    target_params: str | None = field(
        default=None,
        metadata=option("largest number of parameters: 70%, 5.6e9 or 5.6B; sizes are chosen by held-out loss"),
    )
    max_candidates: int = field(default=16, metadata=option("combinations of sizes to try when --target-params is set"))
    heldout_batches: int = field(default=16, metadata=option("held-out batches on which those are compared"))
    target_num_moe_experts: int | None = field(default=None, metadata=option("experts of an MoE model"))
    target_moe_ffn_hidden_size: int | None = field(default=None, metadata=option("inner size of an expert"))

    def problems(self, searched: bool = False) -> list[str]:
        """Return what is wrong with the pruning targets.

        Args:
            searched: whether a search under a budget chooses the sizes that are not set.
        """
        given = [name for name in TARGETS if getattr(self, name) is not None]
        numbers = ("num_samples", "micro_batch_size", "max_candidates", "heldout_batches")
        unsupported = versions.pruning_problem(by_importance=not self.drop_layers)
        found = [f"pruning: {unsupported}"] if unsupported else []
        found += positive(self, (*given, *numbers), "pruning")
        given += ["target_params"] if self.target_params is not None else []
        found += budget.problem("pruning: target_params", self.target_params)
        if given and self.drop_layers:
            found.append(f"pruning: drop_layers cannot be combined with {', '.join(given)}")
        if not given and not self.drop_layers and not searched:
            names = ", ".join((*TARGETS, "target_params"))
            found.append(f"{_NOTHING}; set at least one of {names} or drop_layers")
        if (self.target_num_attention_heads is None) != (self.target_num_query_groups is None):
            found.append(_TOGETHER)
        if self.num_samples < self.micro_batch_size:
            found.append(f"pruning: {self.num_samples} samples are less than one batch of {self.micro_batch_size}")
        return found


def follows_from_targets(problem: str) -> bool:
    """Return whether a problem from `Pruning.problems` may only mean that a target could not be read."""
    return problem.startswith((_NOTHING, _TOGETHER))


@dataclass(frozen=True)
class Quantization:
    """Algorithm and calibration of llm.ptq, and the formats to write."""

    algorithm: str = field(default="fp8", metadata=option(f"one of {', '.join(ALGORITHMS)}"))
    calibration_size: int = field(default=256, metadata=option("rows of --train-text to calibrate on"))
    calibration_batch_size: int = field(default=16, metadata=option("rows per calibration batch"))
    calibration_seq_len: int = field(default=128, metadata=option("tokens per calibration row"))
    enable_kv_cache: bool | None = field(default=False, metadata=option("quantize the KV cache, too (off by default)"))
    formats: tuple[str, ...] = field(
        default=("nemo",), metadata=option(f"formats to export, any of {', '.join(EXPORT_FORMATS)}")
    )
    awq_block_size: int = field(default=128, metadata=option("weights that share an INT4 scale"))
    verify: str = field(
        default="full",
        metadata=option(
            f"how to check Hugging Face files, one of {', '.join(VERIFY)} (default: full, which checks logits, too)",
            metavar="HOW",
        ),
    )
    hf_layout: str = field(
        default=algorithms.AUTO,
        metadata=option(
            f"layout of Hugging Face files, one of {', '.join(algorithms.LAYOUT_CHOICES)} (default: auto, the one that "
            "most servers read)",
            metavar="LAYOUT",
        ),
    )
    max_shard_size: str = field(
        default="5GB", metadata=option("largest size of a weight file of Hugging Face files", metavar="SIZE")
    )
    attention_algorithm: str | None = field(
        default=None,
        metadata=option("algorithm of the attention's layers, if it is not that of the MLPs; no_quant for 16 bits"),
    )

    @property
    def layout_of_scales(self) -> str | None:
        """The layout of Hugging Face files if the calibration depends on it, else None.

        Input scales are moved for compressed-tensors, and for NVFP4 in any layout; experts in INT8 get other scales.
        """
        found = algorithms.hf_format_of(self.algorithm)
        if "hf" not in self.formats or found is None:
            return None
        layout = algorithms.layout_of(found, self.hf_layout)
        depends = algorithms.scales_inputs(self.algorithm) or found == "W8A8_SQ_PER_CHANNEL"
        return layout if depends and (layout == readers.COMPRESSED_TENSORS or found == "NVFP4_AWQ") else None

    def problems(self) -> list[str]:
        """Return what is wrong with the quantization settings."""
        numbers = ("calibration_size", "calibration_batch_size", "calibration_seq_len", "awq_block_size")
        found = positive(self, numbers, "quantization")
        found += unknown("algorithm", [self.algorithm], ALGORITHMS)
        found += self._mixture_problems()
        found += [f"quantization: {one}" for one in (algorithms.version_problem(self.algorithm),) if one]
        found += unknown("export format", self.formats, EXPORT_FORMATS) + unknown("verify", [self.verify], VERIFY)
        found += unknown("hf_layout", [self.hf_layout], algorithms.LAYOUT_CHOICES)
        found += shard_sizes.problem("max_shard_size", self.max_shard_size)
        if "hf" in self.formats:
            found += algorithms.layout_problems("hf_layout", self.algorithm, self.hf_layout)
        if not found and self.calibration_size < self.calibration_batch_size:
            sizes = f"{self.calibration_size} is less than one batch of {self.calibration_batch_size}"
            found.append(f"quantization: calibration size {sizes}")
        return found

    def _mixture_problems(self) -> list[str]:
        """Return why attention and MLP cannot have the two algorithms."""
        if self.attention_algorithm is None:
            return []
        found = unknown("attention_algorithm", [self.attention_algorithm], ALGORITHMS)
        known = self.algorithm in ALGORITHMS and not found and self.attention_algorithm != self.algorithm
        if known and (reason := mixture_problem(self.attention_algorithm, self.algorithm, self.hf_layout)):
            found.append(f"quantization: attention_algorithm {self.attention_algorithm}: {reason}")
        return found

    @property
    def weights(self) -> Format:
        """The format of the attention's and the MLPs' weights."""
        return Format(
            self.attention_algorithm or self.algorithm, self.algorithm, bool(self.enable_kv_cache), self.awq_block_size
        )

    def block(self) -> int | None:
        """Return the number of weights that share a scale, None if there are no blocks."""
        blocks = [self.weights.needed_block(group) for group in GROUPS]
        return max((block for block in blocks if block), default=None)


@dataclass(frozen=True)
class Job:
    """All settings of `compress`: the teacher checkpoint, the texts, and the settings of each job step."""

    teacher: str = field(metadata=option("NeMo 2 checkpoint folder", path=True))
    train_text: str = field(metadata=option("file of texts to distill and calibrate on", path=True))
    heldout_text: str = field(metadata=option("file of texts to measure on", path=True))
    seq_length: int = field(default=128, metadata=option("tokens per sample"))
    distill_config: str | None = field(
        default=None, metadata=option("YAML of the distillation losses (NeMo's format)", path=True, group="distill")
    )
    layout: Layout = field(default_factory=Layout, metadata=group("layout"))
    pruning: Pruning = field(default_factory=Pruning, metadata=group("prune"))
    distillation: Training = field(default_factory=Training, metadata=group("distill", "distill-"))
    quantization: Quantization = field(default_factory=Quantization, metadata=group("quantize and export"))
    fit: Fit = field(default_factory=Fit, metadata=group("fit a budget", "fit-"))
    evaluation: Evaluation = field(default_factory=Evaluation, metadata=group("evaluate", "evaluate-"))
    scratch: bool = field(
        default=False,
        metadata=option("also train a model of the student's shape from random weights, as a baseline"),
    )

    def check(self, teacher_exists: bool = True) -> None:
        """Raise an error if anything is wrong.

        Args:
            teacher_exists: False if an earlier step writes the teacher.

        Raises:
            SettingsError: listing every problem, not only the first.
        """
        raise_all(self.problems(teacher_exists))

    def problems(self, teacher_exists: bool = True) -> list[str]:
        """Return everything that is wrong; empty paths are not looked for."""
        found = self.layout.problems() + self.pruning.problems(searched=self.fit.is_set) + self.fit.problems()
        found += self.distillation.problems("distillation", self.layout) + self.quantization.problems()
        own, teacher = self.quantization, self.teacher if teacher_exists else None
        found += self.evaluation.problems(own.algorithm, own.hf_layout, own.formats, teacher)
        if self.distill_config and not Path(self.distill_config).is_file():
            found.append(f"distill_config {self.distill_config}: there is no such file")
        if teacher_exists:
            texts = {"train_text": self.train_text, "heldout_text": self.heldout_text}
            found += text_problems(texts) + template_problems(texts, self.teacher)
            found += pair_checks.same_text(("train_text", self.train_text), ("heldout_text", self.heldout_text))
            found += no_checkpoints({"teacher": self.teacher})
        found += loss_file.problems(self.distill_config)
        if self.seq_length < 2:
            found.append(f"seq_length must be at least 2, got {self.seq_length}")
        if not found and teacher_exists and self.teacher and not self.pruning.drop_layers:
            found += prune_layout.problems(self.teacher, self.layout.devices * self.layout.num_nodes)
        if teacher_exists and self.teacher:
            found += model_checks.split_problems(self.teacher, self.layout.tp, self.layout.pp) + self._size_problems()
            found += fit_settings.job_problems(self)
        return found

    def _size_problems(self) -> list[str]:
        """Return the targets, layers of losses and INT4 blocks that do not fit the teacher or the pruned model."""
        shape, layers = model_sizes.known(self.teacher), model_sizes.layers(self.teacher)
        pruning = self.pruning
        targets = {name: getattr(pruning, name) for name in TARGETS}
        searched = pruning.target_params is not None or self.fit.is_set
        unfit = model_checks.target_problems(shape, targets, searched)
        unfit += model_checks.family_problems(self.teacher, targets, searched)
        unfit += model_checks.drop_problems(layers, pruning.drop_layers)
        unfit += (
            []
            if unfit
            else model_checks.budget_problems(shape, pruning.target_params, targets, self.size_multiples(shape))
        )
        found = [f"pruning: {one}" for one in unfit]
        for export_format in self.quantization.formats:
            unwritten = model_checks.file_problems(self.teacher, self.quantization.algorithm, export_format)
            found += [f"quantization: {one}" for one in unwritten]
        left = None if searched else pruning.target_num_layers or layers
        if left is not None and pruning.drop_layers:
            left -= len(pruning.drop_layers)
        found += model_checks.pair_problems(self.distill_config, {"student": left, "teacher": layers})
        return found or (self._block_problems(shape, targets) if shape is not None else [])

    def _block_problems(self, shape: Shape, targets: Mapping[str, int | None]) -> list[str]:
        """Return the sizes of the pruned model that are not multiples of the weight blocks."""
        if self.fit.is_set:  # the search keeps to the blocks of the formats that it chooses from
            return []
        if self.pruning.target_params is None:
            return self.block_problems(shape.pruned(targets))
        # A search chooses only sizes that fit; targets, and sizes that are too small already, stay wrong.
        found = self.block_problems(shape, chosen=True)
        multiples = self.size_multiples(shape)
        found += [
            f"pruning: {name} {size} is not a multiple of {multiples[name.removeprefix('target_')]}, which "
            f"{self.quantization.algorithm} as {' and '.join(self.quantization.formats)} on tp {self.layout.tp} needs"
            for name, size in targets.items()
            if size is not None and size % multiples.get(name.removeprefix("target_"), 1)
        ]
        return found

    def block_problems(self, shape: Shape | None, chosen: bool = False) -> list[str]:
        """Return the sizes of a model that are not multiples of the weight blocks.

        Args:
            shape: the model, None if unknown.
            chosen: whether a search will choose its sizes.
        """
        block, to_hf = self.quantization.block(), "hf" in self.quantization.formats
        option = "--awq-block-size" if algorithms.has_block_setting(self.quantization.algorithm) else None
        return model_checks.block_problems(shape, self.layout.tp, block, to_hf, option, chosen)

    def size_multiples(self, shape: Shape | None = None) -> dict[str, int]:
        """Return, by hparam, the numbers of which sizes chosen for ``target_params`` must be multiples.

        Args:
            shape: shape of the teacher; None reads it.
        """
        if self.pruning.target_params is None:
            return {}
        known = shape or model_sizes.known(self.teacher)
        block, to_hf = self.quantization.block(), "hf" in self.quantization.formats
        return model_checks.size_multiples(known, self.layout.tp, block, to_hf)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as nested dictionaries."""
        return asdict(self)

"""Compute parameters, bytes and memory of a model from its checkpoint's configuration. Nothing heavy is imported.

The formulas for parameters and activations are those of Megatron-Core's GPT; attention stores no scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_modelopt_dropin.preflight import loss_memory

# Settings of the number of layers in the outer pipeline stages.
STAGES = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")


class UnknownModel(ValueError):
    """The sizes of a model cannot be computed from its configuration; the message contains the reason."""


# Fields of `Shape` for sizes with another name; a model with experts has no other inner size.
_FIELDS = {
    "moe_ffn_hidden_size": "ffn_hidden_size",
    "num_moe_experts": "experts",
    "moe_shared_expert_intermediate_size": "shared_expert_size",
}


def field_of(target: str) -> str:
    """Return the field of `Shape` that a flag such as ``target_num_moe_experts`` sets."""
    name = target.removeprefix("target_")
    return _FIELDS.get(name, name)


@dataclass(frozen=True)
class Shape:
    """The sizes of a GPT that determine its number of parameters."""

    name: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    tied: bool = False
    gated: bool = False
    bias: bool = False
    qkv_bias: bool = False
    layer_norm: bool = False
    qk_norm: bool = False
    learned_positions: int = 0
    experts: int = 0
    shared_expert_size: int = 0

    def pruned(
        self, targets: Mapping[str, int | float | None], drop_layers: list[int] | tuple[int, ...] | None = None
    ) -> Shape:
        """Return the shape after pruning.

        Args:
            targets: Sizes or fractions by the names of the flags; None keeps the size.
            drop_layers: Numbers of the layers to drop.
        """
        sizes = {field_of(name): size for name, size in targets.items() if size is not None}
        # A size below one is a fraction of the original size; pruning rounds it to the nearest valid size.
        known: dict[str, Any] = {
            name: size if size >= 1 else max(1, round(size * getattr(self, name)))
            for name, size in sizes.items()
            if hasattr(self, name)
        }
        if drop_layers:
            known["num_layers"] = self.num_layers - len(set(drop_layers))
        return replace(self, **known)

    @property
    def embedding_parameters(self) -> int:
        """Number of parameters of embedding and output layer."""
        return self.hidden_size * (self.vocab_size * (1 if self.tied else 2) + self.learned_positions)

    @property
    def linear_parameters(self) -> int:
        """Weights of the layers' matrices, which quantization stores in fewer bits."""
        h, width, groups = self.hidden_size, *self._attention_widths()
        attention = h * (width + 2 * groups) + width * h
        mlp = (3 if self.gated else 2) * h * self.ffn_hidden_size * max(1, self.experts)
        shared = (3 if self.gated else 2) * h * self.shared_expert_size
        return self.num_layers * (attention + mlp + shared)

    @property
    def body_parameters(self) -> int:
        """Number of parameters outside embedding and output layer."""
        h, width, groups = self.hidden_size, *self._attention_widths()
        norm = (2 if self.layer_norm else 1) * h
        rest = (
            h * self.experts + 2 * norm + (2 * self.kv_channels * (2 if self.layer_norm else 1) if self.qk_norm else 0)
        )
        if self.bias or self.qkv_bias:
            rest += width + 2 * groups
        if self.bias:
            rest += 2 * h + (2 if self.gated else 1) * self.ffn_hidden_size
        return self.linear_parameters + self.num_layers * rest + norm

    @property
    def parameters(self) -> int:
        """Number of all parameters."""
        return self.embedding_parameters + self.body_parameters

    def _attention_widths(self) -> tuple[int, int]:
        return self.num_attention_heads * self.kv_channels, self.num_query_groups * self.kv_channels

    def describe(self) -> str:
        """Return the shape in one line."""
        experts = f", {self.experts} experts" if self.experts else ""
        return (
            f"{self.num_layers} layers, hidden {self.hidden_size}, ffn {self.ffn_hidden_size}{experts}, "
            f"{self.num_attention_heads} heads in {self.num_query_groups} groups, vocabulary {self.vocab_size}"
        )


def read(checkpoint: str | Path) -> Shape:
    """Return the shape of a NeMo 2 checkpoint or a Hugging Face folder.

    Raises:
        UnknownModel: If the folder has no configuration, or the formulas do not cover the model.
    """
    folder = Path(checkpoint)
    content = _context(folder)
    try:
        if content is not None:
            return _from_nemo(str(content.get("_target_", "")).rpartition(".")[2], content.get("config") or {}, folder)
        if (folder / "config.json").is_file():
            return _from_hugging_face(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except UnknownModel:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise UnknownModel(f"its configuration cannot be read ({type(error).__name__}: {error})") from None
    raise UnknownModel(f"{checkpoint} holds neither context/model.yaml nor config.json")


def _context(folder: Path) -> Any:
    """Return the description of the model in a NeMo 2 checkpoint, None if it is missing or broken."""
    file = folder / "context" / "model.yaml"
    if not file.is_file():
        return None
    import yaml

    try:
        found = yaml.load(file.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, yaml.YAMLError):
        return None  # `checkpoint_files` reports it
    return found if isinstance(found, dict) else None


def config_of(checkpoint: str | Path | None) -> dict[str, Any]:
    """Return the configuration in a NeMo 2 checkpoint as its file has it, {} if there is none."""
    config = (_context(Path(checkpoint)) or {}).get("config") if checkpoint else None
    return config if isinstance(config, dict) else {}


def layers(checkpoint: str | Path | None) -> int | None:
    """Return the number of layers of any NeMo 2 checkpoint, None if its configuration does not contain it."""
    number = config_of(checkpoint).get("num_layers")
    return number if isinstance(number, int) else None


def stage_layers(layers: int, stages: int) -> tuple[int, int] | tuple[None, None]:
    """Return the number of layers in the first and in the last pipeline stage, None for both if all are equal.

    The remainder goes to the outer stages, because Megatron allows only those to differ.

    Raises:
        ValueError: If there are more stages than layers.
    """
    if layers < stages:
        raise ValueError(f"{layers} layers cannot be split over {stages} pipeline stages")
    if layers % stages == 0:
        return None, None
    outer = layers - (layers // stages) * (stages - 2)
    return outer // 2, outer - outer // 2


def unequal_stages(checkpoint: str | Path, stages: int) -> dict[str, int]:
    """Return the number of layers in a checkpoint's first and last pipeline stage, by setting; {} if all are equal.

    The number of layers of a pruned model is often not a multiple of the number of stages.

    Args:
        checkpoint: The model; only its configuration is read.
        stages: Number of pipeline stages.

    Raises:
        ValueError: If there are more stages than layers.
    """
    depth = layers(checkpoint)
    first, last = (None, None) if depth is None else stage_layers(depth, stages)
    if first is None or last is None:
        return {}
    return dict(zip(STAGES, (first, last), strict=True))


def _from_nemo(name: str, config: Mapping[str, Any], folder: Path) -> Shape:
    _only_known(config, ("hybrid_override_pattern", "multi_latent_attention", "heterogeneous_block_specs"))
    heads = config["num_attention_heads"]
    experts = config.get("num_moe_experts") or 0
    if experts and config.get("moe_layer_freq", 1) != 1:
        raise UnknownModel("layers with and without experts are mixed")
    learned = config.get("position_embedding_type") == "learned_absolute"
    return Shape(
        name=name,
        num_layers=config["num_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=(config.get("moe_ffn_hidden_size") if experts else None) or config["ffn_hidden_size"],
        num_attention_heads=heads,
        num_query_groups=config.get("num_query_groups") or heads,
        kv_channels=config.get("kv_channels") or config["hidden_size"] // heads,
        vocab_size=_vocabulary(config, folder),
        tied=bool(config.get("share_embeddings_and_output_weights")),
        gated=bool(config.get("gated_linear_unit")),
        bias=bool(config.get("add_bias_linear")),
        qkv_bias=bool(config.get("add_qkv_bias")),
        layer_norm=config.get("normalization", "LayerNorm") == "LayerNorm",
        qk_norm=bool(config.get("qk_layernorm")),
        learned_positions=(config.get("seq_length") or 0) if learned else 0,
        experts=experts,
        shared_expert_size=config.get("moe_shared_expert_intermediate_size") or 0,
    )


def _only_known(config: Mapping[str, Any], unknown: tuple[str, ...]) -> None:
    for name in unknown:
        if config.get(name):
            raise UnknownModel(f"models with {name} are not covered")
    missing = [name for name in ("num_layers", "hidden_size", "num_attention_heads") if not config.get(name)]
    if missing:
        raise UnknownModel(f"its configuration has no {', '.join(missing)}")


def _vocabulary(config: Mapping[str, Any], folder: Path) -> int:
    """Return the padded size of the vocabulary; if the configuration has none, it is the tokenizer's."""
    size = config.get("vocab_size")
    if size:
        return size
    for file in sorted((folder / "context").rglob("tokenizer.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        entries = {*content.get("model", {}).get("vocab", {})} | {one["content"] for one in content["added_tokens"]}
        unit = config.get("make_vocab_size_divisible_by") or 1
        return -(-len(entries) // unit) * unit
    raise UnknownModel("its configuration has no vocab_size and there is no tokenizer.json next to it")


def _from_hugging_face(config: Mapping[str, Any]) -> Shape:
    name = (config.get("architectures") or ["a Hugging Face model"])[0]
    try:
        heads = config["num_attention_heads"]
        return Shape(
            name=name,
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            kv_channels=config.get("head_dim") or config["hidden_size"] // heads,
            vocab_size=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings")),
            gated="rms_norm_eps" in config,  # model families with RMSNorm have gated MLPs
            bias="rms_norm_eps" not in config,
            layer_norm="rms_norm_eps" not in config,
        )
    except KeyError as missing:
        raise UnknownModel(f"the configuration of {name} has no {missing}") from None


def known(path: str | Path | None) -> Shape | None:
    """Return a checkpoint's shape, None if there is no path or the sizes cannot be computed."""
    try:
        return read(path) if path else None
    except UnknownModel:
        return None


def quantized_bytes(shape: Shape, bits: float) -> float:
    """Return the bytes of a checkpoint whose matrices take ``bits`` for each weight; everything else takes 16."""
    return shape.linear_parameters * bits / 8 + 2 * (shape.parameters - shape.linear_parameters)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by purpose."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return sum(self.parts.values())


def forward_memory(shape: Shape, batch: int, seq: int, tp: int, pp: int, width: int, logits: int = 0) -> Memory:
    """Estimate the memory of forward passes without gradients on one rank, which stop before the output layer.

    The comparison after quantization computes logits in pieces of 16 MiB, which are not counted.

    Args:
        shape: The model.
        batch: Sequences of a micro-batch.
        seq: Tokens of a sequence.
        tp: Tensor-parallel ranks.
        pp: Pipeline stages.
        width: Bytes of a weight or activation.
        logits: Positions whose fp32 logits are in memory at a time, of all models together.
    """
    attention = shape.num_attention_heads * shape.kv_channels + 2 * shape.num_query_groups * shape.kv_channels
    units = 4 * shape.hidden_size + (attention + 3 * shape.ffn_hidden_size) / tp
    return Memory(
        {
            "weights": width * shape.parameters / (tp * pp),
            "activations": batch * seq * units * width,
            "logits": 4.0 * logits * shape.vocab_size / tp,
        }
    )


def training_memory(
    student: Shape,
    teacher: Shape | None,
    batch: int,
    seq: int,
    tp: int,
    pp: int,
    dp: int,
    width: int,
    device: str = "cuda",
) -> Memory:
    """Estimate the memory of a training step on one rank: Adam in fp32, sharded over the data-parallel ranks.

    Args:
        student: The model that is trained.
        teacher: The frozen model, None if there is none.
        batch: Sequences of a micro-batch.
        seq: Tokens of a sequence.
        tp: Tensor-parallel ranks.
        pp: Pipeline stages.
        dp: Data-parallel ranks.
        width: Bytes of a weight or activation, 2 or 4; fp32 weights need no second copy.
        device: Type of the device, which determines the size of the chunks of logits.
    """
    own = student.parameters / (tp * pp)
    # Each CPU rank has the whole optimizer.
    optimizer = (8 if width == 4 else 12) / (1 if device == "cpu" else dp)
    queries, keys = student.num_attention_heads * student.kv_channels, student.num_query_groups * student.kv_channels
    inner = (4 if student.gated else 2) * student.ffn_hidden_size
    # What Megatron's own layers store for a token (see `benchmarks/kd_memory.py`); Transformer Engine's store less.
    per_token = (6 * student.hidden_size + 6 * queries + 4 * keys + inner) * width / tp
    logits = 4.0 * batch * seq * student.vocab_size / tp * 2
    if teacher is not None:
        sizes = student.hidden_size, teacher.hidden_size, width, tp, device
        both = loss_memory.Sizes(batch * seq, student.vocab_size // tp, *sizes)
        logits = min(both.chunked(), both.fused())
    # A pipeline stores up to pp micro-batches of layers / pp layers: the activations of one whole model.
    parts = {
        "weights": width * own,
        "gradients": 4 * own,
        "optimizer": optimizer * own,
        "activations": batch * seq * per_token * student.num_layers,
        "logits": logits,
    }
    if teacher is not None:
        parts["teacher"] = width * teacher.parameters / (tp * pp)
    return Memory(parts)

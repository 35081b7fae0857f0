"""Settings of a distillation, and the checks that need only settings.

The name of a layer is its path in the Megatron-Core model, with the layer's index in the whole model, for example
``decoder.layers.11`` or ``decoder.layers.11.input_layernorm``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from modelopt.torch.distill import DistillationLossBalancer
from nemo_modelopt_dropin.errors import suggestion
from nemo_modelopt_dropin.preflight import loss_file
from nemo_modelopt_dropin.preflight.loss_file import LAYER_INDEX

from .._divergence.vocab_parallel import DIRECTIONS, FORWARD, JSD
from ..errors import MissingFileError, ModelOptConfigError, UnknownSettingError, one_of
from ._fusion import FUSED_LOGITS
from .loss import LOSS_WEIGHTS, HiddenStateCosineLoss, MSELoss

_SWITCHES = (
    "skip_lm_loss",
    "logit_kl_temperature_squared",
    "logit_kl_in_place",
    "validation_metrics",
    "allow_other_tokenizer",
)
INTERMEDIATE_LOSSES = {"cosine": HiddenStateCosineLoss, "mse": MSELoss}


@dataclass
class DistillationConfig:
    """Settings of a distillation, as in the YAML file.

    Attributes:
        intermediate_layer_pairs: (student layer, teacher layer) or (student layer, teacher layer, loss); the loss is
            ``cosine`` (default) or ``mse``.
        logit_layers: (student layer, teacher layer) that output the logits.
        skip_lm_loss: leave the language-model loss out of training.
        kd_loss_scale: weight of the distillation loss.
        criterion: losses by layer pair; filled in from the settings above.
        loss_balancer: combines the losses; filled in from the settings above.
        logit_kl_temperature: divides the logits of student and teacher.
        logit_kl_direction: ``forward`` for KL(teacher || student), ``reverse`` for KL(student || teacher), ``jsd`` for
            the symmetric Jensen-Shannon divergence.
        logit_kl_temperature_squared: multiply the logits loss by the square of the temperature.
        logit_kl_topk: compare only the teacher's top-k logits, and all others as one bucket; None for all entries.
        logit_kl_in_place: overwrite the student's logits with their gradient; nothing else may need them then.
        loss_weights: fixed weights of ``kd_logits``, ``intermediate`` and ``lm`` (1 if one is missing) instead of the
            dynamic balance; None for the balance.
        fused_logits: compute logits and logits loss together, chunk by chunk, without holding the logits of a
            micro-batch. ``auto``: if that is exact for the model; ``on``: raise an error if it is not; ``off``: never.
        validation_metrics: run the teacher in validation as well, and log the metrics of training as ``val_...``.
        allow_other_tokenizer: distill from a teacher with a tokenizer that differs from the student's.
        logit_kl_beta: weight of the teacher in the mixture of ``jsd``, from 0 (forward KL) to 1 (reverse KL); None for
            0.5.
        logit_kl_vocabulary: ``same`` compares the logits of one vocabulary; ``aligned-text`` the sorted probabilities
            of a teacher with another tokenizer, where the texts before both models' tokens are the same.
        sample_length: tokens of a sample, set by the model when it is built; not a setting.

    Raises:
        ModelOptConfigError: If a setting cannot be used.
    """

    intermediate_layer_pairs: list[tuple[str, ...]] = field(default_factory=list)
    logit_layers: tuple[str, str] = ("output_layer", "output_layer")
    skip_lm_loss: bool = True
    kd_loss_scale: float = 1.0
    criterion: dict[tuple[str, str], torch.nn.Module] | None = None
    loss_balancer: DistillationLossBalancer | None = None
    logit_kl_temperature: float = 1.0
    logit_kl_direction: str = FORWARD
    logit_kl_temperature_squared: bool = True
    logit_kl_topk: int | None = None
    logit_kl_in_place: bool = False
    loss_weights: dict[str, float] | None = None
    fused_logits: str = "auto"
    validation_metrics: bool = False
    allow_other_tokenizer: bool = False
    logit_kl_beta: float | None = None
    logit_kl_vocabulary: str = loss_file.SAME
    sample_length: int | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def logit_pair(self) -> tuple[str, str]:
        """The layers of the logits as a tuple; YAML loads ``logit_layers`` as a list."""
        student, teacher = self.logit_layers
        return student, teacher

    def __post_init__(self):
        _check_names("logit_layers", self.logit_layers, self.logit_layers, (2,))
        if not _is_list(self.intermediate_layer_pairs):
            raise ModelOptConfigError(
                f"self.intermediate_layer_pairs={self.intermediate_layer_pairs!r} must be a list of [student layer, "
                "teacher layer] pairs."
            )
        for pair in self.intermediate_layer_pairs:
            _check_names("intermediate_layer_pairs", self.intermediate_layer_pairs, pair, (2, 3))
            if len(pair) == 3:
                one_of(f"intermediate loss of {tuple(pair[:2])}", pair[2], INTERMEDIATE_LOSSES)
        pairs = [self.logit_pair, *(tuple(pair[:2]) for pair in self.intermediate_layer_pairs)]
        repeated = sorted({pair for pair in pairs if pairs.count(pair) > 1})
        if repeated:
            raise ModelOptConfigError(f"The layer pairs {repeated} are listed more than once; list each pair once.")
        self.kd_loss_scale = _positive("self.kd_loss_scale", self.kd_loss_scale)
        self.logit_kl_temperature = _positive("logit_kl_temperature", self.logit_kl_temperature)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ModelOptConfigError(f"{name}={getattr(self, name)!r} must be true or false.")
        one_of("logit_kl_direction", self.logit_kl_direction, DIRECTIONS)
        if self.logit_kl_beta is not None:
            self.logit_kl_beta = _share("logit_kl_beta", self.logit_kl_beta)
            if self.logit_kl_direction != JSD:
                raise ModelOptConfigError(
                    f"logit_kl_beta={self.logit_kl_beta} belongs to logit_kl_direction='jsd', but the direction is "
                    f"{self.logit_kl_direction!r}. Set logit_kl_direction to jsd, or remove logit_kl_beta."
                )
        self._check_objective()
        one_of("logit_kl_vocabulary", self.logit_kl_vocabulary, loss_file.VOCABULARIES)

    def _check_objective(self):
        if isinstance(self.fused_logits, bool):  # as YAML 1.1 reads on and off
            self.fused_logits = "on" if self.fused_logits else "off"
        one_of("fused_logits", self.fused_logits, FUSED_LOGITS)
        if self.logit_kl_topk is not None and (type(self.logit_kl_topk) is not int or self.logit_kl_topk < 1):
            raise ModelOptConfigError(f"logit_kl_topk={self.logit_kl_topk!r} must be a positive integer, or None.")
        if self.logit_kl_in_place and not self.skip_lm_loss:
            raise ModelOptConfigError(
                "logit_kl_in_place=True overwrites the logits that the language-model loss needs; set skip_lm_loss to "
                "true, or remove logit_kl_in_place."
            )
        if self.loss_weights is not None:
            self.loss_weights = _loss_weights(self.loss_weights)
            if self.kd_loss_scale != 1.0:
                raise ModelOptConfigError(
                    f"kd_loss_scale={self.kd_loss_scale} belongs to the dynamic balance, which loss_weights replaces; "
                    "set only one of them."
                )
            if self.skip_lm_loss and "lm" in self.loss_weights:
                raise ModelOptConfigError(
                    f"loss_weights sets the weight of the language-model loss to {self.loss_weights['lm']}, but "
                    "skip_lm_loss is true, which leaves it out. Set skip_lm_loss to false, or remove 'lm'."
                )


# Pickles, NeMo contexts and NeMo-Run's YAML store the module of a class: the stock one, so that stock can read them.
DistillationConfig.__module__ = "nemo.collections.llm.modelopt.distill.utils"


def read_distillation_config(
    config_path: str | Path | DistillationConfig | None, parse: Callable[[Any], Any] = yaml.safe_load
) -> DistillationConfig:
    """Return the settings in a YAML file, the settings passed, or the defaults.

    Args:
        config_path: The file, the settings, or None.
        parse: Reads YAML from an open file.

    Raises:
        ModelOptConfigError: If the file is missing, is not a mapping, or contains unknown or invalid settings.
    """
    if config_path is None:
        return DistillationConfig()
    if isinstance(config_path, DistillationConfig):
        return config_path
    path = config_path
    try:
        with open(path) as file:
            settings = parse(file)
    except OSError as error:
        kind = MissingFileError if isinstance(error, FileNotFoundError) else ModelOptConfigError
        raise kind(f"The distillation config {str(path)!r} is not a file. Pass a YAML file, or None.") from error
    except yaml.YAMLError as error:
        raise ModelOptConfigError(f"The distillation config {str(path)!r} is not valid YAML: {error}") from error
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise ModelOptConfigError(
            f"The distillation config {str(path)!r} holds a {type(settings).__name__}; it must map settings to values."
        )
    _known_settings(settings, str(path))
    return DistillationConfig(**settings)


def options_of_logits_loss(config: DistillationConfig) -> dict[str, Any]:
    """Return the arguments of the logits loss that differ from its defaults."""
    options: dict[str, Any] = {}
    if config.logit_kl_temperature != 1.0:
        options["temperature"] = config.logit_kl_temperature
        if config.logit_kl_temperature_squared:
            options["temperature_squared"] = True
    if config.logit_kl_direction != FORWARD:
        options["direction"] = config.logit_kl_direction
    if config.logit_kl_beta is not None:
        options["beta"] = config.logit_kl_beta
    if config.logit_kl_topk is not None:
        options["topk"] = config.logit_kl_topk
    if config.logit_kl_in_place:
        options["in_place"] = True
    return options


def check_models(config: DistillationConfig, student: Any, teacher: Any) -> None:
    """Raise an error if two models cannot be distilled with these settings; it reads only their configurations.

    Args:
        config: settings.
        student: Megatron-Core configuration of the student.
        teacher: that of the teacher, with the student's parallel layout.

    Raises:
        ModelOptConfigError: With the layer pair or the setting.
    """
    if (_integer(student, "tensor_model_parallel_size") or 1) > 1 and getattr(
        student, "parallel_output", True
    ) is False:
        raise ModelOptConfigError(
            "parallel_output=False gathers the logits, but the distillation loss works on tensor-parallel shards. "
            "Leave it True."
        )
    stages = _integer(student, "pipeline_model_parallel_size") or 1
    if config.validation_metrics and stages > 1:
        raise ModelOptConfigError(
            f"validation_metrics=True needs pipeline_model_parallel_size=1, not {stages}: in validation, pipeline "
            "stages exchange only the student's activations. Remove it."
        )
    for pair in config.intermediate_layer_pairs:
        for name, model, whose in ((pair[0], student, "student"), (pair[1], teacher, "teacher")):
            check_layer_exists(name, model, whose)
        both = stage_of_layer(pair[0], student), stage_of_layer(pair[1], teacher)
        if both[0] != both[1] and _integer(teacher, "pipeline_model_parallel_size") is not None:
            raise ModelOptConfigError(
                f"The intermediate pair {tuple(pair[:2])} does not fall on one pipeline stage: the student's layer is "
                f"on stage {both[0]}, the teacher's on stage {both[1]} (first layers of the stages: "
                f"{first_layers(student)} and {first_layers(teacher)}). Choose layers of one stage."
            )
        reason = recomputed(pair[0], student)
        if reason:
            raise ModelOptConfigError(
                f"The intermediate pair {tuple(pair[:2])} cannot be trained: {pair[0]!r} runs inside activation "
                f"recomputation ({reason}), which drops its gradient. Capture a layer outside it, for example "
                "'decoder.final_layernorm', or change the recomputation."
            )


def check_layer_exists(name: str, model: Any, whose: str) -> None:
    """Raise an error if the index of a layer is too large for the model.

    Raises:
        ModelOptConfigError: With the layer, and the number of layers.
    """
    match, layers = LAYER_INDEX.search(name), _integer(model, "num_layers")
    if match and layers is not None and int(match.group()) >= layers:
        raise ModelOptConfigError(f"Layer {name!r} does not exist: the {whose} has {layers} layers, counted from 0.")


def first_layers(model: Any) -> list[int] | None:
    """Return the index of the first layer of each pipeline stage; None if only Megatron's layout defines it."""
    stages, layers = _integer(model, "pipeline_model_parallel_size") or 1, _integer(model, "num_layers")
    if stages == 1:
        return [0]
    if layers is None or getattr(model, "pipeline_model_parallel_layout", None):
        return None
    embedding = bool(getattr(model, "account_for_embedding_in_pipeline_split", False))
    loss = bool(getattr(model, "account_for_loss_in_pipeline_split", False))
    first = getattr(model, "num_layers_in_first_pipeline_stage", None)
    last = getattr(model, "num_layers_in_last_pipeline_stage", None)
    if first is None and last is None:
        per_stage = (layers + embedding + loss) // stages
        return [max(0, stage * per_stage - embedding) for stage in range(stages)]
    others = stages - (first is not None) - (last is not None)
    per_stage = (layers - (first or 0) - (last or 0)) // max(1, others)
    sizes = [per_stage] * stages
    if first is not None:
        sizes[0] = first
    if last is not None:
        sizes[-1] = last
    return [sum(sizes[:stage]) for stage in range(stages)]


def stage_of_layer(name: str, model: Any) -> int:
    """Return the pipeline stage of a layer; a layer without an index is on the last stage.

    With one of Megatron's layouts, it assumes the last stage; this is checked when the losses are created.
    """
    match, starts = LAYER_INDEX.search(name), first_layers(model)
    if not match or starts is None:
        return last_stage(model)
    return max(stage for stage, first in enumerate(starts) if first <= int(match.group()))


def last_stage(model: Any) -> int:
    """Return the number of the last pipeline stage."""
    return (_integer(model, "pipeline_model_parallel_size") or 1) - 1


def pairs_of_stages(config: DistillationConfig, student: Any) -> list[int]:
    """Return the stages of the intermediate pairs before the last pipeline stage, in the order of the settings."""
    stages = [stage_of_layer(pair[0], student) for pair in config.intermediate_layer_pairs]
    return [stage for stage in stages if stage < student.pipeline_model_parallel_size - 1]


def recomputed(name: str, model: Any) -> str | None:
    """Return the recomputation setting that would drop the gradient of a layer's captured output, or None.

    Outputs are captured in the forward pass, in which Megatron runs recomputed parts without a graph.
    """
    match = LAYER_INDEX.search(name)
    granularity = getattr(model, "recompute_granularity", None)
    if not match or not isinstance(granularity, str):
        return None
    if granularity == "full":
        starts = first_layers(model)
        local = int(match.group()) - (starts[stage_of_layer(name, model)] if starts else 0)
        if model.recompute_method == "block" and local >= (model.recompute_num_layers or 0):
            return None
        return f"recompute_granularity='full', recompute_method={model.recompute_method!r}"
    inside = {
        "core_attn": (".core_attention",),
        "mlp": (".mlp",),
        "moe": (".mlp",),
        "moe_act": (".mlp.",),
        "shared_experts": (".shared_experts",),
        "layernorm": (".input_layernorm", ".pre_mlp_layernorm"),
        "mla_up_proj": (".self_attention.linear_",),
    }
    rest = name[match.end() :]
    for module in getattr(model, "recompute_modules", None) or ():
        if any(part in rest for part in inside.get(module, ())):
            return f"recompute_modules contains {module!r}"
    return None


def _integer(model: Any, name: str) -> int | None:
    """Return a number of a model's configuration, or None if a stand-in for one lacks it."""
    value = getattr(model, name, None)
    return value if isinstance(value, int) else None


def _known_settings(settings: dict, where: str) -> None:
    known = [f.name for f in fields(DistillationConfig) if f.init]
    for name in settings:
        if name not in known:
            hint = suggestion(name, known)
            raise UnknownSettingError(f"{where}: there is no setting {name!r}; there are {known}.{hint}")


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _check_names(setting: str, given: Any, value: Any, lengths: tuple[int, ...]) -> None:
    """Raise an error unless a part of a setting is a list or tuple of layer names of an allowed length."""
    if not _is_list(value) or len(value) not in lengths or not all(isinstance(v, str) and v for v in value):
        wanted = " or ".join(str(length) for length in lengths)
        raise ModelOptConfigError(
            f"self.{setting}={given!r}: {value!r} must hold {wanted} names: [student layer, teacher layer"
            + ("" if len(lengths) == 1 else ", optionally the loss")
            + "]."
        )


def _loss_weights(value: Any) -> dict[str, float]:
    """Return the fixed weights as numbers, each zero or positive."""
    if not isinstance(value, Mapping) or not set(value) <= set(LOSS_WEIGHTS):
        raise ModelOptConfigError(f"loss_weights={value!r} must map some of {list(LOSS_WEIGHTS)} to numbers.")
    return {
        name: 0.0 if type(weight) in (int, float) and weight == 0 else _positive(f"loss_weights[{name!r}]", weight)
        for name, weight in value.items()
    }


def _positive(name: str, value: Any) -> float:
    """Return the value as a positive number."""
    number = _number(value)
    if not 0 < number < float("inf"):
        raise ModelOptConfigError(f"{name}={value!r} must be a positive number.")
    return number


def _share(name: str, value: Any) -> float:
    """Return the value as a number between 0 and 1."""
    number = _number(value)
    if not 0 <= number <= 1:
        raise ModelOptConfigError(f"{name}={value!r} must be a number between 0 and 1.")
    return number


def _number(value: Any) -> float:
    """Return the value as a number, NaN if it is none; YAML 1.1 reads 1e-1 as text."""
    try:
        return float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return float("nan")

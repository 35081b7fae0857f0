"""Distillation losses on Megatron-Core tensors, and the balancer that combines them.

Axes: s sequence, b batch, h hidden, v vocabulary. Under tensor parallelism v is a shard; under sequence parallelism
the s of intermediate activations is a shard. A loss returns the tuple of ``post_forward``: the loss of every token
[b, s], and whether its value still has to be summed over the tensor-parallel ranks.
"""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Mapping

import torch
import torch.nn as nn
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from nemo.utils import logging
from torch import Tensor
from torch.nn.modules.loss import _Loss

import modelopt.torch.distill as mtd
from modelopt.torch.distill import DistillationLossBalancer

from .._divergence.recorded_topk import RecordedLogits, recorded_divergence
from .._divergence.vocab_parallel import DIRECTIONS, FORWARD, REVERSE, kl_divergence
from ..errors import ModelOptConfigError, one_of
from ._deferred_logits import DeferredLogits, PairedLogits, SummedLoss

# Parts of the loss that can have fixed weights.
LOSS_WEIGHTS = ("kd_logits", "intermediate", "lm")
_LOGITS = "Logits"  # in the class name of every loss on logits


class BaseLoss(_Loss, metaclass=ABCMeta):
    """Base of the distillation losses: projects the student's tensor, and transposes the result to [b, s]."""

    def __init__(self, model_config: TransformerConfig, projection_layer: nn.Module | None = None):
        """Store the configuration.

        Args:
            model_config: Megatron-Core configuration of the student.
            projection_layer: projects student activations to the teacher's hidden size.
        """
        super().__init__()
        self._config = model_config
        self._projection = projection_layer

    def pre_forward(self, predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the student's tensor, projected if needed, and the teacher's without its graph.

        Megatron layers return (output, bias) or (hidden states, context); the first element is used.
        """
        student, teacher = (x[0] if isinstance(x, tuple) else x for x in (predictions, targets))
        if self._projection is not None:
            student = self._projection(student)
        return student, teacher.detach()

    def post_forward(self, loss: Tensor, tp_reduce: bool = False, is_sequence_parallel: bool = False):
        """Return ([b, s] loss, tp_reduce, is_sequence_parallel) from an [s, b] loss.

        Args:
            loss: loss of every token [s, b].
            tp_reduce: each tensor-parallel rank holds a part of every token's loss.
            is_sequence_parallel: each tensor-parallel rank holds its own part of the sequence.
        """
        return loss.transpose(0, 1).contiguous(), tp_reduce, is_sequence_parallel


class MSELoss(BaseLoss):
    """Squared error of two activations, summed over the hidden axis."""

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the squared error of each token.

        Args:
            predictions: student activations [s, b, h].
            targets: teacher activations [s, b, h].

        Returns:
            ([b, s] loss, tp_reduce, is_sequence_parallel).
        """
        student, teacher = self.pre_forward(predictions, targets)
        _same_shape(student, teacher, "hidden sizes", type(self).__name__)
        squared = F.mse_loss(student, teacher, reduction="none").sum(dim=-1)
        split = getattr(self._config, "sequence_parallel", False) is True
        return self.post_forward(squared, is_sequence_parallel=split)


class HiddenStateCosineLoss(BaseLoss):
    """One minus the cosine of two activations along the full hidden axis."""

    def __init__(self, model_config: TransformerConfig, projection_layer: nn.Module | None = None):
        """Log a warning if tensor parallelism may have split the hidden axis.

        Args:
            model_config: Megatron-Core configuration of the student.
            projection_layer: projects student activations to the teacher's hidden size.
        """
        super().__init__(model_config, projection_layer=projection_layer)
        if model_config.tensor_model_parallel_size > 1 and not model_config.sequence_parallel:
            logging.warning(
                "HiddenStateCosineLoss needs activations with the full hidden axis. With tensor parallelism, capture "
                "the output of a norm or of a whole layer, or turn sequence parallelism on."
            )

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the cosine distance of each token.

        Args:
            predictions: student activations [s, b, h].
            targets: teacher activations [s, b, h].

        Returns:
            ([b, s] loss, tp_reduce, is_sequence_parallel).
        """
        student, teacher = self.pre_forward(predictions, targets)
        _same_shape(student, teacher, "hidden sizes", type(self).__name__)
        distance = 1.0 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)
        return self.post_forward(distance, is_sequence_parallel=self._config.sequence_parallel)


class LogitsKLLoss(BaseLoss):
    """Divergence of two sets of logits: exact, chunked and vocabulary-parallel (see ``_divergence``)."""

    def __init__(
        self,
        model_config: TransformerConfig,
        temperature: float = 1.0,
        reverse: bool = False,
        *,
        temperature_squared: bool = False,
        direction: str | None = None,
        topk: int | None = None,
        in_place: bool = False,
        beta: float = 0.5,
    ):
        """Choose the divergence.

        Args:
            model_config: Megatron-Core configuration of the student.
            temperature: divides both logits.
            reverse: KL(student || teacher) instead of KL(teacher || student).
            temperature_squared: multiply the loss by temperature ** 2, which keeps the size of its gradients
                independent of the temperature (Hinton et al., arXiv 1503.02531).
            direction: ``forward``, ``reverse`` or ``jsd``; by default set by ``reverse``.
            topk: compare only the teacher's top-k logits, and all others as one bucket.
            in_place: overwrite the student's logits with their gradient; nothing else may need them.
            beta: weight of the teacher in the mixture of ``jsd``; 0 is the forward and 1 the reverse KL.

        Raises:
            ModelOptConfigError: If the temperature is not positive, the direction does not exist, or beta is not
                between 0 and 1.
        """
        super().__init__(model_config)
        if not temperature > 0:
            raise ModelOptConfigError(f"temperature={temperature!r} must be a positive number.")
        if direction is None:
            direction = REVERSE if reverse else FORWARD
        one_of("direction", direction, DIRECTIONS)
        if not 0 <= beta <= 1:
            raise ModelOptConfigError(f"beta={beta!r} must be a number between 0 and 1.")
        self._temperature = temperature
        self._reverse = reverse
        self._direction = direction
        self._beta = beta
        self._topk = topk
        self._in_place = in_place
        # Whether nothing else uses the teacher's logits, so that the gradient can overwrite them.
        self.reuse_teacher = False
        # Number of vocabulary entries that both models have, if their padding differs.
        self.entries: int | None = None
        self._factor = temperature**2 if temperature_squared else 1.0

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Return the divergence of each token, already summed over the tensor-parallel ranks.

        Args:
            predictions: student logits [s, b, v].
            targets: teacher logits [s, b, v], or recorded logits.

        Returns:
            ([b, s] loss, tp_reduce, is_sequence_parallel). For deferred logits the loss is a `SummedLoss`.

        Raises:
            ModelOptConfigError: If the vocabularies differ.
        """
        first = [x[0] if isinstance(x, tuple) else x for x in (predictions, targets)]
        if isinstance(first[0], DeferredLogits):
            return SummedLoss(self.pair(*first), "divergence"), False, False
        if isinstance(first[1], RecordedLogits):
            return self._from_recorded(*first)
        student, teacher = self.pre_forward(predictions, targets)
        _same_shape(student, teacher, "vocabulary sizes", type(self).__name__)
        split = self._config.tensor_model_parallel_size > 1
        if self.entries is not None:
            rank = parallel_state.get_tensor_model_parallel_rank() if split else 0
            student, teacher = (_first_entries(x, self.entries, rank) for x in (student, teacher))
        loss = kl_divergence(
            student,
            teacher,
            self._temperature,
            self._direction,
            parallel_state.get_tensor_model_parallel_group() if split else None,
            topk=self._topk,
            in_place=self._in_place,
            reuse_teacher=self.reuse_teacher,
            beta=self._beta,
        )
        return self.post_forward(loss if self._factor == 1.0 else loss * self._factor)

    def _from_recorded(self, student: Tensor, teacher: RecordedLogits):
        split = self._config.tensor_model_parallel_size > 1
        group = parallel_state.get_tensor_model_parallel_group() if split else None
        loss = recorded_divergence(student, teacher, self._direction, group, self._topk, self._in_place, self._beta)
        return self.post_forward(loss if self._factor == 1.0 else loss * self._factor)

    def pair(self, student: DeferredLogits, teacher: DeferredLogits) -> PairedLogits:
        """Return the pair of both models' deferred logits with this divergence; the same object for later calls.

        Args:
            student: deferred logits of the student.
            teacher: deferred logits of the teacher.
        """
        if student.pair is None:
            objective = {name: getattr(self, f"_{name}") for name in ("temperature", "direction", "topk", "beta")}
            student.pair = PairedLogits(student, teacher, objective, self._factor)
        return student.pair


class LogitsAndIntermediatesLossBalancer(DistillationLossBalancer):
    """Combine the logits loss, the mean of the intermediate losses and the language-model loss.

    Without weights, the intermediate loss is rescaled to the value of the logits loss, and the distillation loss to
    that of the language-model loss. The scales are constants for the gradient and stay on the device, so nothing is
    synchronised. With weights, the total is the weighted sum.
    """

    def __init__(
        self,
        kd_loss_scale: float = 1.0,
        skip_original_loss: bool = False,
        *,
        weights: Mapping[str, float] | None = None,
    ):
        """Choose the weights.

        Args:
            kd_loss_scale: weight of the distillation loss, with or without a language-model loss.
            skip_original_loss: ignore the language-model loss.
            weights: use these fixed weights of ``kd_logits``, ``intermediate`` and ``lm``; 1 if one is missing.
        """
        super().__init__()
        self._kd_loss_scale = kd_loss_scale
        self._skip_original_loss = skip_original_loss
        self._weights = None if weights is None else {name: float(weights.get(name, 1.0)) for name in LOSS_WEIGHTS}

    def forward(self, loss_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the total and its parts.

        Args:
            loss_dict: scalar losses by name, as collected by ``mtd.DistillationModel.compute_kd_loss``.

        Returns:
            Dictionary of scalars: ``kd_loss`` (the total to train on), ``logits_loss``, ``intermediate_loss``.

        Raises:
            ModelOptConfigError: If there is not exactly one loss on logits.
        """
        logits, intermediate, original = split_losses(loss_dict)
        if self._skip_original_loss:
            original = None
        if self._weights is None:
            total = self._balanced(logits, intermediate, original)
        else:
            parts = zip(self._weights.values(), (logits, intermediate, original), strict=True)
            total = sum(weight * part for weight, part in parts if part is not None)
        if intermediate is None:
            intermediate = torch.zeros_like(logits)
        return {"kd_loss": total, "logits_loss": logits, "intermediate_loss": intermediate}

    def _balanced(self, logits: Tensor, intermediate: Tensor | None, original: Tensor | None) -> Tensor:
        kd_loss = logits if intermediate is None else logits + rescale(intermediate, logits)
        if original is None:
            return kd_loss * self._kd_loss_scale
        return original + rescale(kd_loss, original) * self._kd_loss_scale


class ProjectionLayer(MegatronModule):
    """Linear map from the student's hidden size to the teacher's; the identity if they are equal."""

    def __init__(self, student_config: TransformerConfig, teacher_config: TransformerConfig):
        """Create the map.

        Args:
            student_config: Megatron-Core configuration of the student.
            teacher_config: Megatron-Core configuration of the teacher.
        """
        super().__init__(config=student_config)
        sizes = student_config.hidden_size, teacher_config.hidden_size
        self._fit: nn.Module = nn.Identity() if sizes[0] == sizes[1] else nn.Linear(*sizes)
        self.apply(self._init_weights)
        # Drawn on the host, so that the numbers of a seed are stock's; then where Megatron creates its weights.
        if not getattr(student_config, "use_cpu_initialization", True) and torch.cuda.is_available():
            self.cuda()

    def forward(self, student_tensor: Tensor):
        """Return the student's activations [s, b, h] in the teacher's hidden size."""
        return self._fit(student_tensor)

    def _init_weights(self, module):
        if not isinstance(module, nn.Linear):
            return
        self.config.init_method(module.weight.data)
        nn.init.zeros_(module.bias)
        for parameter in module.parameters():
            # Megatron sums the gradients of parameters with this mark over the ranks that share a sequence.
            parameter.sequence_parallel = self.config.sequence_parallel


class _AllReduce(torch.autograd.Function):
    """All-reduce with an all-reduced gradient, for values that each rank uses differently."""

    @staticmethod
    def forward(ctx, op, group, tensor):
        ctx.op, ctx.group = op, group
        reduced = tensor.clone()
        torch.distributed.all_reduce(reduced, op=op, group=group)
        return reduced

    @staticmethod
    def backward(ctx, grad_output):
        return None, None, _AllReduce.apply(ctx.op, ctx.group, grad_output)


def all_reduce_autograd(tensor, op=torch.distributed.ReduceOp.SUM, group=torch.distributed.group.WORLD):
    """Return ``tensor`` reduced over ``group``, with an all-reduced gradient (each rank uses it differently)."""
    return _AllReduce.apply(op, group, tensor)


class _SumValue(torch.autograd.Function):
    """Sum the value over ranks and pass the gradient on: each rank backpropagates only through its own part."""

    @staticmethod
    def forward(ctx, tensor, group):
        total = tensor.detach().clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad_output):
        return grad_output, None


def sum_value_over(tensor: Tensor, group) -> Tensor:
    """Return the sum of ``tensor`` over ``group``; gradients flow only to this rank's summand."""
    return _SumValue.apply(tensor, group)


def split_losses(losses: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (logits loss, mean of the intermediate losses or None, language-model loss or None).

    Raises:
        ModelOptConfigError: If there is not exactly one loss on logits.
    """
    distillation = {name: loss for name, loss in losses.items() if name != mtd.loss_balancers.STUDENT_LOSS_KEY}
    on_logits = [name for name in distillation if _LOGITS in name]
    if len(on_logits) != 1:
        raise ModelOptConfigError(
            f"LogitsAndIntermediatesLossBalancer needs exactly one loss on logits (a class with {_LOGITS!r} in its "
            f"name), got {sorted(distillation)}."
        )
    logits = distillation.pop(on_logits[0])
    intermediate = torch.stack(list(distillation.values())).mean() if distillation else None
    return logits, intermediate, losses.get(mtd.loss_balancers.STUDENT_LOSS_KEY)


def rescale(loss: Tensor, target: Tensor) -> Tensor:
    """Return ``loss`` times the constant that makes its value equal to that of ``target``.

    A loss of zero (equal models, a fully masked micro-batch) has no such constant and is returned unchanged.
    """
    value, wanted = loss.detach(), target.detach().clamp(min=0.0)
    return loss * torch.where(value > 0, wanted / torch.where(value > 0, value, 1.0), 1.0)


def _first_entries(logits: Tensor, entries: int, rank: int) -> Tensor:
    """Return this rank's part of the first ``entries`` of the vocabulary of logits [s, b, v], at least one entry."""
    own = entries - rank * logits.shape[-1]
    if own > 0:
        return logits[..., :own]
    return logits[..., :1] * 0.0 - torch.inf  # only padding


def _same_shape(student: Tensor, teacher: Tensor, what: str, name: str) -> None:
    if student.shape != teacher.shape:
        raise ModelOptConfigError(
            f"{name}: the {what} of student and teacher differ: {student.shape[-1]} and {teacher.shape[-1]} "
            f"(shapes {tuple(student.shape)} and {tuple(teacher.shape)} on this rank). Use the same for both."
        )

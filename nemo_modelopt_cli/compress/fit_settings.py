"""Settings of the search for sizes and formats under a budget, and what can be checked before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nemo_modelopt_cli.options import option
from nemo_modelopt_dropin.errors import ModelOptConfigError, did_you_mean
from nemo_modelopt_dropin.fit import choice, devices, files, formats, limits
from nemo_modelopt_dropin.fit.serving import Load
from nemo_modelopt_dropin.preflight import algorithms, model_checks, model_sizes
from nemo_modelopt_dropin.preflight.algorithms import NO_QUANT
from nemo_modelopt_dropin.preflight.model_sizes import Shape, UnknownModel

# Pruning's targets for the sizes of a shape.
_SIZES = {
    "target_num_layers": "num_layers",
    "target_hidden_size": "hidden_size",
    "target_ffn_hidden_size": "ffn_hidden_size",
    "target_num_attention_heads": "num_attention_heads",
}


@dataclass(frozen=True)
class Fit:
    """Budgets, and how sizes and formats are searched; without a budget nothing is searched."""

    disk: str | None = field(
        default=None, metadata=option("most bytes of the Hugging Face folder: 600MB, 4GiB, or 0.5x of the original")
    )
    memory: str | None = field(
        default=None, metadata=option("most memory to serve --batch sequences of --context tokens: 22GiB or 0.5x")
    )
    latency: str | None = field(
        default=None, metadata=option("longest time per token on --fit-device: 15ms, or 0.5x of the original's")
    )
    context: int = field(default=4096, metadata=option("tokens of a served sequence, prompt and reply", "--context"))
    batch: int = field(default=1, metadata=option("sequences that are served at a time", "--batch"))
    device: str = field(
        default=devices.DEFAULT,
        metadata=option(
            f"device of the latency: {', '.join(devices.DEVICES)}, or bandwidth=2e11,bf16=3e12 in bytes and operations "
            f"per second (default: {devices.DEFAULT})"
        ),
    )
    formats: tuple[str, ...] = field(
        default=(NO_QUANT, "fp8", "int4_awq"),
        metadata=option("algorithms to choose from, for attention and MLP; no_quant keeps 16 bits"),
    )
    minutes: float = field(default=30.0, metadata=option("minutes that the search measures losses"))
    candidates: int = field(default=4, metadata=option("combinations of sizes and formats to measure"))
    recovery: float = field(
        default=0.8,
        metadata=option("share of the loss by pruning that distillation is expected to regain, 0 to 1"),
    )
    point: int | None = field(
        default=None, metadata=option("use this point of the search's page instead of the chosen one")
    )

    @property
    def budgets(self) -> dict[str, str | None]:
        """The budgets by kind, as they are written."""
        return {kind: getattr(self, kind) for kind in limits.KINDS}

    @property
    def is_set(self) -> bool:
        """Whether there is a budget."""
        return any(value is not None for value in self.budgets.values())

    @property
    def load(self) -> Load:
        """What is served."""
        return Load(self.context, self.batch)

    def problems(self) -> list[str]:
        """Return what is wrong with the settings themselves."""
        if not self.is_set:
            flags = " or ".join(f"--fit-{kind}" for kind in limits.KINDS)
            return [f"fit-point {self.point} needs a budget: set {flags}"] if self.point is not None else []
        found = [f"fit-{one}" for one in limits.problems(self.budgets)]
        found += [
            f"fit: {name} must be at least 1, got {getattr(self, name)}"
            for name in ("context", "batch", "candidates", "point")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        if not self.minutes > 0:
            found.append(f"fit: minutes must be positive, got {self.minutes:g}")
        if not 0 <= self.recovery <= 1:
            found.append(f"fit: recovery must be between 0 and 1, got {self.recovery:g}")
        try:
            devices.find(self.device)
        except ModelOptConfigError as error:
            found.append(f"fit: {error}".rstrip("."))
        allowed = (NO_QUANT, *algorithms.TABLE)
        if not self.formats:
            found.append(f"fit: formats must name at least one of {', '.join(allowed)}")
        for name in self.formats:
            if name not in allowed:
                found.append(
                    f"fit: unknown format {name!r}; allowed: {', '.join(allowed)}{did_you_mean(name, allowed)}"
                )
            elif problem := algorithms.version_problem(name):
                found.append(f"fit: {problem}")
        return found


def job_problems(job: Any) -> list[str]:
    """Return why a job's other settings do not go with its budgets, and budgets that no combination reaches.

    Args:
        job: The `settings.Job`.
    """
    if not job.fit.is_set:
        return []
    found = [
        f"fit: a budget cannot be combined with {name}; targets such as target_num_layers stay fixed in the search"
        for name in ("drop_layers", "target_params")
        if getattr(job.pruning, name)
    ]
    if "hf" not in job.quantization.formats:
        found.append("fit: the budgets are those of Hugging Face files; add hf to the formats (--formats hf)")
    for name in job.fit.formats:
        if name in algorithms.TABLE:
            found += [
                f"fit: {one}" for one in algorithms.layout_problems("hf_layout", name, job.quantization.hf_layout)
            ]
            found += [f"fit: {one}" for one in model_checks.file_problems(job.teacher, name, "hf")]
    if found or job.fit.problems() or not job.teacher:
        return found
    try:
        return choice.impossible(problem_of(job, model_sizes.read(job.teacher)))
    except UnknownModel as reason:
        return [f"fit: the sizes of {job.teacher} are unknown: {reason}"]


def experts_per_token(job: Any) -> int:
    """Return the number of experts that a token is sent to, 0 for a model without experts.

    Args:
        job: The `settings.Job`.
    """
    config = model_sizes.config_of(job.teacher)
    return int(config.get("moe_router_topk") or 1) if config.get("num_moe_experts") else 0


def problem_of(job: Any, shape: Shape) -> choice.Problem:
    """Return what a job searches.

    Args:
        job: The checked `settings.Job`.
        shape: The teacher's shape.
    """
    fit, quantization = job.fit, job.quantization
    given = {size: getattr(job.pruning, target) for target, size in _SIZES.items()}
    # An FP8 cache saves neither disk nor accuracy: it is a choice only if the cache counts.
    cache = fit.memory is not None or fit.latency is not None
    return choice.Problem(
        shape=shape,
        formats=formats.mixtures(fit.formats, quantization.hf_layout, quantization.awq_block_size, cache),
        budgets=[limits.parse(kind, value) for kind, value in fit.budgets.items() if value is not None],
        fixed={name: size for name, size in given.items() if size is not None},
        load=Load(fit.context, fit.batch, experts_per_token=experts_per_token(job)),
        device=devices.find(fit.device),
        layout=quantization.hf_layout,
        tokenizer=files.tokenizer_bytes(job.teacher),
        tp=job.layout.tp,
    )

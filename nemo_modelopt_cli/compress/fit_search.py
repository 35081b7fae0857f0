"""Measure losses of shapes, formats and combinations of both, and choose among them.

What is measured is kept in a file, so that an interrupted search resumes and one with other budgets starts from it.
Losses are increases over the original's on the same held-out windows.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from nemo.utils import logging

from nemo.collections.llm.modelopt import _parallel
from nemo.collections.llm.modelopt.model_utils import setup_trainer_and_restore_model_with_modelopt_spec
from nemo.collections.llm.modelopt.prune import trials
from nemo.collections.llm.modelopt.quantization import Quantizer, layer_errors
from nemo_modelopt_cli import tokens
from nemo_modelopt_cli.compress import fit_plan, fit_settings, heldout, quantizing, training
from nemo_modelopt_cli.compress.settings import Job, Quantization
from nemo_modelopt_cli.compress.stages import read_json
from nemo_modelopt_dropin import files, ranks
from nemo_modelopt_dropin.console import screen
from nemo_modelopt_dropin.errors import ModelOptConfigError
from nemo_modelopt_dropin.fit import choice, formats, grid
from nemo_modelopt_dropin.fit.choice import Point
from nemo_modelopt_dropin.fit.formats import Format
from nemo_modelopt_dropin.fit.prediction import Measured, ShapeLoss
from nemo_modelopt_dropin.preflight import model_sizes, prune_layout
from nemo_modelopt_dropin.preflight.algorithms import NO_QUANT
from nemo_modelopt_dropin.preflight.model_sizes import Shape

MEASURED = "measured.json"
SCORES = "scores"
_IN_ATTENTION, _IN_CACHE = "self_attention", "bmm_quantizer"


@dataclass
class Book:
    """What was measured, kept in a file.

    Attributes:
        path: The file.
        identity: What the measurements depend on.
        losses: Name of a measurement to its loss in nats per token.
    """

    path: Path
    identity: dict[str, Any]
    losses: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, earlier: Path, identity: dict[str, Any]) -> Book:
        """Return the measurements in a folder, or in that of an earlier search with the same identity."""
        for place in (folder, earlier):
            found = read_json(place / MEASURED)
            if found.get("identity") == identity:
                return cls(folder / MEASURED, identity, found["losses"])
        return cls(folder / MEASURED, identity)

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return a measurement; measure it, and write the file, if it is not known."""
        if name not in self.losses:
            self.losses[name] = measure()
            if ranks.number() == 0:
                self.write()
        return self.losses[name]

    def write(self) -> None:
        """Write the file."""
        files.write_json(self.path, {"identity": self.identity, "losses": self.losses})


class Clock:
    """The time that is left for measurements, as rank zero sees it."""

    def __init__(self, minutes: float):
        """Start the clock.

        Args:
            minutes: The budget.
        """
        self._end = time.monotonic() + 60 * minutes

    @property
    def is_over(self) -> bool:
        """Whether the time is over; all ranks must ask, while their process groups exist."""
        return bool(_parallel.from_rank_zero(time.monotonic() > self._end))


class Search:
    """The measurements of one job.

    Args:
        folder: Of the job step.
        job: Its settings.
        token_folder: Of the training and held-out tokens.
        book: What is known.
    """

    def __init__(self, folder: Path, job: Job, token_folder: Path, book: Book):
        self.folder, self.job, self.book, self.clock = folder, job, book, Clock(job.fit.minutes)
        self.token_folder = token_folder
        self.batch = job.distillation.micro_batch_size
        windows = job.pruning.heldout_batches * self.batch
        self.heldout = np.load(token_folder / "heldout.npy")[: job.seq_length * windows + 1]
        self.shape = model_sizes.read(job.teacher)
        self.problem = fit_settings.problem_of(job, self.shape)

    def loss(self, core: Any) -> float:
        """Return the held-out loss of a model."""
        return heldout.mean_loss(core, self.heldout, self.job.seq_length, self.batch)

    # --- formats ------------------------------------------------------------------------------------------------------

    def sensitivities(self) -> dict[str, dict[str, float]]:
        """Measure the increase of the loss by each algorithm; those left out for lack of time are missing."""
        names = {one.algorithm(group) for one in self.problem.possible() for group in formats.GROUPS} - {NO_QUANT}
        wanted = sorted(names, key=self.job.fit.formats.index)
        cache = any(one.fp8_cache for one in self.problem.formats)
        found: dict[str, dict[str, float]] = {}
        for name in wanted:
            with_cache = cache and formats.KV_CACHE not in found
            key = f"format {name} block {self.job.quantization.awq_block_size}{' and cache' if with_cache else ''}"
            if key not in self.book.losses:
                model, _ = self._restored()
                if found and self.clock.is_over:
                    training.release()
                    screen.warn(f"--fit-minutes are over: the loss of {name} is not measured, and it is not chosen")
                    continue
                self.book.get(key, partial(self._format, model, name, with_cache))
                training.release()
            losses = self.book.losses[key]
            found[name] = {part: loss - self.original for part, loss in losses.items() if part != formats.KV_CACHE}
            if formats.KV_CACHE in losses:
                found[formats.KV_CACHE] = {formats.KV_CACHE: losses[formats.KV_CACHE] - self.original}
        return found

    @property
    def original(self) -> float:
        """Held-out loss of the original model."""
        return self.book.losses["original"]

    def measure_original(self) -> None:
        """Measure the original model, unless it is known."""
        if "original" not in self.book.losses:
            model, _ = self._restored()
            self.book.get("original", lambda: self.loss(_core(model)))
            training.release()

    def _format(self, model: Any, name: str, with_cache: bool) -> dict[str, float]:
        """Return the losses with only the attention, only the MLPs, all layers, and only the cache quantized."""
        settings = replace(self.job.quantization, algorithm=name, attention_algorithm=None, enable_kv_cache=with_cache)
        core = self._quantized(model, settings)
        parts = {
            formats.ATTENTION: lambda at: _IN_ATTENTION in at and _IN_CACHE not in at,
            formats.MLP: lambda at: _IN_ATTENTION not in at,
            "all": lambda at: _IN_CACHE not in at,
        }
        if with_cache:
            parts[formats.KV_CACHE] = lambda at: _IN_CACHE in at
        return {part: layer_errors.with_only(core, wanted, lambda: self.loss(core)) for part, wanted in parts.items()}

    def _quantized(self, model: Any, settings: Quantization) -> Any:
        """Quantize a model, and return its Megatron-Core model."""
        config = quantizing.config_of(settings, self.job.train_text, self.folder, comparison_size=0, layer_errors=False)
        no_export: Any = None
        Quantizer(config, no_export).quantize(model)
        return _core(model)

    # --- shapes -------------------------------------------------------------------------------------------------------

    def measure_shapes(self) -> None:
        """Measure shapes that differ in one dimension, and in all."""
        legal = grid.choices(self.shape, self.problem.fixed, {}, self.least_experts)
        wanted = grid.probes(legal)
        if any(_name(sizes) not in self.book.losses for sizes in wanted):
            model, run = self._restored()
            with self._trials(model, run) as cutting:
                for sizes in screen.bar(wanted, desc="shapes", unit="model", disable=ranks.number() != 0):
                    if self.clock.is_over:
                        screen.warn("--fit-minutes are over: the losses of the other shapes are interpolated")
                        break
                    self.book.get(_name(sizes), partial(self._cut_loss, cutting, sizes))
            training.release()

    def prediction(self) -> ShapeLoss:
        """Return the predicted increase of the loss by pruning, from all shapes that were measured."""
        known = [
            Measured(sizes, loss - self.original)
            for name, loss in self.book.losses.items()
            if (sizes := _sizes(name, self.shape)) is not None
        ]
        return ShapeLoss(grid.sizes_of(self.shape), known)

    def _cut_loss(self, cutting: trials.Trials, sizes: Mapping[str, int]) -> float:
        with cutting.cut(grid.targets(self.shape, sizes)):
            return self.loss(cutting.core)

    # --- both ---------------------------------------------------------------------------------------------------------

    def tried(self, sensitivities: Mapping[str, Mapping[str, float]]) -> list[Point]:
        """Measure the best combinations, and return them with what was predicted and what was measured.

        The prediction is made again after each measurement. Every second combination is the best one of a format that
        was not tried yet, because the first ones are often neighbours.

        Args:
            sensitivities: What `sensitivities` returned.
        """
        found: list[Point] = []
        while len(found) < self.job.fit.candidates:
            possible = choice.under_budget(self.problem, self.prediction(), sensitivities, self.least_experts)
            point = choice.next_to_try(possible, found, self.job.fit.recovery, other_format=len(found) % 2 == 1)
            if point is None:
                break
            name = f"{_name(point.sizes)}; {point.format.name}"
            if not {name, _name(point.sizes)} <= self.book.losses.keys():
                model, run = self._restored()
                if found and self.clock.is_over:
                    training.release()
                    screen.warn("--fit-minutes are over: fewer combinations are measured than --fit-candidates")
                    break
                self._measure(point, model, run, name)
                training.release()
            both, shape = (self.book.losses[key] - self.original for key in (name, _name(point.sizes)))
            found.append(replace(point, measured=both, measured_shape=shape))
            logging.info(
                f"{name}: predicted {point.predicted:+.4f}, measured {both:+.4f}, of it by pruning {shape:+.4f}"
            )
        return found

    @property
    def least_experts(self) -> int:
        """The fewest experts that a layer can have."""
        return max(1, self.problem.load.experts_per_token)

    def _measure(self, point: Point, model: Any, run: Any, name: str) -> None:
        targets = grid.targets(self.shape, point.sizes)
        with self._trials(model, run) as cutting:
            cutting.keep(targets)
        self.book.get(_name(point.sizes), lambda: self.loss(_core(model)))
        settings = replace(
            self.job.quantization,
            algorithm=point.format.mlp,
            attention_algorithm=point.format.attention,
            enable_kv_cache=point.format.fp8_cache,
        )
        core = _core(model) if quantizing.is_plain(settings) else self._quantized(model, settings)
        self.book.get(name, lambda: self.loss(core))

    # --- models -------------------------------------------------------------------------------------------------------

    def _restored(self) -> tuple[Any, Any]:
        """Return the teacher and its trainer, in the layout at which importance is measured."""
        training.release()
        layout, pruning = self.job.layout, self.job.pruning
        shared = prune_layout.for_importance(self.job.teacher, layout.devices * layout.num_nodes)
        steps = pruning.num_samples // pruning.micro_batch_size
        return setup_trainer_and_restore_model_with_modelopt_spec(
            model_path=self.job.teacher,
            tensor_model_parallel_size=1,
            pipeline_model_parallel_size=int(shared["pp_size"] or 1),
            num_layers_in_first_pipeline_stage=shared[prune_layout.FIRST],
            num_layers_in_last_pipeline_stage=shared[prune_layout.LAST],
            devices=layout.devices,
            num_nodes=layout.num_nodes,
            strategy_kwargs={"sequence_parallel": False, "replace_progress_bar": False},
            trainer_kwargs={"max_steps": steps, "limit_val_batches": steps, "val_check_interval": steps},
            model_config_overrides={"sequence_parallel": False},
        )

    def _trials(self, model: Any, run: Any) -> Any:
        pruning = self.job.pruning
        data = tokens.TokenDataModule(
            self.token_folder,
            tokens.checkpoint_tokenizer(self.job.teacher),
            self.job.seq_length,
            pruning.micro_batch_size,
            pruning.micro_batch_size,
            pruning.num_samples,
        )
        return trials.measured(model, data, run, str(self.folder / SCORES))


def _core(model: Any) -> Any:
    from nemo.utils.model_utils import unwrap_model

    return unwrap_model(model)


def _name(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _sizes(name: str, shape: Shape) -> dict[str, int] | None:
    """Return the sizes that `_name` wrote, None for the name of another measurement."""
    pairs = [part.split(" ") for part in name.split(", ")]
    if [pair[0] for pair in pairs] != [*grid.sizes_of(shape)] or ";" in name:
        return None
    return {key: int(value) for key, value in pairs}


def _known(folder: Path, earlier: Path, identity: dict[str, Any]) -> Book:
    """Return what an interrupted or an earlier search measured; that of an earlier one is copied into the folder."""
    book = Book.read(folder, earlier, identity)
    if ranks.number() == 0 and book.losses and not book.path.exists():
        book.write()
        if (earlier / SCORES).is_dir() and not (folder / SCORES).exists():
            shutil.copytree(earlier / SCORES, folder / SCORES)
    return book


def run(folder: Path, job: Job, token_folder: Path, root: Path) -> dict[str, Any]:
    """Search, write the plan, and return what the report shows.

    Args:
        folder: Of the job step.
        job: Its settings.
        token_folder: Of the training and held-out tokens.
        root: The run's folder, which may have the measurements of an earlier search.
    """
    from nemo_modelopt_cli import run_script

    search = Search(folder, job, token_folder, _known(folder, root / fit_plan.STAGE, identity(job, root)))
    with run_script.standing_in(folder):
        search.measure_original()
        sensitivities = search.sensitivities()
        search.measure_shapes()
        tried = search.tried(sensitivities)
    chosen = min(tried, key=lambda point: point.after(job.fit.recovery))
    everywhere = choice.everywhere(search.problem, search.prediction(), sensitivities, search.least_experts)
    plain = Format(block=job.quantization.awq_block_size)
    original = Point(grid.sizes_of(search.shape), plain, search.problem.original, 0.0, 0.0)
    front = choice.pareto_points([original, *everywhere, *tried], fit_plan.kinds(job.fit), job.fit.recovery)
    # The original is shown even if a smaller shape has no higher loss.
    plan = fit_plan.content(search.problem, [*front, original], tried, chosen, job, search.original)
    if ranks.number() == 0:
        from nemo_modelopt_dropin.report import fit

        files.write_json(folder / fit_plan.NAME, plan)
        no_point = replace(job.fit, point=None)
        texts = fit_plan.rows(plan, no_point), fit_plan.sentences(plan, no_point)
        fit.write(plan, *texts, folder / fit_plan.REPORT)
    return {"plan": plan, "sensitivities": sensitivities}


def identity(job: Job, root: Path) -> dict[str, Any]:
    """Return what the measurements of a job depend on."""
    from nemo_modelopt_cli.compress.stages import read_record

    records = {name: read_record(root / name) for name in ("tokens", "teacher")}
    if None in records.values():
        raise ModelOptConfigError(f"{root}: the steps tokens and teacher have not finished.")
    quantization, pruning = job.quantization, job.pruning
    return {
        **{name: record.run_id for name, record in records.items() if record is not None},
        "importance": [pruning.num_samples, pruning.micro_batch_size],
        "heldout": [job.seq_length, pruning.heldout_batches, job.distillation.micro_batch_size],
        "calibration": [
            quantization.calibration_size,
            quantization.calibration_batch_size,
            quantization.calibration_seq_len,
        ],
    }

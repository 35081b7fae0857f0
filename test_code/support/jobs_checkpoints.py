"""What ranks execute for the tests of checkpoints. Runs with the stock subpackage as well as with ours."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

from test_code.support import jobs_distill, ranks, tiny

LAYOUTS: dict[str, dict] = {"1 rank": {}, "TP=2": {"tp": 2}, "PP=2": {"pp": 2}}


def whole(model) -> dict[str, torch.Tensor]:
    """Return the weights of the whole model, put together from what the ranks say their shards are."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    sharded = tiny.core(model).sharded_state_dict()
    apply_factories(sharded)
    mine = [
        (value.key, value.global_shape, value.global_offset, value.prepend_axis_num, value.data.detach().cpu().clone())
        for value in nested_values(sharded)
        if isinstance(value, ShardedTensor)
    ]
    everyone: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    found: dict[str, torch.Tensor] = {}
    for key, shape, offset, prepended, data in (piece for pieces in everyone for piece in pieces):
        target = found.setdefault(key, torch.full(tuple(shape), torch.nan))
        sizes = (*(1,) * prepended, *data.shape)
        place = tuple(slice(start, start + size) for start, size in zip(offset, sizes, strict=True))
        target[place] = data.reshape(sizes)
    assert not any(value.isnan().any() for value in found.values())
    return found


@contextlib.contextmanager
def world_of(layout: str):
    """Make the groups of a layout possible: each rank by itself for one rank, else all together."""
    with jobs_distill.alone() if layout == "1 rank" else contextlib.nullcontext():
        yield
    if layout != "1 rank":
        ranks.reset()


def own_path(path: str, layout: str) -> str:
    """Return where this rank writes: with one rank each, only rank zero's counts."""
    return path if layout != "1 rank" or os.environ["RANK"] == "0" else f"{path}-{os.environ['RANK']}"


def write(kind: str, path: str, layout: str, how: str, teacher: str | None = None):
    """Train a model of a kind, and save it; return the checkpoint's path and the whole weights.

    Args:
        kind: "plain" or "student".
        path: Folder of the checkpoint.
        layout: A name of `LAYOUTS`.
        how: "in fit", "after fit" or "ModelCheckpoint", and " async" behind it for NeMo's background writer.
        teacher: The student's teacher.
    """
    own = own_path(path, layout)
    asynchronous = how.endswith(" async")
    how = how.removesuffix(" async")
    with world_of(layout):
        model = tiny.model() if kind == "plain" else jobs_distill.distillation_model(teacher)
        callbacks = [tiny.SaveAtEnd(own)] if how == "in fit" else []
        run = tiny.trainer(
            max_steps=2,
            callbacks=callbacks,
            enable_checkpointing=how == "ModelCheckpoint",
            strategy_kwargs={"ckpt_async_save": asynchronous},
            **LAYOUTS[layout],
        )
        torch.manual_seed(1234)
        if how == "ModelCheckpoint":
            train(model, run, own)
        else:
            run.fit(model, tiny.data())
        if how == "after fit":
            tiny.save(run, own)
            if asynchronous:
                run.strategy.checkpoint_io.maybe_finalize_save_checkpoint(blocking=True)
        weights = whole(model)
    return (last(path) if how == "ModelCheckpoint" else path), weights


def train(model, run, folder, **checkpoint) -> None:
    """Train as NeMo's scripts do, with a ``ModelCheckpoint`` below a folder."""
    from nemo.lightning.pytorch.callbacks import ModelCheckpoint

    from nemo import lightning as nl
    from nemo.collections import llm

    keep = ModelCheckpoint(monitor="reduced_train_loss", every_n_train_steps=run.max_steps, **checkpoint)
    log = nl.NeMoLogger(log_dir=str(folder), name="run", ckpt=keep, use_datetime_version=False)
    llm.train(model, tiny.data(), run, log=log, tokenizer="data")


def last(folder) -> str:
    """Return the last checkpoint below a folder."""
    return str(next(Path(folder).rglob("*-last")))


def read(path: str, layout: str, overrides: dict | None = None):
    """Load a checkpoint as a user does, train a step at learning rate zero; return class, whole weights and loss.

    Args:
        path: The checkpoint.
        layout: A name of `LAYOUTS`.
        overrides: Sizes of the model; None: the model is what the checkpoint's context says.
    """
    from nemo.lightning import io
    from nemo.lightning.ckpt_utils import ckpt_to_context_subdir

    with world_of(layout):
        if overrides is None:
            model = io.load_context(ckpt_to_context_subdir(path), subpath="model")
            model.optim = tiny.optim(lr=0.0)
            model.optim.connect(model)
        else:
            model = tiny.model(optimizer=tiny.optim(lr=0.0), **overrides)
        losses = tiny.fit(model, tiny.data(masked=False), restore=path, max_steps=1, **LAYOUTS[layout])
        weights = whole(model)
    return type(model).__name__, weights, losses[0]


def refused(path: str, **overrides) -> str:
    """Load a checkpoint on one rank each, which must fail; return the class of the error."""
    with world_of("1 rank"):
        try:
            tiny.fit(tiny.model(**overrides), restore=path, max_steps=1)
        except Exception as error:
            return type(error).__name__
    raise AssertionError("the checkpoint was loaded")


def context_of_student() -> tuple[str, list[str]]:
    """Return the class and the arguments in a student's context, in a process that has built a plain model, too."""
    tiny.model()
    described = jobs_distill.distillation_model("unused").__io__
    return described.__fn_or_cls__.__name__, sorted(described.__arguments__)


# --- pruned ---


def write_pruned(path: str, layout: str, request: dict):
    """Prune a tiny model with this process's subpackage, save it, and return its whole weights."""
    from nemo.collections.llm.modelopt.prune import PruningConfig, pruner
    from test_code.support import jobs_prune

    own = own_path(path, layout)
    with world_of(layout):
        model, data, run = jobs_prune.build(**LAYOUTS[layout])
        pruner.prune_language_model(model, PruningConfig(**request), data, run)
        pruner.save_pruned_model(run, own)
        return whole(model)


# --- what a user does with a student ---


class CountedData(tiny.TinyData):
    """`tiny.TinyData` that continues where an interrupted training stopped, as NeMo's own data modules do."""

    def state_dict(self):
        return {"consumed_samples": self.data_sampler.compute_consumed_samples(self.trainer.global_step)}

    def load_state_dict(self, state_dict):
        self.data_sampler.init_consumed_samples = state_dict["consumed_samples"]
        self.data_sampler.prev_consumed_samples = state_dict["consumed_samples"]


def distill_with_resume(student: str, teacher: str, settings: str | None, folder: str, stops: dict[int, str]):
    """Run ``llm.distill`` up to each step, each time from the last checkpoint and in a layout of its own.

    Everything is NeMo's: ``NeMoLogger``, ``ModelCheckpoint`` and ``AutoResume``, with the optimizer's state.

    Args:
        student: Checkpoint of the student to begin with.
        teacher: Checkpoint of the teacher.
        settings: YAML of the losses.
        folder: Where checkpoints go.
        stops: Layouts by the step at which a training ends.

    Returns:
        The losses of all steps.
    """
    from nemo.lightning.pytorch.callbacks import ModelCheckpoint

    from nemo import lightning as nl
    from nemo.collections import llm

    losses: list[float] = []
    for stop, layout in stops.items():
        own = own_path(folder, layout)
        with world_of(layout):
            recorder = tiny.LossRecorder()
            keep = ModelCheckpoint(
                monitor="reduced_train_loss", every_n_train_steps=min(stops), save_optim_on_train_end=True
            )
            torch.manual_seed(1234)
            llm.distill(
                student_model_path=student,
                teacher_model_path=teacher,
                distillation_config_path=settings,
                data=CountedData(masked=False),
                trainer=tiny.trainer(
                    max_steps=stop, callbacks=[recorder], enable_checkpointing=True, **LAYOUTS[layout]
                ),
                log=nl.NeMoLogger(log_dir=own, name="run", ckpt=keep, use_datetime_version=False),
                resume=nl.AutoResume(resume_if_exists=True, resume_ignore_no_checkpoint=True),
                optim=tiny.optim(),
            )
        losses += recorder.losses
    return losses


def use_student(path: str, teacher: str, folder: str) -> dict:
    """Do on one rank what a user does next: generate, train on, distil again, quantize; return what came of each."""
    from test_code.support import jobs_prune, jobs_quant

    mine = Path(f"{folder}-{os.environ['RANK']}")
    found: dict = {}
    with world_of("1 rank"):
        found["text"] = jobs_prune.generate(path)
    with world_of("1 rank"):
        found["training"] = jobs_prune.train_checkpoint(path)
    found["distillation"] = distill_with_resume(path, teacher, None, str(mine / "again"), {2: "1 rank"})
    quantization = {"calibration_dataset_size": 8}
    with world_of("1 rank"):
        mine.mkdir(exist_ok=True)
        quantization["calibration_dataset"] = jobs_quant.corpus(mine / "texts.jsonl")
        found["amax"] = len(jobs_quant.ptq(path, mine / "fp8", quant=quantization)["amax"])
    with world_of("1 rank"):
        found["read"] = len(jobs_quant.restored_amax(mine / "fp8"))
    return found

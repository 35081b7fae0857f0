"""The compression job as a function, for NeMo-Run and for Python. Importing this is cheap."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from nemo_modelopt_cli.compress import fit_plan, plan, stages
from nemo_modelopt_cli.compress.digests import Digests
from nemo_modelopt_cli.compress.settings import Job, SettingsError, raise_all
from nemo_modelopt_dropin import ranks
from nemo_modelopt_dropin.errors import ModelOptConfigError
from nemo_modelopt_dropin.preflight import output_checks


def execute(
    job: Job,
    output: Path,
    steps: Sequence[stages.Stage],
    digests: Digests,
    verbose: bool = False,
    derived: Iterable[tuple[str, str]] = (),
    redo: Collection[str] = (),
) -> int:
    """Run the job on this rank, or on ranks that are started for it, and return the exit code.

    Args:
        job: checked settings.
        output: the run's folder.
        steps: the job's, from `plan.compression_stages`.
        digests: of the job's inputs; ranks that are started need not compute them again.
        verbose: show what the libraries write.
        derived: section and name of settings that follow from others; ``run.yaml`` omits them.
        redo: names of job steps whose results may be replaced if their settings changed.
    """
    from nemo_modelopt_cli.compress import runner, summary

    def finish(records):
        return summary.finish(records, output, f"Compression of {Path(job.teacher).name}", job)

    return runner.execute(
        steps, output, job.layout, finish, verbose, saved(job, output, derived), redo, digests.for_ranks()
    )


def saved(job: Job, output: Path, derived: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """Return the settings for ``run.yaml``, without those that follow from others."""
    found: dict[str, Any] = {"output": str(output), **job.as_dict()}
    for section, name in derived:
        del found[section][name]
    return found


def compress(job: Job, output: str, verbose: bool = False, redo: Collection[str] = ()) -> str:
    """Prune, distill, quantize and export a checkpoint, and write the report.

    Args:
        job: settings of the job.
        output: the run's folder; the same job resumes there after an interruption.
        verbose: show what the libraries write.
        redo: names of job steps whose results may be replaced if their settings changed, with the steps that build on
            them.

    Returns:
        The path of the report.

    Raises:
        SettingsError: If something is wrong with the job (the message lists everything), if the job's ranks were not
            started, or if finished steps that ``redo`` does not name would run again.
        RuntimeError: If a step fails.
    """
    folder, digests = _checked(job, output), Digests.of_this_process()
    steps = plan.compression_stages(job, folder, digests=digests)
    try:
        stages.check_redo(steps, folder, redo)
        if ranks.leads():
            stages.check_ready(steps, folder)
    except (stages.StageError, ModelOptConfigError) as error:
        raise SettingsError(str(error)) from None
    code = execute(job, folder, steps, digests, verbose, redo=redo)
    if code:
        raise RuntimeError(f"The compression failed with code {code}; see {folder / 'log'} for the full traceback.")
    return str(folder / "report.html")


def search(job: Job, output: str, verbose: bool = False, redo: Collection[str] = ()) -> dict[str, Any]:
    """Choose the sizes and formats with which a job keeps its budgets, and return the plan.

    Args:
        job: settings of the job, with a budget in ``fit``.
        output: the run's folder; `compress` with the same job continues there.
        verbose: show what the libraries write.
        redo: see `compress`.

    Raises:
        SettingsError: If something is wrong with the job, or it has no budget.
        RuntimeError: If a step fails.
    """
    from nemo_modelopt_cli.compress import runner

    folder, digests = _checked(job, output), Digests.of_this_process()
    if not job.fit.is_set:
        raise SettingsError("the job has no budget: set disk, memory or latency of its settings fit")
    steps = plan.search_stages(plan.compression_stages(job, folder, digests=digests))
    settings = saved(job, folder, ())
    code = runner.execute(
        steps, folder, job.layout, lambda records: runner.OK, verbose, settings, redo, digests.for_ranks()
    )
    found = fit_plan.read(folder)
    if code or found is None:
        raise RuntimeError(f"The search failed with code {code}; see {folder / 'log'} for the full traceback.")
    return found


def _checked(job: Job, output: str) -> Path:
    """Return the run's folder after checking the job.

    Raises:
        SettingsError: If something is wrong with it, or its ranks were not started.
    """
    job.check()
    inputs = {name: getattr(job, name) for name in ("teacher", "train_text", "heldout_text", "distill_config")}
    raise_all(output_checks.place_problems("output", output, inputs))
    if job.layout.devices > 1 and not ranks.is_rank():
        raise SettingsError(
            f"the job needs {job.layout.devices} ranks and this is one process: start it with torchrun, for example "
            f"run.LocalExecutor(launcher='torchrun', ntasks_per_node={job.layout.devices})"
        )
    return Path(output).resolve()

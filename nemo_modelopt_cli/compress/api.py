"""The compression job as a function, for NeMo-Run and for Python. Importing this is cheap."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from nemo_modelopt_cli.compress import plan, stages
from nemo_modelopt_cli.compress.settings import Job, SettingsError, raise_all
from nemo_modelopt_cli.process import launch
from nemo_modelopt_dropin.preflight import output_checks


def execute(
    job: Job,
    output: Path,
    verbose: bool = False,
    derived: Iterable[tuple[str, str]] = (),
    redo: Collection[str] = (),
) -> int:
    """Run the job on this rank, or on ranks that are started for it, and return the exit code.

    Args:
        job: checked settings.
        output: the run's folder.
        verbose: show what the libraries write.
        derived: settings that follow from others, as section and name; the saved ones leave them out.
        redo: names of stages whose results may be replaced if their settings changed.
    """
    from nemo_modelopt_cli.compress import runner, summary

    saved: dict[str, Any] = {"output": str(output), **job.as_dict()}
    for section, name in derived:
        del saved[section][name]

    def finish(records):
        return summary.finish(records, output, f"Compression of {Path(job.teacher).name}", job)

    return runner.execute(
        lambda out: plan.compression_stages(job, output, out=out),
        output,
        job.layout,
        finish,
        verbose,
        saved,
        redo,
    )


def compress(job: Job, output: str, verbose: bool = False, redo: Collection[str] = ()) -> str:
    """Prune, distill, quantize and export a checkpoint, and write the report.

    Args:
        job: what to do.
        output: the run's folder; the same job resumes there after an interruption.
        verbose: show what the libraries write.
        redo: names of stages whose results may be replaced if their settings changed, with those that build on them.

    Returns:
        The path of the report.

    Raises:
        SettingsError: listing everything that is wrong with the job, or if its ranks are not there, or if finished
            stages would run again that ``redo`` does not name.
        RuntimeError: if a stage fails.
    """
    job.check()
    inputs = {name: getattr(job, name) for name in ("teacher", "train_text", "heldout_text", "distill_config")}
    raise_all(output_checks.place_problems("output", output, inputs))
    if job.layout.devices > 1 and not launch.is_rank():
        raise SettingsError(
            f"the job wants {job.layout.devices} ranks and this is one process: start it with torchrun, for example "
            f"run.LocalExecutor(launcher='torchrun', ntasks_per_node={job.layout.devices})"
        )
    folder = Path(output).resolve()
    try:
        stages.check_redo(plan.compression_stages(job, folder), folder, redo)
    except stages.StageError as error:
        raise SettingsError(str(error)) from None
    code = execute(job, folder, verbose, redo=redo)
    if code:
        raise RuntimeError(f"The compression failed with code {code}; {folder / 'log'} holds the whole story.")
    return str(folder / "report.html")

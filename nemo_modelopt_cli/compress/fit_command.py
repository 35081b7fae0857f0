r"""Choose the sizes and formats with which a checkpoint keeps a budget, without compressing it.

    nemo-modelopt fit --teacher CHECKPOINT --train-text train.jsonl --heldout-text heldout.jsonl \
        --fit-disk 600MB --output runs/small

Losses of a few shapes and formats are measured, others predicted, and the best combinations under the budgets are
measured too. The points and the chosen one are in search/plan.json and search/report/report.html of the output. To
compress the checkpoint, run nemo-modelopt compress with the same flags; it uses the search. --fit-point N uses another
point. The flags are those of compress.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from nemo_modelopt_cli.compress import api, command, fit_plan, plan, runner
from nemo_modelopt_cli.compress.digests import Digests
from nemo_modelopt_cli.compress.settings import Job
from nemo_modelopt_cli.parser import Parser
from nemo_modelopt_dropin.errors import ModelOptConfigError


def parser(prog: str | None = None) -> Parser:
    """Return the command line, which is that of compress."""
    line = command.parser(prog)
    line.description = __doc__
    line.formatter_class = argparse.RawDescriptionHelpFormatter
    return line


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Search, or print what a search would do; return the exit code."""
    job, output, arguments = command.resolve(argv, prog, parser)
    if job is None or not job.fit.is_set:
        parser(prog).refuse(["set a budget: --fit-disk, --fit-memory or --fit-latency"])
    assert job is not None
    digests = Digests.of_this_process()
    planned = plan.search_stages(plan.compression_stages(job, output, digests=digests))
    if arguments.dry_run:
        return command.show_plan(job, output, planned, arguments.redo)
    return runner.execute(
        planned,
        output,
        job.layout,
        lambda records: finish(job, output),
        arguments.verbose,
        api.saved(job, output, arguments.derived),
        arguments.redo,
        digests.for_ranks(),
    )


def finish(job: Job, output: Path) -> int:
    """Print the points and where the page is; return the exit code."""
    found: dict[str, Any] | None = fit_plan.read(output)
    try:
        fit_plan.show(found, job)
    except ModelOptConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return runner.USAGE
    sys.stdout.write(f"Page: {output / fit_plan.STAGE / fit_plan.REPORT / 'report.html'}\n")
    return runner.OK

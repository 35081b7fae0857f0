"""Jobs that measure what a script needs at its peak, beside what its dry run says."""

from __future__ import annotations

import argparse
from typing import Any
from unittest.mock import patch

import torch

from nemo_modelopt_cli import dry_run
from nemo_modelopt_dropin.preflight import model_sizes
from test_code.support import command_lines


def _estimate(name: str, given: argparse.Namespace, script: Any) -> model_sizes.Memory:
    """Return the memory that the script's plan is made with."""
    with patch.object(dry_run, "memory", wraps=dry_run.memory) as shown:
        if name == "prune":
            dry_run.pruning(given, script.TARGETS)
        else:
            {"distill": dry_run.distillation, "ptq": dry_run.quantization}[name](given)
    return shown.call_args.args[0]


def peak_of_script(name: str, arguments: list[str]) -> dict[str, float]:
    """Do a script's work on this rank; return the bytes of tensors at the peak, and the estimate by its parts."""
    script = command_lines.script_of(name)
    given = script.resolve(arguments)
    estimate = _estimate(name, given, script)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        script.work(given)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return {"peak": peak, "estimate": estimate.total, **estimate.parts}

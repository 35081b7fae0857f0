"""Jobs of the tests of the command lines, run on live ranks."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from nemo.collections.llm.modelopt.errors import ModelOptConfigError
from nemo_modelopt_cli.compress import runner
from nemo_modelopt_dropin.console import screen
from test_code.support import tiny


def count_parameters(configurations: dict[str, dict]) -> dict[str, dict[str, int]]:
    """Return the parameters of each model: all, outside of embedding and output layer, and of the layers' matrices."""
    tiny.init_parallel()
    found = {}
    for name, settings in configurations.items():
        core = tiny.config(**settings).configure_model(tiny.tokenizer())
        sizes = {"parameters": 0, "body": 0, "linear": 0}
        for key, parameter in core.named_parameters():
            body = "embedding" not in key and "output_layer" not in key
            sizes["parameters"] += parameter.numel()
            sizes["body"] += parameter.numel() if body else 0
            sizes["linear"] += parameter.numel() if body and "linear_" in key and parameter.ndim == 2 else 0
        found[name] = sizes
    return found


def guarded_works(folder: str) -> dict[str, tuple[int, list[str]]]:
    """Return exit code and lines on the screen of works that end in different ways; their logs go below ``folder``."""
    here = Path(folder)
    found = {}
    for name, work in WORKS.items():
        screen_file = here / f"{name}.screen"
        kept = os.dup(2)
        with open(screen_file, "w") as file:
            os.dup2(file.fileno(), 2)
        try:
            code = runner.guarded(work, None if name == "verbose" else here / name, "stopped")
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            logging.disable(logging.NOTSET)
        found[name] = code, screen_file.read_text().replace("\r", "\n").splitlines()
    return found


def _as_from(file: str, level: int, text: str, module: str = "m") -> None:
    """Log through NeMo's logger as a line of ``file`` would."""
    logger = logging.getLogger("nemo_logger")
    record = logger.makeRecord(logger.name, level, file, 1, text, (), None, func=module)
    record.module = module
    logger.handle(record)


def _done(out) -> None:
    ours, theirs = "/x/nemo/collections/llm/modelopt/a.py", "/x/site-packages/megatron/core/b.py"
    for _ in range(2):  # each text is shown once
        _as_from(ours, logging.WARNING, "ours matters")
    _as_from(ours, logging.INFO, "noise of ours")
    _as_from(ours, logging.INFO, "our result", "report")
    _as_from(theirs, logging.WARNING, "noise of a library")
    _as_from(theirs, logging.ERROR, "theirs matters")
    logging.getLogger("another.package").warning("noise of a library with another logger")
    _as_from("/x/nemo/utils/nemo_logging.py", logging.WARNING, "/x/modelopt/q.py:3: UserWarning: python's matters")
    _import_noise()
    os.write(2, b"noise on a descriptor\n")
    for _ in screen.bar(range(2), desc="a bar", mininterval=100):
        pass


def _import_noise() -> None:
    """Import a module that warns as one of ours would."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "noisy_at_import.py").write_text(
            "from test_code.support.jobs_cli import _as_from\n_as_from('/x/modelopt/a.py', 30, 'noise of an import')\n"
        )
        sys.path.insert(0, folder)
        try:
            importlib.import_module("noisy_at_import")
        finally:
            sys.path.remove(folder)


def _settings(out) -> None:
    raise ModelOptConfigError("this cannot work")


def _failure(out) -> None:
    raise KeyError("x")


def _interrupt(out) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)


def _verbose(out) -> None:
    os.write(2, b"noise on a descriptor\n")


WORKS = {"done": _done, "settings": _settings, "failure": _failure, "interrupt": _interrupt, "verbose": _verbose}

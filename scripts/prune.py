"""Prune a NeMo checkpoint: the same command as `nemo-modelopt prune`."""

import sys

from nemo_modelopt_cli import prune
from nemo_modelopt_cli.process import entry, processes

if __name__ == "__main__":
    sys.exit(entry.run(prune.main))
elif __name__ == "__mp_main__":  # imported by multiprocessing in a spawned child
    processes.spawned_child()

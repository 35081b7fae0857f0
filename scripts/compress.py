"""Prune, distill, quantize, export and report in one command: the same command as `nemo-modelopt compress`."""

import sys

from nemo_modelopt_cli.compress import command
from nemo_modelopt_cli.process import entry, processes

if __name__ == "__main__":
    sys.exit(entry.run(command.main))
elif __name__ == "__mp_main__":  # imported by multiprocessing in a spawned child
    processes.spawned_child()

"""Quantize a NeMo checkpoint and export it: the same command as `nemo-modelopt ptq`."""

import sys

from nemo_modelopt_cli import ptq
from nemo_modelopt_cli.process import entry, processes

if __name__ == "__main__":
    sys.exit(entry.run(ptq.main))
elif __name__ == "__mp_main__":  # imported by multiprocessing in a spawned child
    processes.spawned_child()

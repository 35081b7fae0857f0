"""Run the whole job on a small GPT: the same command as `nemo-modelopt demo`."""

import sys

from nemo_modelopt_cli import demo
from nemo_modelopt_cli.process import entry, processes

if __name__ == "__main__":
    sys.exit(entry.run(demo.main))
elif __name__ == "__mp_main__":  # imported by multiprocessing in a spawned child
    processes.spawned_child()

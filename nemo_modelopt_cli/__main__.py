"""Run ``nemo-modelopt`` as a module: ``python -m nemo_modelopt_cli ptq ...``, also below torchrun."""

import sys

from nemo_modelopt_cli import main
from nemo_modelopt_cli.process import processes

if __name__ == "__main__":
    sys.exit(main.main())
elif __name__ == "__mp_main__":  # imported by multiprocessing in a spawned child
    processes.spawned_child()

"""The functions and classes of other packages that people replace in the module `quantizer`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Collaborators:
    """What the exporters and the steps for stand-ins call, read from the module `quantizer` when they start.

    The names are those of the attributes of `quantizer`.
    """

    mtq: Any
    mte: Any
    mto: Any
    logging: Any
    os: Any
    shutil: Any
    tempfile: Any
    barrier: Callable
    is_global_rank_zero: Callable
    unwrap_for_modelopt_operations: Callable
    TrainerContext: Any
    PreTrainedTokenizerBase: Any
    load_connector_from_trainer_ckpt: Callable
    ckpt_to_context_subdir: Callable
    ckpt_to_weights_subdir: Callable
    export_hf_checkpoint: Callable

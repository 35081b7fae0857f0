"""What ranks execute for the tests of the calibrated state and of failing exports."""

from __future__ import annotations

import os


def restored(checkpoint, tp=1, pp=1):
    from nemo.collections.llm.modelopt import setup_trainer_and_restore_model_with_modelopt_spec

    return setup_trainer_and_restore_model_with_modelopt_spec(
        str(checkpoint),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        devices=int(os.environ["WORLD_SIZE"]),
    )


def quantizer_for(data, algorithm="fp8", export=None, **settings):
    from nemo.collections.llm.modelopt import ExportConfig, QuantizationConfig, Quantizer

    own = {"calibration_dataset": str(data), "calibration_dataset_size": 20, "calibration_batch_size": 4}
    config = QuantizationConfig(algorithm=algorithm, **{"calibration_seq_len": 32, **own, **settings})
    return Quantizer(config, None if export is None else ExportConfig(**export))


class Planted:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)

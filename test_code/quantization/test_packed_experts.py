"""Experts that files hold in one tensor cannot be stored quantized: an error says so before the calibration."""

from __future__ import annotations

import pytest

from test_code.support import installed, jobs_quant


def error(folder: str, algorithm: str) -> tuple[str, str, bool]:
    """Import a random GPT-OSS and export it quantized; return the error's class and text, and what is left."""
    from test_code.families import jobs

    checkpoint = jobs.import_hf("gpt-oss", folder)
    quant = {"calibration_dataset": jobs_quant.corpus(f"{folder}/text.jsonl"), "calibration_dataset_size": 16}
    return jobs_quant.ptq_error(str(checkpoint), f"{folder}/out", algorithm, "hf", quant=quant)


@pytest.mark.parametrize("algorithm", ["fp8", "int8"])
def test_experts_in_one_tensor_are_refused_before_the_calibration(ranks, tmp_path, algorithm):
    installed.need_family("gpt-oss")
    ((name, text, left),) = ranks(1).run(error, str(tmp_path), algorithm)
    assert name == "ModelOptConfigError" and not left
    assert "experts" in text and "cannot be stored quantized" in text and 'export_format="nemo"' in text, text

"""A search chooses only sizes that the formats support; unsupported sizes are reported at the start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from nemo.collections.llm.modelopt import ModelOptConfigError
from nemo_modelopt_cli.compress import jobs, plan
from nemo_modelopt_cli.compress import settings as job_settings
from nemo_modelopt_dropin.preflight import model_checks, model_sizes
from nemo_modelopt_dropin.preflight.model_sizes import Shape
from test_code.support import command_lines, jobs_compress

MODEL = Shape("GPT", 4, 512, 1536, 16, 4, 32, 256, gated=True)
SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")

_AWQ_HF = {"algorithm": "int4_awq", "formats": ("nemo", "hf")}


def quantize_too_wide(folder: str, blocks: int) -> tuple[str, str]:
    """Return the errors of distillation and quantization for a student whose sizes blocks do not divide."""
    here, found = Path(folder), []
    job = jobs_compress._pruning(here, {}, {"target_num_layers": 2}, {**_AWQ_HF, "awq_block_size": blocks})
    for work, more in ((jobs.distill, (here, None)), (jobs.quantize, (here,))):
        try:
            work(here / "no such stage", job, here / "checkpoint", *more)
        except ModelOptConfigError as error:
            found.append(str(error))
    return found[0], found[1]


# Without a deadline: an example takes longer on a machine that is busy.
@hypothesis_settings(deadline=None)
@given(
    budget=st.floats(0.2, 0.95),
    tp=st.sampled_from([1, 2, 4]),
    block=st.sampled_from([None, 16, 32, 64, 128]),
    groups=st.sampled_from([4, 16]),
    channels=st.sampled_from([32, 24]),
)
def test_every_candidate_fits_the_blocks(cpu_backend, budget, tp, block, groups, channels):
    from nemo.collections.llm.modelopt import ModelOptConfigError
    from nemo.collections.llm.modelopt.prune import _candidates

    shape = replace(MODEL, num_query_groups=groups, kv_channels=channels)
    multiples = model_checks.size_multiples(shape, tp, block)
    sizes = {name: getattr(shape, name) for name in SIZES}

    def counted(at):
        return replace(shape, **{name: at[name] for name in SIZES}).parameters

    try:
        found = _candidates.choose(
            sizes, {}, counted, counted, (int(budget * shape.parameters), None), 6, multiples=multiples
        )
    except ModelOptConfigError:
        small = model_checks.smallest(shape, {}, multiples).parameters
        assert small > budget * shape.parameters or model_checks.block_problems(shape, tp, block, chosen=True)
        return
    for candidate in found:
        pruned = replace(shape, **{name: candidate.sizes[name] for name in SIZES})
        assert model_checks.block_problems(pruned, tp, block) == []
        assert pruned.num_attention_heads % tp == 0
    assert not model_checks.budget_problems(shape, str(int(budget * shape.parameters)), {}, multiples)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size_multiples": {"hidden_size": 16}}, "is for target_params"),
        ({"target_params": "70%", "size_multiples": {"hidden_size": 0}}, "must map hparams to whole numbers"),
        ({"target_params": "70%", "size_multiples": 3}, "must map hparams to whole numbers"),
    ],
)  # fmt: skip
def test_invalid_multiples_raise_an_error(cpu_backend, settings, message):
    from nemo.collections.llm.modelopt import ModelOptConfigError, PruningConfig

    with pytest.raises(ModelOptConfigError, match=message):
        PruningConfig(**settings)


@pytest.mark.parametrize(
    ("sizes", "fixed", "message"),
    [
        ({"hidden_size": 512}, {"hidden_size": 200}, "target_hidden_size=200 is not a multiple of 128"),
        ({"hidden_size": 64}, {}, "hidden_size must be a multiple of 128, but the model's is 64"),
    ],
)
def test_sizes_that_are_not_pruned_must_fit(cpu_backend, sizes, fixed, message):
    from nemo.collections.llm.modelopt import ModelOptConfigError
    from nemo.collections.llm.modelopt.prune import _candidates

    with pytest.raises(ModelOptConfigError, match=message):
        _candidates.check_multiples(sizes, fixed, {"hidden_size": 128})


AWQ = "--algorithm int4_awq --formats nemo hf --cpu"
FULL = {"hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 8, "num_query_groups": 4}


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (f"--target-params 70% {AWQ}", None),
        (f"--target-params 70% --tp 2 {AWQ}", None),
        (f"--target-params 70% {AWQ} --awq-block-size 512", "blocks of 512 (awq-block-size) do not divide the 256 "
         "inputs on each rank of layers after hidden_size; use --awq-block-size 256"),
        (f"--target-params 70% --target-hidden-size 192 {AWQ}", "pruning: target_hidden_size 192 is not a multiple of "
         "128, which int4_awq as nemo and hf on tp 1 needs"),
        (f"--target-params 70% --tp 4 {AWQ} --awq-block-size 256", "heads x channels; use --awq-block-size 64"),
        (f"--target-hidden-size 192 {AWQ}", "use --awq-block-size 64"),
        ("--target-hidden-size 192 --algorithm int4 --formats hf --cpu", "blocks of 128 (fixed for int4) do not divide "
         "the 192 inputs on each rank of layers after hidden_size; use int4_awq with a block size of 64"),
        (f"--target-params 2% {AWQ}", "ffn_hidden_size must be a multiple of 128"),
    ],
)  # fmt: skip
def test_the_job_is_checked_at_its_start(tmp_path, monkeypatch, capsys, flags, problem):
    command_lines.inputs(tmp_path)
    command_lines.checkpoint(tmp_path / "big", **FULL)
    monkeypatch.chdir(tmp_path)
    command = command_lines.COMPRESSION.replace("--teacher model", "--teacher big").split() + flags.split()
    if problem is None:
        job, _, _ = command_lines.script_of("compress").resolve(command)
        heads = 128 * job.layout.tp // 32
        assert job.size_multiples() == {"hidden_size": 128, "ffn_hidden_size": 128 * job.layout.tp,
                                        "num_attention_heads": heads}  # fmt: skip
        return
    with pytest.raises(SystemExit, match="2"):
        command_lines.script_of("compress").resolve(command)
    assert problem in capsys.readouterr().err


def test_other_blocks_choose_other_sizes(tmp_path):
    """The pruning step changes with the settings of the blocks, and not with other settings."""
    command_lines.inputs(tmp_path)
    teacher = str(command_lines.checkpoint(tmp_path / "big", **FULL))

    def settings(**changed) -> dict:
        quantization = job_settings.Quantization("int4_awq", formats=("hf",), **changed)
        job = job_settings.Job(
            teacher,
            str(tmp_path / "text.jsonl"),
            str(tmp_path / "heldout.jsonl"),
            pruning=job_settings.Pruning(target_params="70%"),
            quantization=quantization,
        )
        return next(stage.settings for stage in plan.compression_stages(job, tmp_path) if stage.name == "prune")

    assert settings() != settings(awq_block_size=64)
    assert settings() == settings(calibration_size=32)


def test_a_real_search_keeps_to_the_blocks(ranks, tmp_path):
    folder = str(tmp_path)
    ranks(1).run(jobs_compress.make_teacher, folder, timeout=240)
    ranks(1).run(jobs_compress.tokenize, folder, timeout=240)
    quantization = {"algorithm": "int4_awq", "formats": ("nemo", "hf"), "awq_block_size": 32}
    pruning = {"target_params": "70%", "max_candidates": 4, "heldout_batches": 1}
    ranks(1).run(jobs_compress.prune, folder, {}, pruning, quantization, timeout=240)
    found = model_sizes.read(Path(folder) / "pruned" / "checkpoint")
    assert found.parameters <= 0.7 * model_sizes.read(Path(folder) / "checkpoint").parameters
    assert model_checks.block_problems(found, 1, 32) == []
    for error in ranks(1).run(quantize_too_wide, folder, 48, timeout=240)[0]:
        assert (
            "blocks of 48 (awq-block-size) do not divide the 64 inputs" in error and "use --awq-block-size 16" in error
        )

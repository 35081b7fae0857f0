"""The NeMo-Run recipes: what they configure, against stock's values."""

from __future__ import annotations

import dataclasses
import pickle
import textwrap

import fiddle
import nemo_run as run
import pytest
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.llm.modelopt import ExportConfig, PruningConfig, QuantizationConfig
from nemo.collections.llm.modelopt.recipes import compress_recipe, distillation_recipe, prune_recipe, ptq_recipe
from nemo.collections.llm.modelopt.recipes.distillation_recipe import trainer
from nemo_modelopt_cli.compress import api, plan, stages
from nemo_modelopt_cli.compress.settings import Job, Layout, SettingsError
from test_code.support import command_lines


def test_distillation_recipe():
    recipe = distillation_recipe("/student", "/teacher", "/kd.yaml", dir="/logs", name="run", num_nodes=2)
    assert isinstance(recipe, run.Partial) and recipe.__fn_or_cls__ is llm.distill
    assert (recipe.student_model_path, recipe.teacher_model_path) == ("/student", "/teacher")
    assert recipe.distillation_config_path == "/kd.yaml"
    assert (recipe.data.seq_length, recipe.data.global_batch_size, recipe.data.micro_batch_size) == (8192, 512, 1)
    assert recipe.optim.config.lr == 3e-5
    assert recipe.log.log_dir == "/logs" and recipe.log.name == "run"
    assert (recipe.trainer.num_nodes, recipe.trainer.devices) == (2, 8)


def test_trainer():
    config = trainer(tensor_parallelism=4, pipeline_parallelism=2, context_parallelism=2, max_steps=7)
    assert config.__fn_or_cls__ is nl.Trainer and config.strategy.__fn_or_cls__ is nl.MegatronStrategy
    strategy = config.strategy
    sizes = (
        strategy.tensor_model_parallel_size,
        strategy.pipeline_model_parallel_size,
        strategy.context_parallel_size,
        strategy.virtual_pipeline_model_parallel_size,
    )
    assert sizes == (4, 2, 2, None)
    assert config.max_steps == 7 and config.val_check_interval == 2000 and config.limit_val_batches == 32
    ddp = strategy.ddp
    assert ddp.average_in_collective and ddp.overlap_grad_reduce and ddp.grad_reduce_in_fp32


@pytest.mark.parametrize("tp, asked, expected", [(8, True, True), (8, False, False), (1, True, False)])
def test_sequence_parallelism_needs_tensor_parallelism(tp, asked, expected):
    assert trainer(tensor_parallelism=tp, sequence_parallelism=asked).strategy.sequence_parallel is expected


def test_prune_recipe():
    recipe = prune_recipe("/model", "/pruned")
    assert isinstance(recipe, run.Partial) and recipe.__fn_or_cls__ is llm.prune
    assert (recipe.nemo_checkpoint, recipe.save_path) == ("/model", "/pruned")
    assert (recipe.devices, recipe.num_nodes, recipe.tp_size, recipe.pp_size) == (1, 1, 1, 1)
    assert recipe.num_train_samples == 1024 and recipe.legacy_ckpt is False
    assert recipe.pruning_config.__fn_or_cls__ is PruningConfig
    recipe.pruning_config.target_ffn_hidden_size = 9216
    assert recipe.pruning_config.target_ffn_hidden_size == 9216


def test_ptq_recipe():
    recipe = ptq_recipe("/model", "/fp8", export_format="hf", tensor_parallelism=4, pipeline_parallelism=2, num_nodes=2)
    assert isinstance(recipe, run.Partial) and recipe.__fn_or_cls__ is llm.ptq
    assert (recipe.calibration_tp, recipe.calibration_pp, recipe.devices, recipe.num_nodes) == (4, 2, 4, 2)
    assert recipe.export_config.__fn_or_cls__ is ExportConfig
    assert (recipe.export_config.path, recipe.export_config.export_format) == ("/fp8", "hf")
    assert recipe.quantization_config.__fn_or_cls__ is QuantizationConfig
    recipe.quantization_config.algorithm = "int8"
    assert recipe.quantization_config.algorithm == "int8"


def test_compress_recipe_builds_the_job():
    recipe = compress_recipe("/model", "/train", "/heldout", "/run", num_gpus_per_node=2, pipeline_parallelism=2)
    assert isinstance(recipe, run.Partial) and recipe.__fn_or_cls__ is api.compress
    recipe.job.pruning.target_num_layers = 3
    recipe.job.distillation.steps = 7
    job = fiddle.build(recipe.job)
    assert isinstance(job, Job)
    assert job.layout == Layout(devices=2, pp=2)
    assert (job.teacher, job.pruning.target_num_layers, job.distillation.steps) == ("/model", 3, 7)
    assert recipe.output == "/run"


@pytest.mark.parametrize(
    "recipe", [ptq_recipe("/m", "/q"), compress_recipe("/m", "/a", "/b", "/c")], ids=["ptq", "compress"]
)
def test_recipes_travel_to_a_cluster(recipe):
    """NeMo-Run sends a job to Slurm or Kubernetes as text."""
    packed = ZlibJSONSerializer().serialize(recipe)
    assert ZlibJSONSerializer().deserialize(packed) == recipe


def test_the_job_as_a_function_refuses_what_cannot_work(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    teacher = command_lines.shell(tmp_path / "teacher")
    recipe = compress_recipe(str(teacher), "none", "none", str(tmp_path / "run"))
    with pytest.raises(SettingsError, match="nothing to prune(.|\n)*none: there is no such file"):
        fiddle.build(recipe)()
    for name in ("text", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n')
    recipe.job.train_text, recipe.job.heldout_text = str(tmp_path / "text.jsonl"), str(tmp_path / "heldout.jsonl")
    recipe.job.pruning.target_num_layers = 1
    recipe.job.distillation.global_batch_size = 32
    with pytest.raises(SettingsError, match="needs 8 ranks and this is one process: start it with torchrun"):
        fiddle.build(recipe)()
    assert not (tmp_path / "run").exists()


def test_the_job_as_a_function_keeps_finished_stages(tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    teacher = command_lines.shell(tmp_path / "teacher")
    for name in ("text", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"text": "{name}"}}\n')
    texts = [str(tmp_path / f"{name}.jsonl") for name in ("text", "heldout")]
    recipe = compress_recipe(str(teacher), *texts, str(tmp_path / "run"), num_gpus_per_node=1)
    recipe.job.pruning.target_num_layers = 1
    job = fiddle.build(recipe.job)
    for stage in plan.compression_stages(job, tmp_path / "run"):
        record = stages.Record(stage.name, "", "", {**stage.settings}, {}, 1.0)
        (tmp_path / "run" / stage.name).mkdir(parents=True)
        stages.write_json(tmp_path / "run" / stage.name / stages.DONE, dataclasses.asdict(record))
    recipe.job.distillation.steps = 20
    recipe.job.distillation.warmup_steps = 2
    with pytest.raises(SettingsError, match=r"distill .finished.: steps was 1000 and is now 20"):
        fiddle.build(recipe)()


def test_the_compression_recipe_is_imported_when_it_is_first_used(commands, tmp_path):
    """The subpackage must not depend on the commands; every way to import the recipe still works."""
    code = """
        import sys
        import nemo.collections.llm.modelopt.recipes as recipes
        import nemo.collections.llm.modelopt.recipes.compress_recipe
        assert "nemo_modelopt_cli.compress.recipe" not in sys.modules
        from nemo.collections.llm.modelopt.recipes import compress_recipe as one
        from nemo.collections.llm.modelopt.recipes.compress_recipe import NAME, compress_recipe as two
        from nemo_modelopt_cli.compress.recipe import compress_recipe
        import nemo.collections.llm.modelopt.recipes.compress_recipe as three
        names = {}
        exec("from nemo.collections.llm.modelopt.recipes import *", names)
        assert one is two is three is recipes.compress_recipe is names["compress_recipe"] is compress_recipe
        assert NAME == "default" and callable(one)
        try:
            recipes.decompress_recipe
        except AttributeError as error:
            assert "has no attribute 'decompress_recipe'" in str(error)
        else:
            raise SystemExit("no error")
    """
    (tmp_path / "imports.py").write_text(textwrap.dedent(code))
    done = commands.run([str(tmp_path / "imports.py")])
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_compression_recipe_is_pickled_by_name():
    assert pickle.loads(pickle.dumps(compress_recipe)) is compress_recipe
    earlier = b"cnemo.collections.llm.modelopt.recipes.compress_recipe\ncompress_recipe\n."
    assert pickle.loads(earlier) is compress_recipe

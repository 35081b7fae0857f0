"""What is checked before lm-eval starts: settings, files of tasks, readers, the environment; lm-eval is not needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_modelopt_cli import evaluate
from nemo_modelopt_cli.compress import command, plan, stages
from nemo_modelopt_cli.compress.settings import Job, Layout, Pruning, Quantization
from nemo_modelopt_cli.evaluation import check, child, folders, harness_settings, scores, tasks
from nemo_modelopt_cli.evaluation.harness_settings import Evaluation, Harness
from nemo_modelopt_dropin import ranks
from nemo_modelopt_dropin.errors import ModelOptConfigError
from nemo_modelopt_dropin.preflight import algorithms, readers
from test_code.evaluation import local


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> str:
    """Return an interpreter that has the standard library only."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    return str(folder / "bin" / "python")


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"limit": 0}, "limit must be positive, got 0"),
        ({"fewshot": -1}, "fewshot must not be negative, got -1"),
        ({"batch_size": "many"}, "batch_size must be a positive number or auto, got 'many'"),
        ({"batch_size": "0"}, "batch_size must be a positive number or auto, got '0'"),
        ({"backend": "vlm"}, "unknown backend 'vlm'; allowed: hf, vllm; did you mean vllm"),
        ({"model_args": "float32"}, "model_args must be NAME=VALUE,..., got 'float32'"),
        ({"python": "/none/python"}, "python /none/python: there is no such program"),
    ],
)
def test_settings_of_lm_eval_that_cannot_work(settings, problem):
    (found,) = Harness(**settings).harness_problems()
    assert found.startswith(problem)


@pytest.mark.parametrize("size", ["1", "16", "auto", "auto:4"])
def test_batch_sizes_that_lm_eval_takes(size):
    assert Harness(batch_size=size).harness_problems() == []


FP32 = {"softmax_dtype": "float32"}


@pytest.mark.parametrize(
    ("settings", "devices", "expected"),
    [
        ({}, 1, {"dtype": "auto"} | FP32),
        ({}, 4, {"dtype": "auto", "parallelize": True} | FP32),
        ({"backend": "vllm"}, 4, {"dtype": "auto", "tensor_parallel_size": 4}),
        ({"model_args": "dtype=float32, max_length=128"}, 1, {"dtype": "float32", "max_length": 128} | FP32),
        (
            {"model_args": "parallelize=false,softmax_dtype=none,x=0.5"},
            4,
            {"dtype": "auto", "parallelize": False, "softmax_dtype": None, "x": 0.5},
        ),
    ],
)
def test_arguments_of_the_model(settings, devices, expected):
    assert Harness(**settings).arguments(devices) == expected


def _problems(evaluation: Evaluation, algorithm="int8", layout="auto", formats=("nemo", "hf"), teacher=None):
    return evaluation.problems(algorithm, layout, formats, teacher)


def test_without_tasks_nothing_is_wrong_unless_other_settings_expect_some():
    assert _problems(Evaluation(), formats=("nemo",)) == []
    (found,) = _problems(Evaluation(limit=3, backend="vllm"))
    assert "limit, backend without tasks (--evaluate) has no effect" in found


@pytest.mark.parametrize(
    ("evaluation", "job", "parts"),
    [
        ({}, {"formats": ("nemo",)}, ["add hf to --formats", "--evaluate-models teacher distilled"]),
        ({}, {"algorithm": "fp8"}, ["transformers cannot load", "--hf-layout compressed-tensors", "backend vllm"]),
        ({"backend": "vllm"}, {"algorithm": "int4", "layout": "modelopt"}, ["vLLM cannot load", "compressed-tensors"]),
        ({"models": ("graded",)}, {}, ["unknown model 'graded'", "allowed: teacher, pruned, distilled, exported"]),
        ({"tasks": ("no/such.yaml",)}, {}, ["tasks no/such.yaml: there is no such file or folder"]),
    ],
)
def test_exports_that_the_backend_cannot_load_are_reported(evaluation, job, parts):
    (found,) = _problems(Evaluation(**{"tasks": ("arc_easy",), **evaluation}), **job)
    for part in parts:
        assert part in found


@pytest.mark.parametrize("backend", harness_settings.BACKENDS)
@pytest.mark.parametrize("algorithm", [name for name in algorithms.TABLE if algorithms.hf_format_of(name)])
def test_what_is_offered_instead_works(algorithm, backend):
    """The remedies of the message are settings without a problem."""
    for found in _problems(Evaluation(tasks=("arc_easy",), backend=backend), algorithm):
        for layout in readers.LAYOUTS:
            if f"--hf-layout {layout}" in found:
                assert _problems(Evaluation(tasks=("arc_easy",), backend=backend), algorithm, layout) == []
        for other in harness_settings.BACKENDS:
            if f"--evaluate-backend {other}" in found:
                assert _problems(Evaluation(tasks=("arc_easy",), backend=other), algorithm) == []
    assert _problems(Evaluation(tasks=("a",), backend=backend, models=("distilled", "teacher")), algorithm) == []


def test_a_teacher_whose_tokenizer_lm_eval_cannot_use_is_reported(tmp_path):
    (tmp_path / "context").mkdir()
    (tmp_path / "context" / "tokenizer.model").write_bytes(b"a model of SentencePiece")
    evaluation = Evaluation(tasks=("arc_easy",), models=("teacher",))
    (found,) = _problems(evaluation, teacher=str(tmp_path))
    assert f"the tokenizer of {tmp_path} is not one of transformers" in found
    (tmp_path / "context" / "tokenizer_config.json").write_text("{}")
    assert _problems(evaluation, teacher=str(tmp_path)) == []


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_names_are_separated_by_commas_and_blanks():
    assert tasks.names(("arc_easy, mmlu*", "arc_easy", "my.yaml,")) == ("arc_easy", "mmlu*", "my.yaml")


def test_only_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tasks.absolute(("arc_easy,own/task.yaml",)) == ("arc_easy", str(tmp_path / "own" / "task.yaml"))


def test_a_folder_of_tasks_needs_no_separator_in_its_name(tmp_path, monkeypatch):
    local.write(tmp_path)
    (tmp_path / "arc_easy").mkdir()  # without tasks: the name is lm-eval's
    monkeypatch.chdir(tmp_path)
    assert tasks.absolute(("tasks", "arc_easy")) == (str(tmp_path / "tasks"), "arc_easy")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [", "cannot be read as YAML"),
        ("- 1", "does not hold settings by name"),
        ("dataset_path: json", "defines a task"),
    ],
)
def test_files_that_define_no_task(tmp_path, text, problem):
    path = tmp_path / "task.yaml"
    path.write_text(text)
    (found,) = tasks.problems(str(path))
    assert problem in found and str(path) in found


def test_of_a_folder_the_groups_and_the_tasks_in_none_are_chosen(tmp_path):
    folder = local.write(tmp_path)
    (folder / "group.yaml").write_text("group: pair\ntask: [tiny_choice, {task: tiny_text}]\n")
    (folder / "other.yaml").write_text("not: a task\n")
    assert [one.name for one in tasks.chosen(str(folder))] == ["pair", "tiny_target"]
    request = check.of_tasks((str(folder / "group.yaml"), str(folder / "tiny_choice.yaml")))
    assert request["include"] == [str(folder)] and request["built_in"]
    assert request["tasks"] == ["pair", str(folder / "tiny_choice.yaml")]
    assert not check.of_tasks((str(folder / "tiny_choice.yaml"),))["built_in"]


def test_a_task_depends_on_its_data_its_functions_and_what_it_includes(tmp_path):
    folder = local.write(tmp_path)
    (folder / "helpers.py").write_text("def change(rows):\n    return rows\n")
    (folder / "child.yaml").write_text("include: tiny_text.yaml\ntask: child\nprocess_docs: !function helpers.change\n")
    found = {path.name for path in tasks.inputs(str(folder / "child.yaml"))}
    assert found == {"child.yaml", "tiny_text.yaml", "helpers.py", "questions.jsonl"}


# --- the process ------------------------------------------------------------------------------------------------------


def test_a_missing_lm_eval_is_reported_with_the_command_that_installs_it(bare_python):
    with pytest.raises(ModelOptConfigError, match="needs lm_eval, torch, transformers, accelerate, which") as caught:
        check.check(("arc_easy",), Harness(python=bare_python))
    assert f"{bare_python} -m pip install 'lm-eval>=0.4.13,<0.5' torch transformers accelerate" in str(caught.value)
    assert "--evaluate-python" in str(caught.value)


def test_the_extra_asks_for_the_version_that_the_check_asks_for():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert f'eval = ["{check.REQUIREMENT}"]' in text and check.LEAST in check.REQUIREMENT


def test_an_interpreter_that_cannot_start_is_reported_with_its_output(tmp_path):
    path = tmp_path / "python"
    path.write_text("#!/bin/sh\necho the library libx is missing >&2\nexit 127\n")
    path.chmod(0o755)
    with pytest.raises(ModelOptConfigError, match="cannot be started with .*ended with code 127\nthe library libx"):
        check.check(("arc_easy",), Harness(python=str(path)))


@pytest.mark.parametrize(
    ("given", "offline"),
    [({}, "1"), ({"HF_HUB_OFFLINE": "0"}, "0"), ({"HF_DATASETS_OFFLINE": "0"}, None)],
)
def test_lm_eval_is_offline_unless_the_environment_decides(given, offline):
    assert child.environment(given).get("HF_HUB_OFFLINE") == offline


def test_lm_eval_does_not_take_itself_for_a_rank():
    rank = {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x", "SLURM_PROCID": "0", "OTHER": "kept"}
    found = child.environment({**rank, ranks.STARTED_BY_US: "2", "OMP_NUM_THREADS": "7"})
    assert not {*rank} - {"OTHER"} & {*found} and found["OTHER"] == "kept"
    assert found["OMP_NUM_THREADS"] == "7"  # the user's
    share = str(max(1, (os.cpu_count() or 1) // 2))
    assert "OMP_NUM_THREADS" not in child.environment({ranks.STARTED_BY_US: "2", "OMP_NUM_THREADS": share})


def test_bars_move_ours_and_other_lines_go_to_the_log(tmp_path, capsys):
    script = tmp_path / "python"
    bars = "Running loglikelihood requests:  50%|####  | 3/6 [00:01<00:01]"
    script.write_text(f"#!/bin/sh\nprintf 'a line\\n\\r{bars.replace('%', '%%')}\\r' >&2\necho '{{}}' > \"$3\"\n")
    script.chmod(0o755)
    seen: list[tuple] = []
    assert child.ask(str(script), {}, lambda *bar: seen.append(bar)) == {}
    assert seen == [("Running loglikelihood requests", 3, 6)]
    assert "a line" in capsys.readouterr().err


def test_an_interruption_ends_lm_eval(tmp_path):
    script, number = tmp_path / "python", tmp_path / "number"
    script.write_text(f"#!/bin/sh\necho $$ > {number}\nprintf 'requests:  50%%|##  | 1/2 [\\r' >&2\nexec sleep 60\n")
    script.chmod(0o755)

    def interrupted(title: str, done: int, whole: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        child.ask(str(script), {}, interrupted)
    with pytest.raises(ProcessLookupError):
        os.kill(int(number.read_text()), 0)


# --- the job step -----------------------------------------------------------------------------------------------------


def _job(tmp_path: Path, **evaluation) -> Job:
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.jsonl").write_text("")
    (tmp_path / "teacher").mkdir(exist_ok=True)
    return Job(
        str(tmp_path / "teacher"),
        str(tmp_path / "train.jsonl"),
        str(tmp_path / "heldout.jsonl"),
        layout=Layout(cpu=True),
        pruning=Pruning(target_num_layers=2),
        quantization=Quantization(algorithm="int8", formats=("nemo", "hf")),
        evaluation=Evaluation(**evaluation),
    )


def _step(job: Job, root: Path) -> stages.Stage:
    (found,) = [step for step in plan.compression_stages(job, root) if step.name == "evaluate"]
    return found


def test_the_step_exists_only_with_tasks_and_changes_no_other(tmp_path):
    plain, asked = _job(tmp_path), _job(tmp_path, tasks=("arc_easy",))
    before = plan.compression_stages(plain, tmp_path)
    after = plan.compression_stages(asked, tmp_path)
    assert [step.name for step in after] == [*(step.name for step in before), "evaluate"] == plan.step_names(asked)
    assert [step.settings for step in after[:-1]] == [step.settings for step in before]


def test_the_scores_depend_on_the_content_of_the_tasks_and_not_on_the_interpreter(tmp_path):
    task = str(local.write(tmp_path) / "tiny_choice.yaml")
    first = _step(_job(tmp_path, tasks=(task,)), tmp_path).settings
    other = _job(tmp_path, tasks=(task,), python=sys.executable, batch_size="2")
    assert _step(other, tmp_path).settings == first
    assert _step(_job(tmp_path, tasks=(task,), limit=2), tmp_path).settings != first
    (tmp_path / "questions.jsonl").write_text("{}\n")
    changed = stages.differences(first, _step(_job(tmp_path, tasks=(task,)), tmp_path).settings)
    assert changed == (f"the content of {tmp_path / 'questions.jsonl'} changed",)


def test_a_missing_lm_eval_ends_the_job_before_it_starts(tmp_path, bare_python, capsys):
    from nemo_modelopt_cli.compress import runner

    job = _job(tmp_path, tasks=("arc_easy",), python=bare_python)
    steps = plan.compression_stages(job, tmp_path / "run")
    code = runner.execute(steps, tmp_path / "run", job.layout, lambda records: 0)
    assert code == runner.USAGE
    assert "The evaluation needs lm_eval" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_lm_eval_is_not_looked_for_if_the_scores_are_there(tmp_path):
    asked: list[str] = []
    step = stages.Stage("evaluate", lambda folder, records, out: {}, ready=lambda: asked.append("asked"))
    stages.check_ready([step], tmp_path)
    stages.run_stages([step], tmp_path)
    stages.check_ready([step], tmp_path)
    assert asked == ["asked"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--evaluate", "arc_easy,mmlu", "--evaluate-limit", "5"], {"tasks": ("arc_easy", "mmlu"), "limit": 5}),
        (["--evaluate", "arc_easy", "mmlu", "--evaluate-backend", "vllm"], {"backend": "vllm"}),
        (["--evaluate", "a", "--evaluate-models", "teacher", "distilled"], {"models": ("teacher", "distilled")}),
        (["--evaluate", "a", "--evaluate-batch-size", "auto", "--evaluate-fewshot", "0"], {"fewshot": 0}),
    ],
)
def test_flags_of_compress(words, expected):
    found = command.settings(command.parser().parse_args(["--target-num-layers", "2", *words]))["evaluation"]
    names = tasks.names(found["tasks"])
    for name, value in expected.items():
        assert (names if name == "tasks" else type(value)(found[name])) == value


# --- folders and the command ------------------------------------------------------------------------------------------


def _folder(tmp_path: Path, section: dict | None, beside: dict | None = None) -> Path:
    config = {"architectures": ["LlamaForCausalLM"]} | ({"quantization_config": section} if section else {})
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    if beside:
        (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": beside}))
    import torch
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(
    ("section", "beside", "backend", "problem"),
    [
        (None, None, "hf", None),
        ({"quant_method": "compressed-tensors"}, None, "hf", None),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, None, "hf", "use --backend vllm"),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, None, "hf", "transformers cannot load it"),
        (None, {"quant_algo": "W4A16_AWQ"}, "vllm", "export it with another --hf-layout"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, None, "vllm", None),
    ],
)
def test_folders_that_a_backend_reads_wrongly_are_reported(tmp_path, section, beside, backend, problem):
    found = folders.problems(_folder(tmp_path, section, beside), backend)
    assert [problem in one for one in found] == ([] if problem is None else [True])


def test_the_command_lists_everything_that_is_wrong(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([str(tmp_path / "none"), str(tmp_path), "--tasks", "no.yaml", "--limit", "0", "--devices", "0"])
    shown = capsys.readouterr().err
    for part in (
        "none: no such folder",
        "neither a Hugging Face",
        "no.yaml: there is no",
        "limit must",
        "devices must",
    ):
        assert part in shown


def test_models_are_labelled_by_their_folders_unless_two_have_the_same_name():
    assert evaluate.labels(["a/hf", "b/student"]) == {"a/hf": "hf", "b/student": "student"}
    assert evaluate.labels(["a/hf", "b/hf"]) == {"a/hf": "a/hf", "b/hf": "b/hf"}


# --- scores -----------------------------------------------------------------------------------------------------------


def test_scores_are_read_from_lm_evals_results():
    answer = {
        "results": {
            "group": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "group"},
            "one": {"exact_match,strict": 0.25, "exact_match_stderr,strict": "N/A", "alias": " - one", "sample_len": 4},
        },
        "group_subtasks": {"group": ["one"], "one": []},
        "higher_is_better": {"group": {"acc": True}},
        "n-shot": {"one": 5},
        "n-samples": {"one": {"original": 9, "effective": 4}},
        "versions": {"one": 2.0},
    }
    group, one = scores.of_answer(answer)
    assert (group["value"], group["stderr"], group["higher_is_better"], group["part_of"]) == (0.5, 0.1, True, None)
    assert (one["filter"], one["stderr"], one["fewshot"], one["rows"]) == ("strict", None, 5, 4)
    assert (one["part_of"], one["version"]) == ("group", 2.0)


def test_nothing_heavy_is_imported_to_check_settings():
    code = "import sys, nemo_modelopt_cli.evaluate; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'nemo')))"
    assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE).returncode == 0


def test_the_harness_needs_the_standard_library_only(bare_python, tmp_path):
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"action": "check", "modules": ["lm_eval"]}))
    done = subprocess.run([bare_python, child.SCRIPT, request, tmp_path / "answer.json"])
    assert done.returncode == 0
    assert json.loads((tmp_path / "answer.json").read_text()) == {"missing": ["lm_eval"]}

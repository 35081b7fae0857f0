"""Flags from dataclass fields, and the dataclasses back from the parsed arguments."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nemo_modelopt_cli import options
from nemo_modelopt_cli.options import group, option
from nemo_modelopt_cli.parser import Parser


def _share(text: str) -> float:
    return float(text.rstrip("%")) / 100


@dataclass(frozen=True)
class Layout:
    tp: int = field(default=1, metadata=option("at most 100% of the ranks", "-ctp", "--calib_tp", "--tp"))
    cpu: bool = field(default=False, metadata=option("run on CPU ranks"))
    not_a_flag: float = 1.0


@dataclass(frozen=True)
class Training:
    steps: int = field(default=10, metadata=option("steps"))
    warmup_steps: int | None = field(default=None, metadata=option("steps of warm-up (default: a tenth)"))
    lr: float = field(default=1e-4, metadata=option(""))


@dataclass(frozen=True)
class Settings:
    model: str = field(metadata=option("checkpoint", path=True))
    layout: Layout = field(default_factory=Layout, metadata=group("layout"))
    training: Training = field(default_factory=Training, metadata=group("train", "train_"))
    kv_cache: bool | None = field(default=None, metadata=option("quantize it", "--enable_kv", off="--disable_kv"))
    formats: tuple[str, ...] = field(default=("nemo",), metadata=option("formats", choices=("nemo", "hf")))
    drop: list[int] | None = field(default=None, metadata=option("layers", nargs="*", group="train"))
    share: float | None = field(default=None, metadata=option("a share", convert=_share, metavar="PERCENT"))
    log: Path = field(default=Path("log"), metadata=option("folder", path=True))


def _parser(**more) -> Parser:
    found = Parser(prog="x")
    options.add(found, Settings, title="job", **more)
    return found


def test_the_annotations_decide_how_flags_are_read():
    words = "--model m --tp 2 --cpu --train_lr 1e-3 --formats hf nemo --drop 1 2 --share 40% --log here --enable_kv"
    assert options.build(Settings, _parser().parse_args(words.split())) == Settings(
        model="m",
        layout=Layout(tp=2, cpu=True),
        training=Training(lr=1e-3),
        kv_cache=True,
        formats=("hf", "nemo"),
        drop=[1, 2],
        share=0.4,
        log=Path("here"),
    )


@pytest.mark.parametrize("unset", [False, True])
def test_flags_that_are_not_set_leave_the_defaults(unset):
    arguments = _parser(unset=unset).parse_args(["--model", "m"])
    assert options.build(Settings, arguments) == Settings("m")
    assert vars(arguments)["calib_tp"] == (None if unset else 1)
    if unset:
        assert options.given(Settings, arguments) == {"model": "m"}


@pytest.mark.parametrize(("words", "expected"), [([], None), (["--enable_kv"], True), (["--disable_kv"], False)])
def test_a_pair_of_flags_is_one_setting(words, expected):
    assert options.build(Settings, _parser().parse_args(["--model", "m", *words])).kv_cache is expected


@pytest.mark.parametrize("name", ["-ctp", "--calib_tp", "--calib-tp", "--tp"])
def test_all_spellings_are_one_flag(name):
    assert options.build(Settings, _parser().parse_args(["--model", "m", name, "3"])).layout.tp == 3


def test_what_is_set_is_nested_as_the_dataclasses_are():
    arguments = _parser(unset=True, separator="-").parse_args(["--train-steps", "0", "--no-cpu", "--tp", "1"])
    assert options.given(Settings, arguments) == {"training": {"steps": 0}, "layout": {"cpu": False, "tp": 1}}


@pytest.mark.parametrize("unset", [False, True])
def test_the_help_shows_each_default_once(unset):
    shown = " ".join(_parser(unset=unset).format_help().split())
    for part in (
        "-ctp CALIB_TP, --calib_tp CALIB_TP, --tp CALIB_TP at most 100% of the ranks (default: 1)",
        "--train_warmup_steps TRAIN_WARMUP_STEPS steps of warm-up (default: a tenth)",
        "--train_lr TRAIN_LR (default: 0.0001)",
        "--share PERCENT a share",
        "--cpu run on CPU ranks",
        "--disable_kv the opposite of --enable_kv",
        "--log LOG folder (default: log)",
    ):
        assert part in shown
    assert "not_a_flag" not in shown
    titles = ["job:", "layout:", "train:"]
    assert sorted(titles, key=shown.index) == titles


def test_required_fields_are_required_flags(capsys):
    with pytest.raises(SystemExit, match="2"):
        _parser().parse_args(["--formats", "gguf"])
    found = capsys.readouterr().err
    assert "missing: --model" in found and "--formats: 'gguf' is none of nemo, hf" in found


def test_paths_and_names_of_arguments():
    assert options.paths(Settings) == ("model", "log")
    assert options.dests(Training) == ("steps", "warmup_steps", "lr")
    assert options.dests(Settings)[1:4] == ("calib_tp", "cpu", "train_steps")


def test_a_group_that_exists_is_extended():
    found = argparse.ArgumentParser()
    job = found.add_argument_group("layout")
    job.add_argument("--first")
    options.add(found, Settings)
    assert found.format_help().count("layout:") == 1

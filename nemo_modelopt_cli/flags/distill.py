"""The flags of ``distill``."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_modelopt_cli.flags import shared
from nemo_modelopt_cli.options import group, option

PRECISIONS = ("bf16-mixed", "bf16", "16-mixed", "16", "32")


@dataclass(frozen=True, kw_only=True)
class Models:
    """The student, the teacher and the output."""

    name: str = field(metadata=option("name of the experiment, a folder below --log_dir"))
    log_dir: str = field(metadata=option("folder of logs and checkpoints", path=True))
    model_path: str = field(metadata=option("checkpoint to train", path=True))
    teacher_path: str | None = field(
        default=None,
        metadata=option("checkpoint to distill from; without a teacher the model is trained on the data", path=True),
    )
    dump_teacher_topk: str | None = field(
        default=None,
        metadata=option(
            "do not train: run the teacher over the data of this training and record its top-k logits",
            "--dump-teacher-topk",
            metavar="FOLDER",
            path=True,
        ),
    )
    teacher_topk: str | None = field(
        default=None,
        metadata=option(
            "recording of --dump-teacher-topk: distill from it, without a teacher in memory. If --teacher_path is set, "
            "it must be the checkpoint that was recorded",
            "--teacher-topk",
            metavar="FOLDER",
            path=True,
        ),
    )
    distillation_config: str | None = field(
        default=None,
        metadata=option("YAML file with the distillation losses", "--distillation_config", "--kd_config", path=True),
    )
    tokenizer: str | None = field(default=None, metadata=shared.TOKENIZER)
    legacy_ckpt: bool = field(default=False, metadata=shared.LEGACY_CKPT)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the command runs, and how the model is split."""

    tp_size: int = field(default=1, metadata=shared.tensor_parallel("--tp_size", "--tp"))
    cp_size: int = field(default=1, metadata=option("context-parallel size", "--cp_size", "--cp"))
    pp_size: int = field(default=1, metadata=shared.pipeline_parallel("--pp_size", "--pp"))
    ep_size: int = field(default=1, metadata=option("expert-parallel size", "--ep_size", "--ep"))
    devices: int | None = field(default=None, metadata=shared.DEVICES)
    num_nodes: int | None = field(default=None, metadata=shared.NUM_NODES)
    precision: str | None = field(
        default=None, metadata=option("default: bf16-mixed, or 32 with --cpu", choices=PRECISIONS)
    )
    device: shared.Device = field(default_factory=shared.Device)


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data to train and validate on."""

    data_paths: list[str] | None = field(
        default=None,
        metadata=option("Megatron's tokenized files; with --use-chat-data one folder", nargs="+", path=True),
    )
    text: str | None = field(default=None, metadata=shared.TEXT)
    heldout_text: str | None = field(
        default=None, metadata=option("file of texts to validate on (default: --text)", path=True)
    )
    use_mock_data: bool = field(default=False, metadata=option("train on random tokens"))
    use_chat_data: bool = field(
        default=False, metadata=option("--data_paths holds conversations to fine-tune on", "--use-chat-data")
    )
    chat_template_path: str | None = field(
        default=None,
        metadata=option("file with a chat template, instead of the tokenizer's", "--chat-template-path", path=True),
    )
    answer_only_loss: bool = field(
        default=False,
        metadata=option("with --text: of conversations, count only the assistant's replies in the loss"),
    )
    packed_sequence_size: int | None = field(
        default=None,
        metadata=option(
            "with --text: pack whole texts or conversations, of at most --seq_length tokens, into sequences of this "
            "many tokens, in which each attends only to itself; needs --mbs 1"
        ),
    )
    split: str = field(default="99,1,0", metadata=shared.SPLIT)
    index_mapping_dir: str | None = field(default=None, metadata=shared.INDEX_MAPPING_DIR)
    seq_length: int = field(metadata=option("tokens per sample"))


@dataclass(frozen=True, kw_only=True)
class Training:
    """The optimizer, its schedule, validation and checkpoints."""

    max_steps: int = field(metadata=option("optimizer steps"))
    gbs: int = field(metadata=option("global batch size"))
    mbs: int = field(metadata=option("micro-batch size"))
    lr: float = field(default=1e-4, metadata=option("highest learning rate"))
    min_lr: float = field(default=1e-5, metadata=option("last learning rate"))
    warmup_steps: int = field(default=50, metadata=option("steps in which the learning rate rises to --lr"))
    val_check_interval: int = field(default=100, metadata=option("steps between validations and checkpoints"))
    save_minutes: float = field(
        default=5.0,
        metadata=option(
            "minutes between checkpoints to resume from; only the last is kept, until the training ends (0: none)"
        ),
    )
    limit_val_batches: int = field(default=32, metadata=option("micro-batches per validation"))
    log_interval: int = field(default=10, metadata=option("steps between logged metrics"))


@dataclass(frozen=True, kw_only=True)
class Options:
    """All flags of the command but those of `Parser.add_run_options`."""

    models: Models = field(metadata=group("models"))
    layout: Layout = field(default_factory=Layout, metadata=group("layout"))
    data: Data = field(metadata=group("data"))
    training: Training = field(metadata=group("training"))

"""The flags of ``prune``."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_modelopt_cli.flags import shared
from nemo_modelopt_cli.options import dests, group, option


def number(text: str) -> int | float:
    """Return a size, or a fraction of the original's."""
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def target(text: str):
    """Return the metadata of the size of one dimension."""
    return option(text, convert=number)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The checkpoint to prune, and the pruned one."""

    restore_path: str = field(metadata=option("checkpoint to prune", path=True))
    save_path: str = field(metadata=option("folder of the pruned checkpoint", path=True))
    tokenizer: str | None = field(default=None, metadata=shared.TOKENIZER)
    legacy_ckpt: bool = field(default=False, metadata=shared.LEGACY_CKPT)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the command runs, and how the model is split."""

    devices: int | None = field(default=None, metadata=shared.DEVICES)
    num_nodes: int | None = field(default=None, metadata=shared.NUM_NODES)
    tp_size: int = field(
        default=1,
        metadata=shared.tensor_parallel(
            "--tp_size", "--tp", text="tensor-parallel size; importance is measured on as many pipeline stages instead"
        ),
    )
    pp_size: int = field(default=1, metadata=shared.pipeline_parallel("--pp_size", "--pp"))
    stages: shared.UnequalStages = field(default_factory=shared.UnequalStages)
    device: shared.Device = field(default_factory=shared.Device)


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data on which importance is measured."""

    data_paths: list[str] | None = field(
        default=None,
        metadata=option("Megatron's tokenized files, or weights and files alternately", nargs="*", path=True),
    )
    text: str | None = field(default=None, metadata=shared.TEXT)
    heldout_text: str | None = field(
        default=None, metadata=option("file of texts to compare candidates on (default: --text)", path=True)
    )
    scores_path: str | None = field(
        default=None, metadata=option("folder that keeps the measured importance for other targets", path=True)
    )
    split: str = field(default="99,1,0", metadata=shared.SPLIT)
    index_mapping_dir: str | None = field(default=None, metadata=shared.INDEX_MAPPING_DIR)
    seq_length: int | None = field(
        default=None, metadata=option("tokens per sample; required when pruning by importance")
    )
    mbs: int = field(default=1, metadata=option("samples per forward pass (default: 1)"))
    num_train_samples: int = field(default=1024, metadata=option("samples to measure importance on (default: 1024)"))


@dataclass(frozen=True, kw_only=True)
class Targets:
    """Sizes after pruning."""

    target_ffn_hidden_size: int | float | None = field(default=None, metadata=target("inner size of the MLP"))
    target_hidden_size: int | float | None = field(default=None, metadata=target("hidden size"))
    target_num_attention_heads: int | float | None = field(
        default=None, metadata=target("attention heads, divisible by the query groups")
    )
    target_num_query_groups: int | float | None = field(
        default=None, metadata=target("query groups; requires --target_num_attention_heads")
    )
    target_num_layers: int | float | None = field(
        default=None, metadata=target("layers to keep, by block influence (arXiv 2403.03853)")
    )
    target_mamba_num_heads: int | float | None = field(default=None, metadata=target("Mamba heads"))
    target_mamba_head_dim: int | float | None = field(default=None, metadata=target("size of a Mamba head"))
    target_num_moe_experts: int | float | None = field(default=None, metadata=target("experts per layer"))
    target_moe_ffn_hidden_size: int | float | None = field(default=None, metadata=target("inner size of an expert"))
    target_moe_shared_expert_intermediate_size: int | float | None = field(
        default=None, metadata=target("inner size of the shared expert")
    )


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """Parameters after pruning."""

    target_params: str | None = field(
        default=None,
        metadata=option("largest number of parameters to keep: 70%, 5.6e9 or 5.6B; other targets stay fixed"),
    )
    target_active_params: str | None = field(
        default=None, metadata=option("the same for the parameters that an MoE model uses for one token")
    )


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to prune."""

    targets: Targets = field(default_factory=Targets)
    budgets: Budgets = field(default_factory=Budgets)
    max_candidates: int = field(
        default=16, metadata=option("combinations of sizes to try for --target_params (default: 16)")
    )
    heldout_batches: int = field(default=16, metadata=option("held-out batches to compare them on (default: 16)"))
    drop_layers: list[int] | None = field(
        default=None,
        metadata=option("layers to drop, counted from 1; cannot be combined with targets", nargs="*"),
    )


@dataclass(frozen=True, kw_only=True)
class Report:
    """The report."""

    report_path: str | None = field(
        default=None, metadata=option("folder of report.html and .json (default: save_path + .report)", path=True)
    )
    no_report: bool = field(default=False, metadata=shared.NO_REPORT)


@dataclass(frozen=True, kw_only=True)
class Options:
    """All flags of the command but those of `Parser.add_run_options`."""

    model: Model = field(metadata=group("model"))
    layout: Layout = field(default_factory=Layout, metadata=group("layout"))
    data: Data = field(default_factory=Data, metadata=group("data for importance"))
    request: Request = field(default_factory=Request, metadata=group("what to prune"))
    report: Report = field(default_factory=Report, metadata=group("report"))


TARGETS = dests(Targets)
BUDGETS = dests(Budgets)

"""Derive which Megatron parameters make up each tensor of a Hugging Face checkpoint from NeMo's own exporter.

NeMo has an exporter for each model class. It passes names and functions to ``io.apply_transforms``, which applies them
to the values. Here it runs with names instead of values, and with that function replaced. The result is a list of
rules; no weight is read. The values are converted later, one rule at a time.

NeMo's exporters are corrected in `_aliases` and `_corrected`:

- They contain the names of Transformer Engine's fused norms, of one way to store experts, and of a model without bias.
- Some fail if the embedding is padded, or if the output layer is tied.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from nemo.lightning import io
from nemo.lightning.io.state import StateDictTransform, TransformCTX
from transformers import AutoModelForCausalLM

from nemo_modelopt_dropin.preflight import families

from ..._functions import replaced
from ...errors import ModelOptConfigError

_EXPERTS = ".experts."
_LAYER = re.compile(r"\blayers\.(\d+)\.")
# Pairs of a fused norm of Transformer Engine and the separate norm of Megatron's local layers.
_NORMS = (
    (".self_attention.linear_qkv.layer_norm_", ".input_layernorm."),
    (".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."),
    (".mixer.in_proj.layer_norm_", ".norm."),
)
# Experts as separate modules, and as numbered weights of one module.
_SEPARATE = re.compile(r"\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias)$")
_GROUPED = re.compile(r"\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$")
_HEAD = "output_layer.weight"
_PADDED = ("embedding.word_embeddings.weight", _HEAD)


class NamesError(ModelOptConfigError):
    """NeMo's exporter does not define the Hugging Face checkpoint of a model."""


@dataclass(frozen=True)
class Rule:
    """Hugging Face tensors that are computed from the same Megatron parameters.

    Attributes:
        sources: Names of the parameters in the whole model.
        targets: Names of the tensors.
        function: Converts the values of the parameters into the value of the tensor, or a sequence of values.
        key: Equal for rules that convert equally.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    function: Callable[..., Any]
    key: Any

    def apply(self, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the tensors, in the order of the targets."""
        found = self.function(*values)
        return list(found) if len(self.targets) > 1 else [found]

    @property
    def layer(self) -> int | None:
        """The number of the layer, or None outside of the layers."""
        match = _LAYER.search(self.sources[0])
        return int(match[1]) if match else None


@dataclass
class Names:
    """The rules of one model.

    Attributes:
        rules: In the order of the Hugging Face model.
        shapes: Shape of each tensor of the Hugging Face model.
        head: Name of the output layer, stored or not.
    """

    rules: list[Rule]
    shapes: dict[str, torch.Size]
    head: str

    def __post_init__(self):
        self._rows: dict[Any, list[torch.Tensor] | None] = {}

    def rows(self, rule: Rule, shape: Sequence[int]) -> list[torch.Tensor]:
        """Return, for each target of a rule, which rows of its parameter it consists of.

        Args:
            rule: A rule with one matrix as its source.
            shape: Shape of the matrix.

        Raises:
            NamesError: If a target does not consist of whole rows.
        """
        key = (rule.key, tuple(shape), tuple(tuple(self.shapes[name]) for name in rule.targets))
        if key not in self._rows:
            self._rows[key] = _rows(rule, shape) if len(rule.sources) == 1 and len(shape) == 2 else None
        found = self._rows[key]
        if found is None and len(rule.sources) > 1 and all(_EXPERTS in name for name in rule.sources):
            raise NamesError(f"{', '.join(rule.targets)} cannot be stored quantized: {families.STACKED.reason}.")
        if found is None:
            raise NamesError(
                f"{', '.join(rule.targets)} cannot be stored quantized: NeMo's exporter does not take whole rows of "
                f"{', '.join(rule.sources)}."
            )
        return found

    def attention(self) -> dict[int, str]:
        """Return the prefix of the tensors of attention by layer number from 0."""
        return {
            rule.layer: f"{rule.targets[0].removesuffix('.weight').rpartition('.')[0]}."
            for rule in self.rules
            if rule.layer is not None and rule.sources[0].endswith(".self_attention.linear_proj.weight")
        }


def _rows(rule: Rule, shape: Sequence[int]) -> list[torch.Tensor] | None:
    """Return the rows that each target of a rule takes, or None if these are not whole rows."""
    rows, columns = shape
    # Two columns suffice for functions that do not depend on the number of columns.
    for width in sorted({min(2, columns), columns}):
        numbers = torch.arange(rows * width).view(rows, width)
        try:
            found = rule.apply([numbers])
        except (RuntimeError, ValueError):
            continue
        index = [part[:, 0] // width for part in found if part.dim() == 2 and part.shape[1] == width]
        if len(index) == len(found) and all(
            torch.equal(part, numbers[rows]) for part, rows in zip(found, index, strict=True)
        ):
            return index
    return None


# --- the rules --------------------------------------------------------------------------------------------------------


class _State(dict):
    """Names in place of a model's values; it serves exporters that expect a model, and those that expect its values."""

    def __init__(self, names: Mapping[str, Any], config: Any):
        super().__init__(names)
        self.config = config

    def state_dict(self) -> dict[str, Any]:
        return self


class _Config:
    """A configuration whose entries some exporters read as attributes, and some as items."""

    def __init__(self, config: Any):
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    def __getitem__(self, name: str) -> Any:
        return getattr(self._config, name)

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self._config, name, default)


class _Exporter:
    """NeMo's exporter with a configuration that was read and corrected already."""

    def __init__(self, exporter: Any, hf_config: Any):
        self._exporter, self.config = exporter, hf_config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._exporter, name)


def skeleton(hf_config: Any) -> torch.nn.Module:
    """Return the ``transformers`` model of a configuration without weights.

    Raises:
        NamesError: If ``transformers`` has no class for it.
    """
    if type(hf_config) not in AutoModelForCausalLM._model_mapping:
        raise NamesError(f"transformers has no model class for {type(hf_config).__name__}.")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config)


def rows_of_embedding(shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Return how many rows the embedding has, padding included, or None if there is none."""
    shape = shapes.get(_PADDED[0])
    return None if shape is None else shape[0]


def of(core: Any, exporter: Any, hf_config: Any, shapes: Mapping[str, Sequence[int]]) -> Names:
    """Return the rules for a model.

    Args:
        core: The Megatron-Core model.
        exporter: NeMo's exporter for its class.
        hf_config: The ``transformers`` configuration.
        shapes: Shape of each parameter of the whole model by name, on all ranks.

    Raises:
        NamesError: If a tensor or a parameter remains without a rule.
    """
    model = skeleton(hf_config)
    tied = bool(hf_config.tie_word_embeddings)
    own = [name for name in shapes if not (tied and name == _HEAD)]
    expected = {name: value.shape for name, value in model.state_dict().items()}
    not_stored = set(getattr(model, "_tied_weights_keys", None) or ()) if tied else set()
    expected = {name: shape for name, shape in expected.items() if name not in not_stored}
    found = _captured(exporter, hf_config, core.config, own, model)
    rules = _corrected(found, own, shapes, expected)
    _check(rules, own, expected, type(exporter).__name__)
    order = {name: number for number, name in enumerate(expected)}
    rules.sort(key=lambda rule: min(order[name] for name in rule.targets))
    output = model.get_output_embeddings()
    head = next((name for name, module in model.named_modules() if module is output), "")
    return Names(rules, expected, head)


def _captured(exporter: Any, hf_config: Any, config: Any, own: Sequence[str], model: torch.nn.Module) -> list[Rule]:
    """Return the rules of NeMo's exporter that apply to a model's names."""
    source = _State(_aliases(own), config)
    calls: list[tuple[Any, Any, Any]] = []

    def capture(source, target, mapping, transforms=(), *_, **__):
        calls.append((source.state_dict(), mapping, transforms or ()))
        return target

    convert = type(exporter).convert_state
    arguments = [_Config(config)] if "source_config" in inspect.signature(convert).parameters else []
    with replaced(io, "apply_transforms", capture):
        convert(_Exporter(exporter, hf_config), source, model, *arguments)
    rules: list[Rule] = []
    for state, mapping, transforms in calls:
        context = TransformCTX(source=source, source_state=state, target=model, target_state={})
        names = list(model.state_dict())
        for key, value in mapping.items():
            rules += _recorded(key, value, _unchanged, context, names)
        for transform in transforms:
            rules += _recorded(transform.source_key, transform.target_key, transform.transform, context, names)
    return rules


def _unchanged(value):
    return value


class _Call:
    """One recorded call of an exporter's function; its result stands for one value or a sequence of them."""

    def __init__(self, sources: tuple[str, ...], keywords: tuple[str, ...], count: int):
        self.sources, self.keywords, self.count = sources, keywords, count

    def __iter__(self) -> Iterator[tuple[_Call, int]]:
        return iter([(self, number) for number in range(self.count)])


def _recorded(source_key, target_key, function: Callable, context: TransformCTX, names: list[str]) -> list[Rule]:
    """Return the rules that one entry of an exporter makes, none if it does not apply.

    NeMo's own class matches the names, and calls a function that records its arguments.
    """
    patterns = list(source_key.values()) if isinstance(source_key, dict) else source_key
    sources = (patterns,) if isinstance(patterns, str) else patterns
    targets = (target_key,) if isinstance(target_key, str) else target_key
    if not all(_matches(pattern, context.source_state) for pattern in sources) or not all(
        _matches(pattern, names) for pattern in targets
    ):
        return []

    def record(*args, **kwargs):
        positional = [value for value in args if value is not context]
        return _Call((*positional, *kwargs.values()), tuple(kwargs), len(targets))

    record.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    context.target_state = dict.fromkeys(names)
    StateDictTransform(source_key, target_key, record)(context)
    found: dict[int, tuple[_Call, dict[int, str]]] = {}
    for name, value in context.target_state.items():
        if value is not None:
            call, number = value if isinstance(value, tuple) else (value, 0)
            found.setdefault(id(call), (call, {}))[1][number] = name
    needs_context = "ctx" in inspect.signature(function).parameters
    bound = _with_context(function, context) if needs_context else function
    return [
        Rule(call.sources, tuple(by[n] for n in sorted(by)), _keywords(bound, call), (function, call.keywords))
        for call, by in found.values()
    ]


def _with_context(function: Callable, context: TransformCTX) -> Callable:
    return lambda *values, **keywords: function(context, *values, **keywords)


def _keywords(function: Callable, call: _Call) -> Callable:
    """Return a function of values that are passed as in a recorded call."""
    first = len(call.sources) - len(call.keywords)
    if not call.keywords:
        return function
    return lambda *values: function(*values[:first], **dict(zip(call.keywords, values[first:], strict=True)))


def _matches(pattern: str, names: Any) -> bool:
    """Return whether a pattern of NeMo matches a name: ``*`` does not match dots, ``**`` does."""
    expression = re.escape(pattern).replace(r"\*\*", ".+").replace(r"\*", "[^.]+")
    return any(re.fullmatch(expression, name) for name in names if name is not None)


# --- corrections of NeMo's exporters ----------------------------------------------------------------------------------


def _aliases(own: Sequence[str]) -> dict[str, str]:
    """Return the model's names by the names that an exporter may use for them."""
    found = {name: name for name in own}
    for name in own:
        for fused, separate in _NORMS:
            for theirs, ours in ((fused, separate), (separate, fused)):
                if ours in name:
                    found.setdefault(name.replace(ours, theirs), name)
        if match := _SEPARATE.search(name):
            found.setdefault(f"{name[: match.start()]}.experts.{match[2]}.{match[3]}{match[1]}", name)
        if match := _GROUPED.search(name):
            found.setdefault(f"{name[: match.start()]}.experts.local_experts.{match[3]}.{match[1]}.{match[2]}", name)
    return found


def _corrected(
    rules: list[Rule], own: Sequence[str], shapes: Mapping[str, Sequence[int]], expected: Mapping[str, torch.Size]
) -> list[Rule]:
    """Return an exporter's rules for the tensors that are stored, with corrections and missing rules.

    Args:
        rules: What `_captured` returned.
        own: Names of the model's parameters.
        shapes: Their shapes.
        expected: Shape of each tensor that is stored.
    """
    found = [rule for rule in rules if set(rule.targets) <= set(expected)]
    made = {name for rule in found for name in rule.targets}
    used = {name for rule in found for name in rule.sources}
    for rule in list(found):
        # A bias is split as the rows of its weight.
        pairs = [_bias_of(name) for name in (*rule.sources, *rule.targets)]
        if None in pairs or len(rule.sources) > 1 or pairs[0] in used or pairs[0] not in own:
            continue
        targets = tuple(str(name) for name in pairs[1:])
        if set(targets) <= set(expected) - made:
            found.append(Rule((str(pairs[0]),), targets, _of_vector(rule), (rule.key, "bias")))
    for number, rule in enumerate(found):
        # Some exporters copy the embedding and the output layer without removing the rows that pad the vocabulary.
        if rule.sources[0] in _PADDED and rule.key[0] is _unchanged:
            rows = expected[rule.targets[0]][0]
            if rows < shapes[rule.sources[0]][0]:
                found[number] = dataclasses.replace(rule, function=_first_rows(rows), key=("first rows", rows))
    return found


def _bias_of(name: str) -> str | None:
    return f"{name.removesuffix('weight')}bias" if name.endswith(".weight") else None


def _of_vector(rule: Rule) -> Callable:
    """Return the function of a rule for matrices, for vectors."""

    def function(vector):
        found = [part.squeeze(-1) for part in rule.apply([vector.unsqueeze(-1)])]
        return found if len(found) > 1 else found[0]

    return function


def _first_rows(count: int) -> Callable:
    return lambda value: value[:count]


def _check(rules: list[Rule], own: Sequence[str], expected: Mapping[str, torch.Size], exporter: str) -> None:
    """Check that every parameter is stored, and that every tensor has a source.

    Raises:
        NamesError: With the names.
    """
    used = {name for rule in rules for name in rule.sources}
    made = {name for rule in rules for name in rule.targets}
    lost, missing = sorted(set(own) - used), sorted(set(expected) - made)
    problems = [f"{', '.join(lost[:5])} would be lost"] if lost else []
    problems += [f"{', '.join(missing[:5])} would be missing"] if missing else []
    if problems:
        raise NamesError(
            f"{exporter} of NeMo does not define the whole Hugging Face checkpoint of this model: "
            f"{'; '.join(problems)}. Check that the model's configuration is one that its Hugging Face class supports."
        )

"""Choose sizes and formats: the combinations under the budgets with the lowest predicted loss, and the Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from nemo_modelopt_dropin.errors import ModelOptConfigError
from nemo_modelopt_dropin.fit import files, grid, latency, limits, pareto, serving
from nemo_modelopt_dropin.fit.devices import Device
from nemo_modelopt_dropin.fit.formats import GROUPS, KV_CACHE, Format
from nemo_modelopt_dropin.fit.limits import Limit
from nemo_modelopt_dropin.fit.serving import Load
from nemo_modelopt_dropin.preflight import algorithms, model_checks
from nemo_modelopt_dropin.preflight.algorithms import NO_QUANT
from nemo_modelopt_dropin.preflight.model_sizes import Shape

# Points of the page: enough for a curve, few enough for a table.
_SHOWN = 16
_BYTES = (("GB", 1e9), ("MB", 1e6), ("KB", 1e3))
_UNITS = {limits.DISK: _BYTES, limits.MEMORY: _BYTES, limits.LATENCY: (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))}

Figures = dict[str, float]
ShapeLoss = Callable[[Mapping[str, int]], float]


@dataclass(frozen=True)
class Problem:
    """What is searched.

    Attributes:
        shape: The original model.
        formats: The formats to choose from.
        budgets: Budgets; the figures of the original in 16 bits resolve shares.
        fixed: Sizes by the names of `grid.SIZES` that stay.
        load: Context and batch of the server.
        device: The device on which it runs.
        layout: Layout of the Hugging Face files.
        tokenizer: Bytes of the tokenizer's files.
        tp: Tensor-parallel ranks, over which blocks of weights are split.
        to_hf: Whether Hugging Face files are written, which hold whole blocks only.
    """

    shape: Shape
    formats: Sequence[Format]
    budgets: Sequence[Limit] = ()
    fixed: Mapping[str, int] = field(default_factory=dict)
    load: Load = field(default_factory=Load)
    device: Device = field(default_factory=lambda: Device("", 1.0, {"bf16": 1.0}))
    layout: str = algorithms.AUTO
    tokenizer: int = 0
    tp: int = 1
    to_hf: bool = True

    def figures(self, shape: Shape, found: Format) -> Figures:
        """Return bytes on disk, bytes of memory and seconds per token of a shape in a format."""
        return {
            limits.DISK: files.disk_bytes(shape, found, self.tokenizer, self.layout),
            limits.MEMORY: serving.memory(shape, found, self.load, self.layout).total,
            limits.LATENCY: latency.step_seconds(shape, found, self.load, self.device, self.layout),
        }

    @property
    def original(self) -> Figures:
        """The figures of the original model in 16 bits."""
        return self.figures(self.shape, Format())

    def resolved(self) -> Figures:
        """Return the budgets in bytes and seconds by kind."""
        original = self.original
        return {budget.kind: budget.resolved(original[budget.kind]) for budget in self.budgets}

    def multiples(self, found: Format) -> dict[str, int]:
        """Return the numbers of which the sizes must be multiples in a format."""
        blocks = [block for group in GROUPS if (block := found.needed_block(group))]
        return model_checks.size_multiples(self.shape, self.tp, max(blocks, default=None), self.to_hf)

    def possible(self) -> list[Format]:
        """Return the formats for which the model has valid sizes."""
        return [found for found in self.formats if not self._obstacles(found)]

    def _obstacles(self, found: Format) -> bool:
        sizes = grid.sizes_of(self.shape) | dict(self.fixed)
        return any(
            name in sizes and (sizes[name] < number or (name in self.fixed and sizes[name] % number))
            for name, number in self.multiples(found).items()
        )


@dataclass(frozen=True)
class Point:
    """One combination of sizes and format.

    Attributes:
        sizes: Sizes by the names of `grid.SIZES`.
        format: The format.
        figures: Bytes on disk, bytes of memory, seconds per token.
        from_shape: Predicted increase of the loss by pruning.
        from_format: Predicted increase by quantization.
        measured: Measured increase by both together, None if it was not measured.
        measured_shape: Measured increase by pruning alone, None if it was not measured.
    """

    sizes: Mapping[str, int]
    format: Format
    figures: Mapping[str, float]
    from_shape: float
    from_format: float
    measured: float | None = None
    measured_shape: float | None = None

    @property
    def predicted(self) -> float:
        """Predicted increase of the held-out loss before distillation."""
        return self.from_shape + self.from_format

    def after(self, recovery: float) -> float:
        """Return the expected increase after distillation, which regains a share of what pruning cost."""
        found = self.predicted if self.measured is None else self.measured
        by_pruning = self.from_shape if self.measured_shape is None else self.measured_shape
        return found - recovery * max(0.0, by_pruning)


def format_loss(sensitivities: Mapping[str, Mapping[str, float]], found: Format) -> float | None:
    """Return the predicted increase of the loss by a format; None if it was not measured.

    Args:
        sensitivities: Algorithm -> increases by quantizing only the attention, only the MLP, and both ("all"). The
            entry ``kv_cache`` has the increase by the cache under the same name.
        found: The format.
    """
    total = 0.0
    if not found.is_mixed and found.mlp != NO_QUANT:
        if found.mlp not in sensitivities:
            return None
        total += sensitivities[found.mlp]["all"]
    elif found.is_mixed:
        for group in GROUPS:
            name = found.algorithm(group)
            if name != NO_QUANT and name not in sensitivities:
                return None
            total += sensitivities[name][group] if name != NO_QUANT else 0.0
    if found.fp8_cache:
        if KV_CACHE not in sensitivities:
            return None
        total += sensitivities[KV_CACHE][KV_CACHE]
    return total


def smallest_figures(problem: Problem) -> Figures:
    """Return the smallest figure of each kind that any shape in any format reaches."""
    found = [
        problem.figures(grid.smallest(problem.shape, problem.fixed, problem.multiples(one)), one)
        for one in problem.possible()
    ]
    return {kind: min(figures[kind] for figures in found) for kind in limits.KINDS} if found else {}


def impossible(problem: Problem) -> list[str]:
    """Return one sentence for each budget that no combination reaches, with the smallest figure that is reached."""
    if not problem.possible():
        names = ", ".join(dict.fromkeys(one.name for one in problem.formats))
        return [f"fit: the model's sizes are smaller than a block of weights in each of the formats {names}"]
    least, found = smallest_figures(problem), []
    for kind, most in problem.resolved().items():
        if most < least[kind]:
            given = next(budget.text for budget in problem.budgets if budget.kind == kind)
            found.append(
                f"fit-{kind} {given} is below the smallest that can be reached, {shown(kind, least[kind])}: embedding "
                "and output layer keep the whole vocabulary in 16 bits, and one layer of the smallest sizes stays"
            )
    return found


def shown(kind: str, value: float) -> str:
    """Return a figure with its unit."""
    name, unit = next((name, unit) for name, unit in _UNITS[kind] if value >= unit or unit == _UNITS[kind][-1][1])
    return f"{value / unit:.3g} {name}" if value < 1000 * unit else f"{value / unit:,.0f} {name}"


def under_budget(
    problem: Problem, loss: ShapeLoss, sensitivities: Mapping[str, Mapping[str, float]], least_experts: int = 1
) -> list[Point]:
    """Return combinations that keep all budgets, each with the largest MLP that fits.

    Args:
        problem: What is searched.
        loss: Sizes -> increase of the loss.
        sensitivities: See `format_loss`.
        least_experts: Experts that a token is sent to.

    Raises:
        ModelOptConfigError: If there are none; the message has the smallest figures.
    """
    most = problem.resolved()

    def fits(shape: Shape, one: Format) -> bool:
        figures = problem.figures(shape, one)
        return all(figures[kind] <= value for kind, value in most.items())

    for floor in grid.floors():
        found = []
        for one in problem.possible():
            from_format = format_loss(sensitivities, one)
            if from_format is None:
                continue
            multiples = problem.multiples(one)
            steps = grid.fitted_steps(problem.shape, multiples, problem.fixed)
            steps = [size for size in steps if size >= floor * problem.shape.ffn_hidden_size]
            legal = grid.choices(problem.shape, problem.fixed, multiples, least_experts, floor)
            for sizes in grid.shapes({**legal, grid.FITTED: [steps[0]]}):
                best = _largest(problem, sizes, one, steps, fits)
                if best is not None and _is_whole(best, multiples):
                    shape = grid.with_sizes(problem.shape, best)
                    found.append(Point(best, one, problem.figures(shape, one), loss(best), from_format))
        if found:
            return found
    reached = "; ".join(f"{kind} {shown(kind, value)}" for kind, value in smallest_figures(problem).items())
    raise ModelOptConfigError(
        f"No combination of sizes and formats keeps all budgets together. The smallest of each alone: {reached}. Use "
        "larger budgets, more --fit-formats, or set fewer target sizes."
    )


def _largest(
    problem: Problem,
    sizes: Mapping[str, int],
    one: Format,
    steps: Sequence[int],
    fits: Callable[[Shape, Format], bool],
) -> dict[str, int] | None:
    """Return the sizes with the largest MLP that fits, None if the smallest does not."""

    def at(index: int) -> dict[str, int]:
        return {**sizes, grid.FITTED: steps[index]}

    def is_fitting(index: int) -> bool:
        return fits(grid.with_sizes(problem.shape, at(index)), one)

    low, high = 0, len(steps) - 1
    if is_fitting(high):
        return at(high)
    if not is_fitting(low):
        return None
    while low < high - 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_fitting(middle) else (low, middle)
    return at(low)


def _is_whole(sizes: Mapping[str, int], multiples: Mapping[str, int]) -> bool:
    return not any(sizes[name] % number for name, number in multiples.items() if name in sizes)


def everywhere(
    problem: Problem, loss: ShapeLoss, sensitivities: Mapping[str, Mapping[str, float]], least_experts: int = 1
) -> list[Point]:
    """Return the combinations of a coarse grid whatever the budgets, for the Pareto front; see `under_budget`."""
    found = []
    for one in problem.possible():
        from_format, multiples = format_loss(sensitivities, one), problem.multiples(one)
        if from_format is None:
            continue
        for sizes in grid.shapes(grid.choices(problem.shape, problem.fixed, multiples, least_experts, most=4)):
            if _is_whole(sizes, multiples):
                figures = problem.figures(grid.with_sizes(problem.shape, sizes), one)
                found.append(Point(sizes, one, figures, loss(sizes), from_format))
    return found


def next_to_try(
    points: Iterable[Point], tried: Sequence[Point], recovery: float, other_format: bool = False
) -> Point | None:
    """Return the point with the lowest expected loss that was not tried, None if there is none.

    Args:
        points: What `under_budget` returned.
        tried: Points that were measured.
        recovery: Share of the loss by pruning that distillation regains.
        other_format: Prefer weights in a format that was not tried, if there are any.
    """
    done = {(*point.sizes.items(), point.format) for point in tried}
    left = [point for point in points if (*point.sizes.items(), point.format) not in done]
    if other_format:
        known = {(point.format.attention, point.format.mlp) for point in tried}
        left = [point for point in left if (point.format.attention, point.format.mlp) not in known] or left
    # Of equals the smaller one, and the one whose cache has 16 bits.
    return min(
        left,
        key=lambda point: (point.after(recovery), point.figures[limits.DISK], point.format.fp8_cache),
        default=None,
    )


def pareto_points(points: Sequence[Point], kinds: Sequence[str], recovery: float) -> list[Point]:
    """Return the points that no other beats in the figures of ``kinds`` and in loss, at most a page of them."""
    figures = [[*(point.figures[kind] for kind in kinds), point.after(recovery)] for point in points]
    front = [points[position] for position in pareto.front(figures)]
    kept = pareto.thinned([point.figures[kinds[0]] for point in front], _SHOWN)
    return [front[position] for position in kept]

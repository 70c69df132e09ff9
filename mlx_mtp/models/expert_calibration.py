"""Measures on the user's device which dispatch of experts is fastest at how many routes, and makes a plan of it.

It takes a second or two at the first use of a checkpoint, up to four for large layers on a CPU. Figures are kept in a
`CalibrationFile` under a key of device, MLX version and shapes. Experts are drawn uniformly, each token's distinct:
real routing overlaps more, so reading each expert once pays at least as much as measured here. Layers take turns, since
weights read a moment ago would be cached.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import mlx.core as mx

from mlx_mtp.calibration import CalibrationFile, machine
from mlx_mtp.device import is_gpu, side_lanes, wired_memory
from mlx_mtp.models import expert_kernel
from mlx_mtp.models.expert_dispatch import (
    ALL,
    GATHER,
    GROUPED,
    KERNEL,
    SORTED,
    SPLIT,
    DispatchPlan,
    default_plan,
    dispatch,
    packed,
    tile_height,
)
from mlx_mtp.models.moe import QuantizedExpertLinear, SwitchGLU
from mlx_mtp.models.target import Target
from mlx_mtp.models.vector_math import lacks_fast_kernels

LOG = logging.getLogger(__name__)

DECODE_TOKENS = (1, 2, 4, 8, 16, 32, 64)  # up to 8 rows of 7 drafts and a bonus token; what is between is interpolated
# In the order of their promise, for time may not reach the last.
PORTABLE = (SPLIT, SORTED, *(GROUPED[i] for i in (2, 1, 0, 3)), ALL, GATHER)
ALL_EXPERTS_FROM = 1 / 4  # top_k of all experts: with less, running all of them is mostly waste
FILL_OF_TILES = 2  # tiles of more than so many times the routes an expert gets would be mostly empty
BUDGET = 2.0  # seconds for all measurements
OVERTIME = 2.0  # times the budget, for runs that confirm what was measured too seldom
CLEARLY_FASTER = 0.95  # of the default's time: below that it is left for another strategy; what noise does not do
HOPELESS = 1.3  # times the best: not measured again at this count
FAR_BEHIND = 1.6  # times the best: not measured at twice the count either
SWEEPS = 2  # through all counts: what disturbs one of them for a while has passed when it has its next turn
LEAST_ROUNDS, MOST_ROUNDS = 2, 3  # of runs for one count in a sweep; what time they leave is for the larger counts
LAYERS_A_RUN = 4  # one behind the other, as in a pass: handing work over and waiting for it does not count much then
FEW_TOKENS = 16  # up to so many a CPU runs several layers too; with more, waiting is nothing beside the work
TRACE = 1e-3  # of a layer's output goes into the next one's input
KERNEL_TOLERANCE = {mx.float32: 1e-4}  # relative, of the whole output
HALF_TOLERANCE = 2e-2  # bfloat16 and float16: the portable path rounds gate, up and gelu too
WORST_PART = 5.0  # times the tolerance is what a single route or column may be off by


@dataclass(frozen=True)
class Shape:
    """One pass through one layer's experts."""

    hidden_size: int
    num_experts: int
    top_k: int
    dtype: mx.Dtype


@dataclass(frozen=True)
class Costs:
    """Seconds of one layer: routes -> strategy -> seconds. Strategies may be missing where they were hopeless."""

    seconds: Mapping[int, Mapping[str, float]]

    def to_json(self) -> dict[str, Any]:
        return {"seconds": {str(routes): dict(by_name) for routes, by_name in self.seconds.items()}}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Costs | None:
        """None where this is not what `to_json` writes: the file may be anyone's."""
        try:
            return cls({int(routes): {str(name): float(value) for name, value in by_name.items()}
                        for routes, by_name in raw["seconds"].items()})
        except (KeyError, AttributeError, TypeError, ValueError):
            return None

    def at(self, routes: int, strategy: str) -> float:
        """Interpolated between the two nearest measured counts, both on a log scale; infinite if not measured there."""
        measured = sorted(self.seconds)
        below = max((one for one in measured if one <= routes), default=measured[0])
        above = min((one for one in measured if one >= routes), default=measured[-1])
        low, high = (self.seconds[one].get(strategy, math.inf) for one in (below, above))
        if below == above or math.inf in (low, high):
            return max(low, high)
        share = math.log(routes / below) / math.log(above / below)
        return low ** (1 - share) * high**share

    def plan(self, top_k: int, strategies: Iterable[str]) -> DispatchPlan:
        """The fastest of these strategies for every count that decoding meets; the default plan's where they tie."""
        default, names = default_plan(), list(strategies)
        steps: list[tuple[int, str]] = []
        for routes in sorted({*range(top_k, DECODE_TOKENS[-1] * top_k + 1, top_k), *self.seconds}):
            usual = default.strategy(routes)
            best = min(names, key=lambda name: self.at(routes, name))
            if not self.at(routes, best) < CLEARLY_FASTER * self.at(routes, usual):
                best = usual
            if not steps or steps[-1][1] != best:
                steps.append((routes if steps else 0, best))
        return DispatchPlan(tuple(steps))


def choose_dispatch(
    target: Target, file: CalibrationFile, prefill_chunk: int, *, calibrate: bool = True, kernels: bool = True
) -> DispatchPlan:
    """Makes a mixture's experts use the fastest dispatch known for this machine, measured now if it never was.

    The target's weights must be in memory. prefill_chunk: tokens of a prefill pass, the largest count to measure.
    calibrate: False leaves the defaults. kernels: False keeps to MLX's own operations. Returns the plan, which for a
    dense target is not used.

    A calibration of another day may choose otherwise, and strategies differ in the last bit: without calibration the
    same machine gives the same bits for ever.
    """
    layers = [module for module in target.modules() if isinstance(module, SwitchGLU)]
    experts, plan = target.config.text.experts, default_plan()
    if experts is None or not calibrate:
        return plan
    shape = Shape(target.config.text.hidden_size, experts.num_experts, experts.top_k, target.dtype)
    strategies = list(PORTABLE)
    if kernels and expert_kernel.is_available() and kernel_is_sound(layers, shape):
        strategies.insert(0, KERNEL)
    key = entry_key(layers, shape, KERNEL in strategies)
    stored = file.read(key)
    costs = None if stored is None else Costs.from_json(stored)
    if costs is None or not costs.seconds:
        with wired_memory():  # as they will run
            costs = measure(layers, shape, (*DECODE_TOKENS, prefill_chunk), strategies)
        file.write(key, costs.to_json())
    plan = costs.plan(shape.top_k, strategies)
    for layer in layers:
        layer.use_dispatch(plan)
    return plan


def entry_key(layers: Sequence[SwitchGLU], shape: Shape, has_kernel: bool) -> str:
    """All that the costs depend on."""
    layer = layers[0]
    formats = sorted({f"{_format(one.gate_proj)}, {_format(one.down_proj)}" for one in layers})
    width = layer.down_proj.weight.shape[1]
    return (f"experts: {machine()}, {shape.num_experts} experts, top {shape.top_k}, {shape.hidden_size} -> "
            f"{layer.gate_proj.weight.shape[1]} -> {width}, {', '.join(formats)}, {shape.dtype}"
            + (f", {len(side_lanes())} side lanes" if side_lanes() else "") + (", kernel" if has_kernel else ""))


def _format(matrix: Any) -> str:
    if isinstance(matrix, QuantizedExpertLinear):
        return f"{matrix.bits} bits {matrix.mode} by {matrix.group_size}"
    return str(matrix.weight.dtype) + (" by rows or columns" if lacks_fast_kernels(matrix.weight) else "")


def random_pass(shape: Shape, tokens: int, seed: int) -> tuple[mx.array, mx.array]:
    """Rows [N, D] and distinct experts for each [N, top_k], uniform."""
    keys = mx.random.split(mx.random.key(seed))
    x = mx.random.normal((tokens, shape.hidden_size), key=keys[0]).astype(shape.dtype)
    scores = mx.random.uniform(shape=(tokens, shape.num_experts), key=keys[1])
    return x, mx.argpartition(scores, kth=shape.top_k - 1, axis=-1)[:, : shape.top_k]


def kernel_is_sound(layers: Sequence[SwitchGLU], shape: Shape) -> bool:
    """Whether the kernel can read all layers, compiles on this device and gives what the portable path gives.

    Each format of weights is tried once. Says so in the log if not, but for formats that it cannot read.
    """
    kinds: dict[tuple[tuple[int, ...], ...], SwitchGLU] = {}
    for layer in layers:
        matrices = packed(layer.mlp)
        if matrices is None:
            return False
        kinds.setdefault(tuple(matrix.format for matrix in matrices), layer)
    tolerance = KERNEL_TOLERANCE.get(shape.dtype, HALF_TOLERANCE)
    for layer in kinds.values():
        for x, chosen in _trials(shape):
            try:
                error = _error(dispatch(KERNEL, x, chosen, layer.mlp), dispatch(GATHER, x, chosen, layer.mlp))
            except (RuntimeError, ValueError) as failure:  # MLX's for a kernel that does not compile
                LOG.warning("experts: the kernel does not run here (%s); doing without", _first_line(failure))
                return False
            if not error <= tolerance:  # NaN too
                LOG.warning("experts: the kernel is off by %.1e on this device; doing without", error)
                return False
    return True


def _trials(shape: Shape) -> Iterator[tuple[mx.array, mx.array]]:
    """Rows and their experts: few and many, and all on the same ones, so that tiles are full and follow each other."""
    for tokens in (1, 8, 33):
        yield random_pass(shape, tokens, tokens)
    x, chosen = random_pass(shape, 33, 0)
    yield x, mx.broadcast_to(chosen[:1], chosen.shape)


def _error(got: mx.array, expected: mx.array) -> float:
    """Relative, of the whole or, where that is larger, a part of the worst route's and the worst column's."""
    got, expected = (array.astype(mx.float32).flatten(0, -2) for array in (got, expected))
    squares, usual = (got - expected) ** 2, (expected**2).mean()
    parts = [squares.mean(), *((squares.mean(axis=axis).max() / WORST_PART**2) for axis in (0, 1))]
    return float(mx.sqrt(mx.stack(parts).max() / usual))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def measure(
    layers: Sequence[SwitchGLU], shape: Shape, token_counts: Iterable[int], strategies: Sequence[str],
    budget: float = BUDGET, clock: Callable[[], float] = time.perf_counter,
) -> Costs:
    """Times the strategies, interleaved; counts of tokens share `budget` seconds by the square roots of their sizes.

    Where OVERTIME runs out strategies stay unmeasured, but never the default plan's; a run that has begun is finished.
    """
    counts = sorted(set(token_counts))
    turn = count()
    for name in strategies:  # what the first run of each pays once is nobody's cost
        mx.eval(dispatch(name, *random_pass(shape, counts[0], 0), layers[0].mlp))
    least: dict[int, dict[str, float]] = {}
    start, share = clock(), budget / SWEEPS
    for sweep in range(SWEEPS):
        if sweep == 0 or clock() < start + OVERTIME * budget:
            for routes, found in _sweep(layers, shape, counts, strategies, start + sweep * share, share, turn, clock):
                known = least.setdefault(routes, {})
                known.update({name: min(seconds, known.get(name, math.inf)) for name, seconds in found.items()})
    return Costs(least)


def _sweep(
    layers: Sequence[SwitchGLU], shape: Shape, counts: Sequence[int], strategies: Sequence[str],
    start: float, budget: float, turn: Iterator[int], clock: Callable[[], float],
) -> Iterator[tuple[int, dict[str, float]]]:
    """Routes, and the seconds of the strategies there, for each count of tokens once."""
    shares = [tokens**0.5 for tokens in counts]
    seconds: dict[int, dict[str, float]] = {}
    for i, tokens in enumerate(counts):
        deadline = start + budget * sum(shares[: i + 1]) / sum(shares)
        run = _timer(layers, shape, tokens, turn, clock)
        routes = tokens * shape.top_k
        behind = _far_behind(seconds, routes)
        names = candidates(shape, routes, [name for name in strategies if name not in behind])
        seconds[routes] = _fastest_runs(run, names, deadline, start + OVERTIME * budget, clock)
        yield routes, seconds[routes]


def _far_behind(seconds: Mapping[int, Mapping[str, float]], routes: int) -> set[str]:
    """Strategies that cannot have caught up since the counts before; for `gather` more routes are only worse."""
    behind: set[str] = set()
    for measured, by_name in seconds.items():
        limit = FAR_BEHIND * min(by_name.values())
        behind |= {name for name, took in by_name.items()
                   if took >= limit and (2 * measured >= routes or name == GATHER)}
    return behind


def _timer(
    layers: Sequence[SwitchGLU], shape: Shape, tokens: int, turn: Iterator[int], clock: Callable[[], float]
) -> Callable[[str], float]:
    """What runs a strategy once and returns a layer's seconds."""
    together = min(LAYERS_A_RUN, len(layers)) if is_gpu() or tokens <= FEW_TOKENS else 1
    inputs = [random_pass(shape, tokens, seed) for seed in range(together)]
    mx.eval(inputs)

    def run(strategy: str) -> float:
        picked = [layers[next(turn) % len(layers)] for _ in range(together)]
        begun = clock()
        x = inputs[0][0]
        for (fresh, chosen), layer in zip(inputs, picked, strict=True):
            x = fresh + TRACE * dispatch(strategy, x, chosen, layer.mlp)[:, 0]
        mx.eval(x)
        return (clock() - begun) / together

    return run


def _fastest_runs(
    run: Callable[[str], float], names: Sequence[str], deadline: float, latest: float, clock: Callable[[], float]
) -> dict[str, float]:
    """The least seconds of each strategy, the first of `names` always among them.

    All have one run, if time allows; what is not hopeless then has more, in turn. A strategy that might be the fastest
    but has fewer than LEAST_ROUNDS runs at the end is left out: one lucky run proves nothing.
    """
    runs: dict[str, list[float]] = {names[0]: [run(names[0])]}
    for name in names[1:]:
        if clock() < latest:
            runs[name] = [run(name)]
    for round_number in range(1, MOST_ROUNDS):
        best = min(map(min, runs.values()))
        going_on = [name for name, times in runs.items() if name == names[0] or min(times) < HOPELESS * best]
        if len(going_on) == 1 or clock() >= (deadline if round_number >= LEAST_ROUNDS else latest):
            break
        for name in going_on:
            runs[name].append(run(name))
    best = min(map(min, runs.values()))
    return {name: min(times) for name, times in runs.items()
            if name == names[0] or len(times) >= LEAST_ROUNDS or min(times) >= HOPELESS * best}


def candidates(shape: Shape, routes: int, strategies: Iterable[str]) -> list[str]:
    """Those of the strategies that have a chance at so many routes, the default plan's first."""
    usual = default_plan().strategy(routes)

    def has_a_chance(name: str) -> bool:
        if name == ALL:
            return routes >= shape.num_experts and shape.top_k >= ALL_EXPERTS_FROM * shape.num_experts
        if name == SPLIT:
            return bool(side_lanes())
        if name in GROUPED:
            return name == GROUPED[0] or tile_height(name) <= FILL_OF_TILES * routes / shape.num_experts
        return True

    return [usual, *(name for name in strategies if name != usual and has_a_chance(name))]

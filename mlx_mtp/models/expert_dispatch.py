"""How routes reach their experts: several ways to compute the same thing, and the plan that says which one when.

A route is a (token, expert) pair: N tokens with top_k experts each are R = N * top_k routes. What it costs is mostly
reading experts' weights, and the ways differ in how often an expert is read:

    gather       once for each of its routes
    sorted       likewise, but equal experts are neighbours, so that a cache or a smart kernel can help
    split        as sorted, the routes shared out among a CPU's cores: one such product keeps only one of them busy
    grouped-m    once for every m of its routes, which become a tile of m rows
    all          once, and every expert runs every token
    kernel       as grouped-8, in a GPU kernel of our own that spends nothing on tiles, unfilled ones or rows

None asks the host anything: the number of tiles has a bound that only depends on shapes, and tiles beyond the needed
ones are computed and ignored. The ways may differ in the last bit, since products of one row and of several sum up in
different orders. So a plan that was measured anew can, rarely, turn a near-tie between two tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import mlx.core as mx

from mlx_mtp.device import is_gpu, side_lanes
from mlx_mtp.models.expert_kernel import PackedMatrix, gate_up_kernel, product_kernel
from mlx_mtp.models.layers import geglu

GATHER, SORTED, SPLIT, ALL, KERNEL = "gather", "sorted", "split", "all", "kernel"
GROUPED = tuple(f"grouped-{rows}" for rows in (4, 8, 16, 32))
STRATEGIES = (GATHER, SORTED, SPLIT, *GROUPED, ALL, KERNEL)

# Where sorting begins to pay without anyone having measured: on Metal it is what MLX's own kernels make use of.
SORT_FROM_ROUTES_GPU, SORT_FROM_ROUTES_CPU = 64, 32


class ExpertMatrix(Protocol):
    """One matrix an expert, plain or quantized: [E, out, in]."""

    @property
    def num_experts(self) -> int: ...

    def __call__(self, x: mx.array, experts: mx.array, sorted_experts: bool) -> mx.array:
        """x: [n or 1, rows, in], experts: [n] -> [n, rows, out], each block of rows times its expert's matrix."""

    def packed(self) -> PackedMatrix | None:
        """The matrices as the kernel reads them, or None if it cannot."""


class ExpertMLP(NamedTuple):
    """The three matrices of the experts' gated MLPs."""

    gate: ExpertMatrix
    up: ExpertMatrix
    down: ExpertMatrix


@dataclass(frozen=True)
class DispatchPlan:
    """Which strategy from how many routes on, in rising order; the first step starts at 0."""

    steps: tuple[tuple[int, str], ...]

    def __post_init__(self) -> None:
        starts = [start for start, _ in self.steps]
        if starts[:1] != [0] or starts != sorted(set(starts)) or not {name for _, name in self.steps} <= {*STRATEGIES}:
            raise ValueError(f"steps are {self.steps}; expected rising route counts from 0 on, each with one of "
                             f"{', '.join(STRATEGIES)}")

    def strategy(self, routes: int) -> str:
        return self.steps[bisect_right(self.steps, routes, key=lambda step: step[0]) - 1][1]


def tile_height(grouped: str) -> int:
    """grouped-m -> m."""
    return int(grouped.removeprefix("grouped-"))


def default_plan() -> DispatchPlan:
    """What is used where nothing was measured on this device: what mlx-lm does, with its products' layout mended."""
    return DispatchPlan(((0, GATHER), (SORT_FROM_ROUTES_GPU if is_gpu() else SORT_FROM_ROUTES_CPU, SORTED)))


def dispatch(strategy: str, x: mx.array, chosen: mx.array, mlp: ExpertMLP) -> mx.array:
    """x: [N, D], chosen: [N, top_k] experts -> [N, top_k, D], each route's expert applied to its token."""
    if strategy == GATHER:
        out = _gather(x, chosen, mlp)
    elif strategy == SORTED:
        out = _sorted(x, chosen, mlp, ())
    elif strategy == SPLIT:
        out = _sorted(x, chosen, mlp, side_lanes())
    elif strategy == ALL:
        out = _all_experts(x, chosen, mlp)
    elif strategy == KERNEL:
        out = _kernel(x, chosen, mlp)
    else:
        out = _grouped(x, chosen, mlp, tile_height(strategy))
    return out.reshape(*chosen.shape, -1)


# In the products of single rows below, rows get their second axis by reshape: x[:, None] has a stride of 1 there, which
# MLX's CPU products take for a transposed column, at twice the time.


def _gather(x: mx.array, chosen: mx.array, mlp: ExpertMLP) -> mx.array:
    rows = x.reshape(x.shape[0], 1, 1, -1)
    return mlp.down(geglu(mlp.gate(rows, chosen, False), mlp.up(rows, chosen, False)), chosen, False)


def _sorted(x: mx.array, chosen: mx.array, mlp: ExpertMLP, lanes: Sequence[mx.ThreadLocalStream]) -> mx.array:
    """lanes: queues that take a share of the routes each, beside the default one. They change no bit."""
    flat, top_k = chosen.flatten(), chosen.shape[1]
    order = mx.argsort(flat)
    experts, rows = flat[order], x[order // top_k].reshape(flat.size, 1, -1)
    share = -(-flat.size // (1 + len(lanes)))
    queues: list[AbstractContextManager[object]] = [nullcontext(), *map(mx.stream, lanes)]
    out = []
    for queue, start in zip(queues, range(0, flat.size, share), strict=False):
        with queue:
            some, chosen_by = rows[start : start + share], experts[start : start + share]
            hidden = geglu(mlp.gate(some, chosen_by, True), mlp.up(some, chosen_by, True))
            out.append(mlp.down(hidden, chosen_by, True))
    return mx.concatenate(out)[mx.argsort(order)]


def _all_experts(x: mx.array, chosen: mx.array, mlp: ExpertMLP) -> mx.array:
    count, top_k = mlp.gate.num_experts, chosen.shape[1]
    experts, rows = mx.arange(count), x.reshape(1, *x.shape)
    token = mx.arange(chosen.size) // top_k
    out = mlp.down(geglu(mlp.gate(rows, experts, True), mlp.up(rows, experts, True)), experts, True)
    return out[chosen.flatten(), token]


class Tiles(NamedTuple):
    """Routes sorted by expert and cut into tiles of at most `height` routes of one expert.

    order: [R], the routes in sorted order. slots: [R], the place of each sorted route among all tiles' rows.
    experts, first, rows: [T], each tile's expert, its first place in the sorted order and how many follow; 0 for tiles
    that are not needed, whose expert is that of the last needed one, so that they read nothing new.
    """

    order: mx.array
    slots: mx.array
    experts: mx.array
    first: mx.array
    rows: mx.array


def most_tiles(routes: int, num_experts: int, height: int) -> int:
    """The most tiles that so many routes can need: each expert touched wastes at most height - 1 rows."""
    return (routes + min(routes, num_experts) * (height - 1)) // height


def tiles_of(flat: mx.array, num_experts: int, height: int) -> Tiles:
    """flat: [R], each route's expert -> its tiles, T = most_tiles(...) of them.

    routes by expert    0 0 0 | 2 2 | 3            height 2, 4 experts: (6 + 4) // 2 = 5 tiles, 4 needed
    tiles               0 0   0 -   2 2   3 -      slots 0 1 2 4 5 6
    """
    order = mx.argsort(flat)
    by_expert = flat[order]
    bounds = mx.searchsorted(by_expert, mx.arange(num_experts + 1, dtype=flat.dtype)).astype(mx.int32)
    starts, ends = bounds[:-1], bounds[1:]
    needed = (ends - starts + (height - 1)) // height
    until = mx.cumsum(needed)
    padding = (until - needed) * height - starts  # unfilled rows before an expert's first
    tile = mx.arange(most_tiles(flat.size, num_experts, height))
    experts = mx.minimum(mx.searchsorted(until, tile, side="right").astype(mx.uint32), by_expert[-1:])
    first = tile * height - padding[experts]
    return Tiles(order, mx.arange(flat.size) + padding[by_expert], experts, first,
                 mx.clip(ends[experts] - first, 0, height))


def _grouped(x: mx.array, chosen: mx.array, mlp: ExpertMLP, height: int) -> mx.array:
    """Unfilled rows are run too, on whatever they hold; only gelu, which a CPU is slow at, leaves them out."""
    flat, top_k = chosen.flatten(), chosen.shape[1]
    tiles = tiles_of(flat, mlp.gate.num_experts, height)
    place = mx.minimum(tiles.first[:, None] + mx.arange(height), flat.size - 1)  # [T, height] in the sorted order
    rows = x[tiles.order[place] // top_k]

    def product(matrix: ExpertMatrix, rows: mx.array) -> mx.array:
        """[T, height, in] -> [R, out] in the sorted order."""
        return matrix(rows, tiles.experts, True).reshape(place.size, -1)[tiles.slots]

    hidden = geglu(product(mlp.gate, rows), product(mlp.up, rows))
    return product(mlp.down, hidden[place])[mx.argsort(tiles.order)]


def _kernel(x: mx.array, chosen: mx.array, mlp: ExpertMLP) -> mx.array:
    matrices = packed(mlp)
    assert matrices is not None, "the plan asks for the kernel although it cannot read these matrices"
    gate, up, down = matrices
    flat = chosen.flatten()
    order = mx.argsort(flat)
    experts = flat[order]
    return product_kernel(gate_up_kernel(x, gate, up, order, experts), down, order, experts)


def packed(mlp: ExpertMLP) -> tuple[PackedMatrix, PackedMatrix, PackedMatrix] | None:
    """Gate, up and down as the kernel reads them, or None if it cannot: gate and up must be of one format."""
    gate, up, down = (matrix.packed() for matrix in mlp)
    if gate is None or up is None or down is None or gate.format != up.format:
        return None
    return gate, up, down

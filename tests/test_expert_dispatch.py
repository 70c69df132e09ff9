"""Every way to send routes to experts gives what a dense loop over all of them gives; tiles are what they promise."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from routings import HIDDEN, ROUTINGS, SETTINGS, Routing, uniform

from mlx_mtp.models import expert_dispatch
from mlx_mtp.models.expert_dispatch import (
    ALL,
    GATHER,
    GROUPED,
    SORTED,
    SPLIT,
    DispatchPlan,
    default_plan,
    dispatch,
    most_tiles,
    tiles_of,
)
from mlx_mtp.models.expert_statistics import RoutingCounter
from mlx_mtp.models.moe import QuantizedExpertLinear, SwitchGLU

PORTABLE = (GATHER, SORTED, SPLIT, *GROUPED, ALL)


def matrices(glu: SwitchGLU) -> list[np.ndarray]:
    """Gate, up and down in float64, decoded where they are quantized."""
    found = []
    for name in ("gate_proj", "up_proj", "down_proj"):
        linear = glu[name]
        weight = linear.weight
        if isinstance(linear, QuantizedExpertLinear):
            weight = mx.dequantize(weight, linear.scales, linear.biases, linear.group_size, linear.bits)
        found.append(np.array(weight, np.float64))
    return found


def dense(glu: SwitchGLU, x: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Runs every token through every expert and picks: [N, top_k, D]."""
    gate, up, down = matrices(glu)
    every = np.empty((gate.shape[0], *x.shape))
    for expert in range(gate.shape[0]):
        gates = x @ gate[expert].T
        gelu = 0.5 * gates * (1 + np.tanh(np.sqrt(2 / np.pi) * (gates + 0.044715 * gates**3)))
        every[expert] = (gelu * (x @ up[expert].T)) @ down[expert].T
    return every[chosen, np.arange(len(x))[:, None]]


@pytest.fixture(scope="module", params=[0, 4, 8], ids=["float32", "4 bits", "8 bits"])
def glu(request: pytest.FixtureRequest) -> SwitchGLU:
    mx.random.seed(0)
    made = SwitchGLU(HIDDEN, SETTINGS)
    if request.param:
        plain = np.array(made.gate_proj.weight)
        nn.quantize(made, group_size=32, bits=request.param)
        assert not np.allclose(matrices(made)[0], plain, atol=1e-5)  # quantizing did something
    return made


@ROUTINGS
@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 33, 128])  # 4 to 512 routes
def test_every_strategy_equals_a_dense_loop_over_experts(glu: SwitchGLU, routing: Routing, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    x, chosen = rng.normal(size=(tokens, HIDDEN)).astype(np.float32), routing(rng, tokens)
    expected = dense(glu, x.astype(np.float64), chosen)
    for strategy in PORTABLE:
        got = dispatch(strategy, mx.array(x), mx.array(chosen, mx.uint32), glu.mlp)
        assert got.shape == (tokens, SETTINGS.top_k, HIDDEN)
        assert np.abs(np.array(got) - expected).max() <= 1e-5 * np.abs(expected).max(), strategy


@pytest.mark.parametrize("routes", [1, 2, 3, 511])
def test_counts_that_no_tile_divides_are_right_too(routes: int) -> None:
    layer, rng = SwitchGLU(HIDDEN, SETTINGS), np.random.default_rng(routes)
    x, chosen = rng.normal(size=(routes, HIDDEN)).astype(np.float32), rng.integers(0, 16, (routes, 1))
    expected = dense(layer, x.astype(np.float64), chosen)
    for strategy in PORTABLE:
        got = dispatch(strategy, mx.array(x), mx.array(chosen, mx.uint32), layer.mlp)
        assert np.abs(np.array(got) - expected).max() <= 1e-5 * np.abs(expected).max(), strategy


@pytest.mark.parametrize("lanes", [0, 1, 3])
@pytest.mark.parametrize("routes", [1, 2, 7, 64])
def test_routes_shared_out_among_queues_keep_every_bit(
    glu: SwitchGLU, lanes: int, routes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, queues = mx.stream, [mx.new_thread_local_stream(mx.cpu) for _ in range(lanes)]
    used: list[object] = []

    def noted(lane: mx.ThreadLocalStream) -> mx.StreamContext:
        used.append(lane)
        return stream(lane)

    rng = np.random.default_rng(routes)
    x, chosen = rng.normal(size=(routes, HIDDEN)).astype(np.float32), rng.integers(0, 16, (routes, 1))
    given = mx.array(x), mx.array(chosen, mx.uint32), glu.mlp
    monkeypatch.setattr(expert_dispatch, "side_lanes", lambda: queues)
    monkeypatch.setattr(mx, "stream", noted)
    split = np.array(dispatch(SPLIT, *given))
    assert used == queues
    assert np.array_equal(split, np.array(dispatch(SORTED, *given)))


def test_a_layer_follows_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def noted(strategy: str, *given: object) -> mx.array:
        seen.append(strategy)
        return dispatch(strategy, *given)

    monkeypatch.setattr("mlx_mtp.models.moe.dispatch", noted)
    layer = SwitchGLU(HIDDEN, SETTINGS)
    layer.use_dispatch(DispatchPlan(((0, SORTED), (8, "grouped-8"), (20, ALL))))
    for tokens in (1, 2, 4, 5, 50):
        layer(mx.ones((tokens, HIDDEN)), mx.array(uniform(np.random.default_rng(0), tokens), mx.uint32))
    assert seen == [SORTED, "grouped-8", "grouped-8", ALL, ALL]


def test_the_default_plan_sorts_from_some_count_on_and_needs_no_measuring() -> None:
    plan = default_plan()
    assert plan.strategy(4) == GATHER
    assert plan.strategy(512) == SORTED


@pytest.mark.parametrize("steps", [(), ((4, GATHER),), ((0, GATHER), (0, SORTED)), ((0, "fastest"),)])
def test_a_plan_that_is_none_is_refused(steps: tuple[tuple[int, str], ...]) -> None:
    with pytest.raises(ValueError, match="expected rising route counts"):
        DispatchPlan(steps)


@ROUTINGS
@pytest.mark.parametrize("height", [1, 3, 8])
def test_tiles_hold_each_route_once_and_rows_of_one_expert_only(routing: Routing, height: int) -> None:
    flat = routing(np.random.default_rng(1), 9).flatten()
    tiles = tiles_of(mx.array(flat, mx.uint32), SETTINGS.num_experts, height)
    order, slots = np.array(tiles.order), np.array(tiles.slots)
    assert sorted(order) == list(range(len(flat)))
    held = []
    for number, (expert, first, rows) in enumerate(zip(*(part.tolist() for part in tiles[2:]), strict=True)):
        inside = order[first : first + rows].tolist() if rows else []
        assert set(flat[inside]) <= {expert}
        assert slots[first : first + rows].tolist() == [number * height + i for i in range(rows)]
        held += inside
    assert sorted(held) == list(range(len(flat)))
    used = np.array(tiles.rows)
    assert len(used) == most_tiles(len(flat), SETTINGS.num_experts, height)
    assert set(np.array(tiles.experts)[used == 0]) <= {flat.max()}  # what is not needed reads nothing new


@pytest.mark.parametrize("rows", [4, 8])
def test_tiles_read_each_distinct_expert_once_in_a_batch_of_drafts(rows: int) -> None:
    # K = 3, 128 experts, 8 a token, uniform: 4 positions a row.
    rng = np.random.default_rng(rows)
    flat = np.argsort(rng.random((rows * 4, 128)), axis=1)[:, :8].flatten()
    counts = np.bincount(flat, minlength=128)
    assert 2 <= counts.max() <= 8
    tiles = tiles_of(mx.array(flat, mx.uint32), 128, 8)
    needed = np.array(tiles.experts)[np.array(tiles.rows) > 0]
    assert sorted(needed) == list(np.nonzero(counts)[0])


def test_routing_is_counted_on_request() -> None:
    layer, counter = SwitchGLU(HIDDEN, SETTINGS), RoutingCounter()
    layer(mx.ones((3, HIDDEN)), mx.array([[0, 1, 2, 3]] * 3, mx.uint32))  # before anyone asked
    layer.count_routing(counter)
    layer(mx.ones((3, HIDDEN)), mx.array([[0, 1, 2, 3]] * 3, mx.uint32))
    layer(mx.ones((2, HIDDEN)), mx.array([[15, 1, 2, 3], [4, 1, 0, 3]], mx.uint32))
    found = counter.statistics()
    assert (found.passes, found.routes, found.distinct) == (2, 20, 10)
    assert found.distinct_per_pass == 5
    assert found.reuse == 2

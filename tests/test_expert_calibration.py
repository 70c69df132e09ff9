"""Calibration measures, keeps and uses what is fastest; the kernel has to prove itself first."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support import GOLDENS

from mlx_mtp.calibration import CalibrationFile
from mlx_mtp.checkpoint.loader import load_target
from mlx_mtp.config import ExpertsConfig
from mlx_mtp.models import expert_calibration, expert_kernel
from mlx_mtp.models.expert_calibration import (
    LEAST_ROUNDS,
    MOST_ROUNDS,
    PORTABLE,
    SWEEPS,
    Costs,
    Shape,
    candidates,
    choose_dispatch,
    entry_key,
    kernel_is_sound,
    measure,
)
from mlx_mtp.models.expert_dispatch import ALL, GATHER, KERNEL, SORTED, SPLIT, default_plan, dispatch
from mlx_mtp.models.moe import SwitchGLU

TOKENS = (1, 8, 64)
SHAPE = Shape(hidden_size=32, num_experts=8, top_k=2, dtype=mx.float32)


def layer() -> SwitchGLU:
    mx.random.seed(0)
    return SwitchGLU(32, ExpertsConfig(8, 2, 64))


def of_formats(*bits: int) -> SwitchGLU:
    """Gate, up and down of so many bits each."""
    one = layer()
    for name, each in zip(("gate_proj", "up_proj", "down_proj"), bits, strict=True):
        setattr(one, name, getattr(one, name).to_quantized(32, each))
    return one


def target_of(layers: list[SwitchGLU], is_mixture: bool = True) -> Any:
    """As much of a target as calibration looks at."""
    text = SimpleNamespace(hidden_size=32, experts=ExpertsConfig(8, 2, 64) if is_mixture else None)
    return SimpleNamespace(config=SimpleNamespace(text=text), dtype=mx.float32, modules=lambda: [object(), *layers])


@pytest.fixture
def file(tmp_path: Path) -> CalibrationFile:
    return CalibrationFile(tmp_path / "calibration.json")


@pytest.fixture
def with_costs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Replaces measuring by figures in which grouped-8 wins; the list counts how often it was asked."""
    asked: list[int] = []

    def measured(layers: object, shape: object, tokens: object, strategies: list[str], **_: object) -> Costs:
        asked.append(len(strategies))
        return Costs({2: {GATHER: 1.0, SORTED: 2.0}, 128: {SORTED: 4.0, "grouped-8": 3.0, KERNEL: 1.0}})

    monkeypatch.setattr(expert_calibration, "measure", measured)
    return asked


def test_weights_are_wired_while_it_measures_as_they_will_be(
    file: CalibrationFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []

    @contextmanager
    def wired() -> Iterator[None]:
        happened.append("wired")
        yield
        happened.append("released")

    def measured(*given: object) -> Costs:
        happened.append("measured")
        return Costs({2: {GATHER: 1.0}})

    monkeypatch.setattr(expert_calibration, "wired_memory", wired)
    monkeypatch.setattr(expert_calibration, "measure", measured)
    choose_dispatch(target_of([layer()]), file, 64)
    assert happened == ["wired", "measured", "released"]


def test_what_was_measured_once_is_used_and_not_measured_again(file: CalibrationFile, with_costs: list[int]) -> None:
    first, second = layer(), layer()
    plan = choose_dispatch(target_of([first]), file, 64)
    assert plan == choose_dispatch(target_of([second, second]), file, 64)
    assert first.plan == second.plan == plan
    assert plan.strategy(2) == GATHER
    assert plan.strategy(128) == "grouped-8"  # the kernel was not on offer
    assert len(with_costs) == 1


def test_another_shape_is_measured_by_itself(file: CalibrationFile, with_costs: list[int]) -> None:
    choose_dispatch(target_of([layer()]), file, 64)
    quantized = layer()
    quantized.gate_proj = quantized.gate_proj.to_quantized(32, 4)
    choose_dispatch(target_of([quantized]), file, 64)
    assert len(with_costs) == 2


def test_without_calibration_and_without_experts_nothing_is_measured_or_changed(
    file: CalibrationFile, with_costs: list[int]
) -> None:
    one = layer()
    assert choose_dispatch(target_of([one]), file, 64, calibrate=False) == one.plan == default_plan()
    assert choose_dispatch(target_of([], is_mixture=False), file, 64) == default_plan()
    assert with_costs == []
    assert not file.path.exists()


@pytest.mark.parametrize("entry", [{}, {"seconds": 3}, {"seconds": {"four": {}}}, {"seconds": {"4": {"a": "b"}}},
                                   {"seconds": {}}])
def test_an_entry_that_makes_no_sense_is_measured_anew(
    file: CalibrationFile, with_costs: list[int], entry: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_calibration, "entry_key", lambda *_: "key")
    file.write("key", entry)
    choose_dispatch(target_of([layer()]), file, 64)
    assert len(with_costs) == 1
    assert Costs.from_json(file.read("key") or {}) is not None


def test_a_real_target_is_measured_and_every_layer_gets_the_plan(file: CalibrationFile) -> None:
    target = load_target(GOLDENS / "mixture" / "target", mx.float32)[0]
    layers = [module for module in target.modules() if isinstance(module, SwitchGLU)]
    plan = choose_dispatch(target, file, 16)
    assert len(layers) > 1
    assert all(one.plan == plan for one in layers)
    (stored,) = json.loads(file.path.read_text()).values()
    costs = Costs.from_json(stored)
    assert costs is not None
    assert all(seconds > 0 for by_name in costs.seconds.values() for seconds in by_name.values())


def test_costs_between_two_counts_are_interpolated_on_log_scales() -> None:
    costs = Costs({4: {SORTED: 1.0}, 16: {SORTED: 4.0, "grouped-4": 2.0}})
    assert costs.at(8, SORTED) == pytest.approx(2.0)
    assert costs.at(64, SORTED) == 4.0  # beyond the last count it stays
    assert costs.at(8, "grouped-4") == float("inf")  # hopeless at 4


def test_a_plan_leaves_the_default_only_for_what_is_clearly_faster() -> None:
    usual = default_plan().strategy(2)
    close = Costs({2: {usual: 1.0, "grouped-4": 0.99}, 4: {usual: 1.0, "grouped-4": 0.9}})
    plan = close.plan(2, [usual, "grouped-4"])
    assert plan.strategy(2) == usual
    assert plan.strategy(4) == "grouped-4"


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_calibration, "side_lanes", lambda: (mx.new_thread_local_stream(mx.cpu),))


def test_sharing_out_among_cores_is_tried_only_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SPLIT in candidates(SHAPE, 2, PORTABLE)
    key = entry_key([layer()], SHAPE, False)
    assert "by rows or columns" in key  # as float32 lies on a CPU
    monkeypatch.setattr(expert_calibration, "side_lanes", lambda: ())
    assert SPLIT not in candidates(SHAPE, 2, PORTABLE)
    assert entry_key([layer()], SHAPE, False) != key
    assert entry_key([layer(), of_formats(8, 8, 8)], SHAPE, False) != entry_key([layer()], SHAPE, False)


def test_few_routes_are_not_tried_on_tall_tiles_or_all_experts() -> None:
    few, many = candidates(SHAPE, 2, PORTABLE), candidates(SHAPE, 128, PORTABLE)
    assert few[0] == default_plan().strategy(2)
    assert set(few) == {GATHER, SORTED, SPLIT, "grouped-4"}
    assert set(many) == set(PORTABLE)
    assert ALL not in candidates(Shape(32, 128, 8, mx.float32), 512, PORTABLE)


def test_measuring_stops_when_its_time_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    def runs_within(budget: float, *tokens: int) -> int:
        """A clock that goes on by a second whenever it is read; returns how many runs were made."""
        runs: list[str] = []

        def counted(strategy: str, *given: Any) -> mx.array:
            runs.append(strategy)
            return dispatch(strategy, *given)

        monkeypatch.setattr(expert_calibration, "dispatch", counted)
        ticks = count()
        costs = measure([layer()], SHAPE, tokens, PORTABLE, budget=budget, clock=lambda: float(next(ticks)))
        assert set(costs.seconds) == {2 * one for one in tokens}
        assert all(default_plan().strategy(routes) in by_name for routes, by_name in costs.seconds.items())
        return len(runs) - len(PORTABLE)  # those that warm up come before the clock starts

    assert runs_within(0.0, 1, 4, 64) == 3  # the default's one run for every count
    assert runs_within(60.0, 64) == SWEEPS * LEAST_ROUNDS * len(PORTABLE)  # confirmed, but no more
    assert runs_within(1000.0, 64) == SWEEPS * MOST_ROUNDS * len(PORTABLE)


def test_what_disturbs_a_strategy_for_a_while_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """As what shares work out among cores, while both of its threads are on one of them."""
    timers: list[bool] = []

    def timer(*_: object) -> Callable[[str], float]:
        timers.append(is_disturbed := len(timers) < len(TOKENS))
        return lambda name: (9.0 if is_disturbed else 0.5) if name == SPLIT else 1.0

    monkeypatch.setattr(expert_calibration, "_timer", timer)
    costs = measure([layer()], SHAPE, TOKENS, PORTABLE, clock=lambda: 0.0)
    assert all(by_name[SPLIT] == 0.5 for by_name in costs.seconds.values())
    assert all(costs.plan(2, PORTABLE).strategy(2 * tokens) == SPLIT for tokens in TOKENS)


def test_the_kernel_is_not_offered_without_a_device_for_it(file: CalibrationFile, with_costs: list[int]) -> None:
    choose_dispatch(target_of([layer()]), file, 64)
    assert with_costs == [len(PORTABLE)]


def fake_kernel(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    """A device with Metal whose kernel is off by so much."""
    monkeypatch.setattr(expert_kernel, "is_available", lambda: True)

    def run(strategy: str, *given: Any) -> mx.array:
        return dispatch(GATHER, *given) * (1 + error) if strategy == KERNEL else dispatch(strategy, *given)

    monkeypatch.setattr(expert_calibration, "dispatch", run)


def test_a_kernel_that_agrees_is_used_where_it_measured_faster(
    file: CalibrationFile, with_costs: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_kernel(monkeypatch, error=1e-6)
    plan = choose_dispatch(target_of([layer()]), file, 64)
    assert plan.strategy(2) == GATHER
    assert plan.strategy(128) == KERNEL
    assert choose_dispatch(target_of([layer()]), file, 64, kernels=False).strategy(128) == "grouped-8"
    assert caplog.records == []


@pytest.mark.parametrize("error", [0.01, float("nan")])
def test_a_kernel_that_differs_is_dropped_with_one_line(
    file: CalibrationFile, with_costs: list[int], monkeypatch: pytest.MonkeyPatch, error: float,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fake_kernel(monkeypatch, error)
    assert choose_dispatch(target_of([layer()]), file, 64).strategy(128) == "grouped-8"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def lost(part: str, out: mx.array) -> mx.array:
    """[N, top_k, D] without the first column, or the first route."""
    rows = out.reshape(-1, out.shape[-1])
    kept = mx.arange(rows.shape[1]) > 0 if part == "column" else mx.arange(rows.shape[0])[:, None] > 0
    return (rows * kept).reshape(out.shape)


@pytest.mark.parametrize("part", ["column", "route"])
def test_a_kernel_that_leaves_out_one_column_or_route_is_dropped_in_half_precision_too(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, part: str
) -> None:
    mx.random.seed(0)
    wide, is_broken = SwitchGLU(64, ExpertsConfig(64, 2, 64)), True

    def run(strategy: str, x: mx.array, chosen: mx.array, mlp: Any) -> mx.array:
        out = dispatch(GATHER, x.astype(mx.float32), chosen, mlp)
        return lost(part, out) if is_broken and strategy == KERNEL and len(chosen) == 33 else out

    monkeypatch.setattr(expert_calibration, "dispatch", run)
    # Of the real shapes' thousands of columns one weighs 0.02 of the whole; one of 64 columns or 66 routes 0.125.
    monkeypatch.setattr(expert_calibration, "HALF_TOLERANCE", 0.14)
    assert not kernel_is_sound([wide], Shape(64, 64, 2, mx.bfloat16))
    assert len(caplog.records) == 1
    is_broken = False
    assert kernel_is_sound([wide], Shape(64, 64, 2, mx.bfloat16))


def test_the_kernel_is_tried_on_full_tiles_that_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    most = []

    def run(strategy: str, x: mx.array, chosen: mx.array, *mlp: Any) -> mx.array:
        most.append(max(np.bincount(np.array(chosen).flatten())))
        return dispatch(GATHER, x, chosen, *mlp)

    monkeypatch.setattr(expert_calibration, "dispatch", run)
    assert kernel_is_sound([layer()], SHAPE)
    assert max(most) > 2 * expert_kernel.TILE_ROWS


def test_the_kernel_is_tried_on_each_format_of_a_mixed_checkpoint(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain, quantized = layer(), of_formats(4, 4, 8)

    def run(strategy: str, x: mx.array, chosen: mx.array, mlp: Any) -> mx.array:
        is_wrong = strategy == KERNEL and mlp.gate is quantized.gate_proj
        return dispatch(GATHER, x, chosen, mlp) * (0.9 if is_wrong else 1)

    monkeypatch.setattr(expert_calibration, "dispatch", run)
    assert kernel_is_sound([plain, plain], SHAPE)
    assert not kernel_is_sound([plain, quantized], SHAPE)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("bits", [(4, 8, 8), (4, 4, 5)])
def test_a_layer_that_the_kernel_cannot_read_leaves_it_out_without_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, bits: tuple[int, int, int]
) -> None:
    # Gate and up are read by one loop, so they must be of one format; 5 bits it cannot decode.
    monkeypatch.setattr(expert_calibration, "dispatch", lambda strategy, *given: dispatch(GATHER, *given))
    assert kernel_is_sound([layer(), of_formats(4, 4, 8)], SHAPE)
    assert not kernel_is_sound([layer(), of_formats(*bits)], SHAPE)
    assert caplog.records == []


@pytest.mark.skipif(mx.metal.is_available(), reason="here the kernel does compile")
def test_a_kernel_that_does_not_compile_is_dropped_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # What MLX raises here, where it has no Metal, is what it raises for a kernel that does not compile.
    assert not kernel_is_sound([layer()], SHAPE)
    assert len(caplog.records) == 1
    assert "does not run here" in caplog.text


def test_a_plan_that_differs_changes_no_more_than_the_last_bits() -> None:
    one, x = layer(), mx.random.normal((40, 32), key=mx.random.key(1))
    chosen = mx.array(np.random.default_rng(0).integers(0, 8, (40, 2)), mx.uint32)
    outputs = [np.array(dispatch(name, x, chosen, one.mlp)) for name in PORTABLE]
    assert all(np.allclose(outputs[0], other, rtol=0, atol=1e-6) for other in outputs[1:])


@pytest.mark.parametrize(("tokens", "together"), [(2, 3), (expert_calibration.FEW_TOKENS + 1, 1)])
def test_layers_are_timed_one_behind_the_other_as_in_a_pass(
    tokens: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Side by side one layer would fill the gaps of another, and alone each would pay for handing its work over."""
    monkeypatch.setattr(expert_calibration, "is_gpu", lambda: False)
    given: list[mx.array] = []

    def noted(strategy: str, x: mx.array, chosen: mx.array, mlp: object) -> mx.array:
        given.append(x)
        return mx.full((*chosen.shape, x.shape[1]), 1e6)

    monkeypatch.setattr(expert_calibration, "dispatch", noted)
    ticks = count()
    run = expert_calibration._timer([layer() for _ in range(3)], SHAPE, tokens, count(), lambda: float(next(ticks)))
    assert run(SPLIT) == 1 / together
    assert [mx.abs(x).max().item() > 500 for x in given] == [False, True, True][:together]

"""The bytes model against the published sizes, a simulation of routing, and the published measurements."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from bench import published, roofline
from bench.chips import Chip, chip
from bench.model_bytes import DISPATCHES, DrafterModel, TargetModel, distinct_experts, family_drafter, family_target
from bench.recipe_sizes import FAMILY, gigabytes
from bench.round_cost import BOUND, MEASURED, Decoding, mean_acceptance_length
from mlx_mtp.checkpoint.memory import cache_bytes
from mlx_mtp.convert.recipes import RECIPES
from mlx_mtp.errors import RequestError

M3_ULTRA = chip("M3 Ultra")


def pair(name: str, bits: int = 4, draft_bits: int = 4) -> tuple[TargetModel, DrafterModel]:
    target = family_target(name, bits)
    return target, family_drafter(target, draft_bits)


def decoding(name: str, on: Chip = M3_ULTRA, bits: int = 4, **settings: object) -> Decoding:
    return replace(Decoding(on, *pair(name, bits)), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "billions"), [("31B", 30.7), ("26B-A4B", 25.2), ("12B", 12)])
def test_all_parameters_add_up_to_the_published_size(name: str, billions: float) -> None:
    assert family_target(name, 4).total.weights / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize(("name", "billions"), [("E2B", 2.3), ("E4B", 4.5), ("26B-A4B", 3.8)])
def test_what_one_token_meets_adds_up_to_the_published_effective_or_active_size(name: str, billions: float) -> None:
    assert family_target(name, 4).flop(context=0) / 2e9 == pytest.approx(billions, rel=0.04)


@pytest.mark.parametrize(("name", "millions"), [("E2B", 78), ("E4B", 79), ("12B", 420), ("26B-A4B", 420), ("31B", 470)])
def test_the_drafters_add_up_to_the_published_sizes(name: str, millions: float) -> None:
    assert pair(name)[1].total.weights / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("recipe", RECIPES)
def test_bytes_are_those_that_the_converter_plans(name: str, recipe: str) -> None:
    for bits in (4, 8):
        target = family_target(name, bits, recipe)
        assert target.total.bytes / 1e9 == pytest.approx(gigabytes(target.config, recipe, bits))


@pytest.mark.parametrize("tokens", [1, 4, 16, 64])
def test_distinct_experts_are_as_many_as_a_simulation_of_random_routing_touches(tokens: int) -> None:
    generator = np.random.default_rng(0)
    scores = generator.random((400, tokens, 128))
    chosen = np.argpartition(scores, 8, axis=-1)[..., :8].reshape(400, -1)
    touched = np.mean([len(set(routes)) for routes in chosen.tolist()])
    assert distinct_experts(128, 8, tokens) == pytest.approx(touched, rel=0.02)


def test_experts_are_read_once_for_each_route_below_64_tokens_in_mlx_and_once_each_from_there_on() -> None:
    target = family_target("26B-A4B", 4)
    assert [target.experts_read(tokens, "sorted") for tokens in (1, 8, 63)] == [8, 64, 504]
    assert target.experts_read(64, "sorted") == target.experts_read(64, "once") < 128
    assert target.experts_read(64, "per route") == 512
    for tokens in (1, 2, 16, 100):
        once, in_mlx, per_route = (target.weight_bytes(tokens, kind) for kind in ("once", "sorted", "per route"))
        assert once <= in_mlx * (1 + 1e-12)
        assert in_mlx <= per_route * (1 + 1e-12)


def test_a_dense_model_reads_the_same_however_experts_are_dispatched() -> None:
    assert len({family_target("31B", 4).weight_bytes(tokens, kind) for tokens in (1, 64) for kind in DISPATCHES}) == 1


def test_keys_and_values_read_are_those_cached_unless_layers_share_them() -> None:
    for name, context in (("12B", 500), ("12B", 5000), ("31B", 5000), ("26B-A4B", 5000)):
        target = family_target(name, 4)
        slack = min(0, context - target.config.text.window)  # the cache sets the whole window aside
        assert target.kv_bytes(context) == cache_bytes(target.config.text, context, slack, mx.bfloat16)
    shared = family_target("E2B", 4)
    assert shared.kv_bytes(5000) > cache_bytes(shared.config.text, 5000, 0, mx.bfloat16)


def test_a_centroid_head_spares_the_drafter_most_of_its_embedding() -> None:
    _, drafter = pair("E2B", draft_bits=16)
    assert drafter.step(1).bytes < 0.2 * drafter.total.bytes
    assert drafter.step(1).bytes < drafter.step(8).bytes < drafter.step(1000).bytes == drafter.total.bytes


def test_the_roofline_is_bytes_over_bandwidth_or_flop_over_peak_whichever_is_longer() -> None:
    slow, dense = chip("M1"), decoding("31B", chip("M1"), context=0)
    assert dense.pass_seconds(0) == pytest.approx(dense.target.dense.bytes / 68e9)
    assert not dense.is_compute_bound(0)
    crowd = replace(dense, rows=64)
    assert crowd.is_compute_bound(0)
    assert crowd.pass_seconds(0) == pytest.approx(64 * dense.target.flop(0) / slow.flop_per_second)


@pytest.mark.parametrize("name", FAMILY)
def test_more_bandwidth_or_more_cores_never_slow_a_round_and_more_bytes_never_speed_it_up(name: str) -> None:
    one, eight_bits = decoding(name, dispatch="once"), family_target(name, 8)
    for efficiency in (BOUND, MEASURED):
        for rows in (1, 8):
            base = replace(one, rows=rows, efficiency=efficiency)
            for k in (0, 3, 7):
                seconds = base.round_seconds(k)
                assert replace(base, chip=replace(M3_ULTRA, bandwidth=900)).round_seconds(k) <= seconds
                assert replace(base, chip=replace(M3_ULTRA, cores=100)).round_seconds(k) <= seconds
                assert replace(base, dispatch="per route").round_seconds(k) >= seconds
                assert replace(base, context=100_000).round_seconds(k) > seconds
                assert replace(base, target=eight_bits).round_seconds(k) >= seconds


def test_an_estimate_is_never_above_the_bound() -> None:
    for name in FAMILY:
        case = decoding(name, rows=4)
        for on in map(chip, ("M1 Ultra", "M2 Pro", "M3", "M4 Max", "M5")):
            bound, estimate = replace(case, chip=on), replace(case, chip=on, efficiency=MEASURED)
            for k in range(8):
                assert estimate.tokens_per_second(k, (0.8,)) < bound.tokens_per_second(k, (0.8,))


def test_chips_without_wide_kernels_pay_for_rows_again_unless_the_weights_are_bfloat16() -> None:
    def cost(on: str, bits: int) -> float:
        return decoding("12B", chip(on), bits, efficiency=MEASURED).round_cost(3)

    assert cost("M2 Ultra", 4) > cost("M3 Ultra", 4) + 1
    assert cost("M2 Ultra", 16) == pytest.approx(cost("M3 Ultra", 16), rel=0.02)


def test_the_mean_acceptance_length_is_that_of_simulated_rounds() -> None:
    generator = np.random.default_rng(0)
    for acceptance in ((0.8,), (0.9, 0.5, 0.7)):
        shares = np.array([acceptance[min(i, len(acceptance) - 1)] for i in range(5)])
        accepted = np.cumprod(generator.random((40_000, 5)) < shares, axis=1).sum(axis=1)
        assert mean_acceptance_length(acceptance, 5) == pytest.approx(1 + accepted.mean(), rel=0.01)
    assert mean_acceptance_length((0.8,), 0) == 1


@pytest.mark.parametrize("name", FAMILY)
def test_at_the_break_even_acceptance_drafting_neither_gains_nor_loses(name: str) -> None:
    case = decoding(name, rows=4, efficiency=MEASURED)
    for k in (1, 3, 7):
        share = case.break_even(k)
        assert share is not None
        assert case.speedup(k, (share,)) == pytest.approx(1)
        assert case.speedup(k, (share - 0.02,)) < 1 < case.speedup(k, (share + 0.02,))


def test_where_a_round_costs_more_than_all_its_tokens_no_acceptance_breaks_even() -> None:
    hopeless = decoding("31B", chip("M1"), rows=64)
    heavy = replace(hopeless, drafter=replace(hopeless.drafter, config=hopeless.drafter.config, settings=None))
    assert heavy.break_even(1) is None
    assert heavy.speedup(1, (1.0,)) < 1


def test_plain_decoding_is_as_fast_as_itself() -> None:
    assert decoding("E2B").speedup(0, (0.8,)) == 1


def test_every_published_figure_is_met_within_a_quarter_or_the_table_says_why_not() -> None:
    found = list(published.rows())
    assert len(found) > 40
    for row in found:
        assert row.is_within or row.lacks or row.reason, row.what
    stated = [row for row in found if not row.lacks]
    assert len(stated) >= 30
    assert sum(row.is_within for row in stated) >= 0.9 * len(stated)


def test_a_figure_that_is_missed_is_called_so() -> None:
    assert "MISSES, +50%: because" in published.Row("x", (1.0, 2.0), 3.0, reason="because").verdict
    assert published.Row("x", (1.0, 2.0), 0.7).error == pytest.approx(-0.3)
    assert published.Row("x", (1.0, 2.0), 1.5).verdict == "+0%"
    assert "too little: no chip" in published.Row("x", (1.0, 2.0), 1.5, lacks="no chip").verdict
    for model in (None, 0.7, 2.6):
        assert not published.Row("x", (1.0, 2.0), model).is_within


def test_the_command_prints_a_line_for_every_batch_and_draft_length(capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main(["--chip", "M5 Max", "M1", "--rows", "1", "4", "--num-draft-tokens", "0", "2", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| 1 |") for line in lines) == sum(line.startswith("| 4 |") for line in lines) == 6
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert roofline.main(["--published"]) == 0
    assert "states too little" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "expected"), [
    (["--chip", "M0"], "M5 Max"), (["--model", "27B"], "26B-A4B"), (["--rows", "0"], "at least 1"),
    (["--acceptance", "1.5"], "at most 1"), (["--bits", "7"], "16"), (["--context", "long"], "--context"),
])
def test_what_the_user_can_mend_is_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = roofline.main(arguments)
    except SystemExit as stop:
        code = stop.code  # type: ignore[assignment]
    said = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert expected in said[0]


def test_bits_that_mlx_does_not_have_are_refused() -> None:
    with pytest.raises(RequestError, match="expected one of 2, 3, 4, 5, 6, 8, 16"):
        family_target("31B", 7)


def test_a_plot_is_written_and_a_missing_matplotlib_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "26B-A4B", "12B", "--num-draft-tokens", "0", "3", "--plot", str(tmp_path / "plot.png")]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert roofline.main(arguments) == 2
    assert capsys.readouterr().err == (
        "error: --plot needs matplotlib, which is not installed: pip install 'mlx-mtp[bench]'\n")
    monkeypatch.undo()
    pytest.importorskip("matplotlib")
    assert roofline.main(arguments) == 0
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert roofline.main([*arguments[:-1], str(tmp_path / "none" / "plot.png")]) == 2

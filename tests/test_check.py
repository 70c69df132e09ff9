"""The lossless check itself: it passes a healthy pair, and finds and locates each of the planted faults."""

from __future__ import annotations

import math
from dataclasses import replace

import check_plants
import numpy as np
import pytest
from support import ReplayDrafter

import mlx_mtp
from mlx_mtp.api import Pair
from mlx_mtp.check import prompts, sweep
from mlx_mtp.check.prompts import Case
from mlx_mtp.check.replay import Flip, Text, replay
from mlx_mtp.check.sweep import Sweep
from mlx_mtp.config import SamplingParams
from mlx_mtp.models.target import Target

TOLERANCE = 1e-4
# Prompt, tokens of the answer, temperature. Rows end at different times, so that others move into their places.
ASKED = (("prose", 20, 0.0), ("beyond the window", 8, 1.0), ("code", 14, 1.0), ("to the window", 18, 0.0),
         ("beyond the window", 18, 1.0), ("longer prose", 18, 1.5))


def told_to_nobody(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def pair() -> Pair:
    return mlx_mtp.load()


@pytest.fixture(scope="module")
def cases(pair: Pair) -> list[Case]:
    tokens = {case.name: case.tokens for case in prompts.bundled_cases(pair, [0.0], 24, print)}
    return [Case(name, tokens[name], SamplingParams(most, temperature, seed=i))
            for i, (name, most, temperature) in enumerate(ASKED)]


@pytest.fixture(scope="module")
def healthy(pair: Pair, cases: list[Case]) -> Sweep:
    return sweep.run(pair, cases, [3], [0, 3], TOLERANCE, told_to_nobody)


def test_a_healthy_pair_passes_and_equal_texts_are_replayed_once(healthy: Sweep, cases: list[Case]) -> None:
    assert (healthy.violations, healthy.near_ties) == (0, 0)
    assert len(healthy.cells) == 2
    assert len(healthy.replays) == len(cases)  # in float32 on CPU, all cells give the same texts
    for cell in healthy.cells:
        assert cell.plain_texts == len(cell.texts) == len(cases)
        assert cell.tokens == sum(len(text.tokens) for text in healthy.cells[0].texts)
        assert (cell.rejected > 10) == (cell.num_draft_tokens > 0)
    assert sum(len(one.leads) for one in healthy.replays) == healthy.cells[0].tokens + sum(
        text.finish_reason == "stop" for text in healthy.cells[0].texts)  # stop tokens are judged too


@pytest.mark.parametrize(("plant", "num_draft_tokens", "least"), [
    (check_plants.drafts_see_the_draft_after_them, 3, 3),
    (check_plants.a_ring_has_less_slack_than_drafts, 7, 1),
    (check_plants.a_moved_row_keeps_what_the_ended_one_wrote, 0, 2),
    (check_plants.a_rejected_draft_is_committed, 3, 3),
    (check_plants.drafts_are_accepted_too_liberally, 3, 3),
    (check_plants.noise_is_keyed_by_the_wrong_position, 3, 3),
])
def test_a_planted_fault_is_caught_and_located(
    plant: check_plants.Plant, num_draft_tokens: int, least: int, monkeypatch: pytest.MonkeyPatch, pair: Pair,
    cases: list[Case], healthy: Sweep,
) -> None:
    plant(monkeypatch)
    found = sweep.run(pair, cases, [3], [num_draft_tokens], TOLERANCE, told_to_nobody)
    cell = found.cells[0]
    assert found.violations >= least
    broken = {cases.index(one.case): one.flip for one in cell.violations}
    for i, (text, plain) in enumerate(zip(cell.texts, healthy.cells[0].texts, strict=True)):
        if text.tokens == plain.tokens:
            assert i not in broken
            continue
        first = next(at for at, (got, wanted) in enumerate(zip(text.tokens, plain.tokens, strict=False))
                     if got != wanted)
        flip = broken[i]
        assert (flip.index, flip.got, flip.expected) == (first, text.tokens[first], plain.tokens[first])
        assert flip.margin > TOLERANCE
    sampled = [cases[i].sampling.temperature > 0 for i in broken]
    assert all(sampled) == (plant is check_plants.noise_is_keyed_by_the_wrong_position)


@pytest.mark.parametrize("plant", [
    check_plants.drafts_see_the_draft_after_them, check_plants.a_ring_has_less_slack_than_drafts,
    check_plants.a_rejected_draft_is_committed, check_plants.drafts_are_accepted_too_liberally,
    check_plants.noise_is_keyed_by_the_wrong_position,
])
def test_the_replay_does_not_meet_the_fault(
    plant: check_plants.Plant, monkeypatch: pytest.MonkeyPatch, pair: Pair, healthy: Sweep
) -> None:
    plant(monkeypatch)
    text = healthy.cells[0].texts[4]
    assert replay(pair.target, text, TOLERANCE).is_plain


def test_what_a_tolerance_excuses_is_counted_by_its_size(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, cases: list[Case]
) -> None:
    check_plants.drafts_are_accepted_too_liberally(monkeypatch)
    strict = sweep.run(pair, cases[2:3], [1], [3], TOLERANCE, told_to_nobody)
    lax = sweep.run(pair, cases[2:3], [1], [3], 1.0, told_to_nobody)
    assert (strict.near_ties, strict.violations) == (0, 1)
    assert lax.violations == 0
    assert lax.near_ties >= 1
    assert lax.cells[0].near_ties[0] == strict.cells[0].violations[0]
    assert lax.cells[0].plain_texts == 0


def test_the_second_best_token_loses_by_what_the_best_one_leads(pair: Pair, healthy: Sweep) -> None:
    text = healthy.cells[0].texts[0]
    lead = replay(pair.target, text, TOLERANCE).leads[3]
    logits = np.array(mlx_mtp.score(pair, [*text.prompt, *text.tokens[:3]])[-1])
    best, second = np.argsort(-logits)[:2].tolist()
    assert best == text.tokens[3]
    flip = replay(pair.target, replace(text, tokens=(*text.tokens[:3], second)), 0.0).violation
    assert flip is not None
    assert (flip.index, flip.got, flip.expected) == (3, second, best)
    assert flip.margin == pytest.approx(lead, abs=1e-6)
    assert lead == pytest.approx(logits[best] - logits[second], abs=1e-3)


def test_logits_that_are_no_numbers_are_a_violation_whatever_filter_draws(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, healthy: Sweep
) -> None:
    real = Target.logits
    monkeypatch.setattr(Target, "logits", lambda self, hidden: real(self, hidden) * math.nan)
    text = replace(healthy.cells[0].texts[4], sampling=SamplingParams(18, 1.0, top_k=5))
    assert replay(pair.target, text, 1.0).violation is not None


def stopped(pair: Pair, prompt: str, most: int) -> Text:
    """An answer that ends by itself."""
    tokens = prompts.encoded(pair, prompt)
    request = mlx_mtp.new_request(pair, list(tokens), SamplingParams(most))
    for _ in mlx_mtp.new_engine(pair, num_draft_tokens=0).run([request]):
        pass
    assert request.finish_reason == "stop"
    return Text.of(request)


def test_the_end_of_a_text_is_judged_too(pair: Pair) -> None:
    text = stopped(pair, "Explain `operator.lt`.", 60)
    count, most = len(text.tokens), text.most_tokens
    whole = replay(pair.target, text, TOLERANCE)
    assert whole.is_plain
    assert len(whole.leads) == count + 1

    early = replay(pair.target, replace(text, tokens=text.tokens[:5]), TOLERANCE).violation
    assert early is not None
    assert (early.index, early.expected) == (5, text.tokens[5])
    assert early.got in text.stop_tokens
    assert early.margin > TOLERANCE

    cut = replace(text, tokens=text.tokens[:5], finish_reason="length")
    assert replay(pair.target, cut, TOLERANCE).violation == Flip(5, None, None, math.inf)
    assert replay(pair.target, replace(cut, most_tokens=5), TOLERANCE).is_plain
    assert replay(pair.target, replace(text, finish_reason="aborted"), TOLERANCE).violation == Flip(
        count, None, None, math.inf)

    stop = next(iter(text.stop_tokens & {106, 1, 6, 10}))
    late = replace(text, tokens=(*text.tokens, stop), most_tokens=most)
    violation = replay(pair.target, late, math.inf).violation
    assert violation is not None
    assert (violation.index, violation.got) == (count, stop)


def test_drafts_behind_the_end_of_a_text_are_not_taken_for_rejected(pair: Pair, cases: list[Case], healthy: Sweep
                                                                   ) -> None:
    """A drafter that is always right: whatever its last round drafts in vain, nobody refused a draft."""
    text = healthy.cells[0].texts[0]
    known = np.array([[*text.prompt, *text.tokens, *[0] * 8]])
    perfect = ReplayDrafter(known, np.ones_like(known), pair.target.config.text.vocab_size)
    found = sweep.run(replace(pair, drafter=perfect), cases[:1], [1], [5], TOLERANCE, told_to_nobody)
    assert found.drafted > len(text.tokens) - found.cells[0].rounds  # some of them in vain
    assert (found.rejected, found.violations) == (0, 0)


def test_a_pair_without_a_drafter_is_checked(pair: Pair, cases: list[Case], healthy: Sweep) -> None:
    found = sweep.run(replace(pair, drafter=None), cases[:3], [2], [3], TOLERANCE, told_to_nobody)
    assert (found.drafted, found.violations) == (0, 0)
    assert found.cells[0].texts == healthy.cells[0].texts[:3]


def test_the_bundled_prompts_cross_the_window_and_pass_it(pair: Pair) -> None:
    cases = prompts.bundled_cases(pair, [0.0, 1.0], 24, print)
    lengths = {case.name: len(case.tokens) for case in cases}
    window = pair.target.config.text.window
    assert len(cases) == 2 * len(lengths)
    assert min(lengths.values()) < window / 2
    assert window - 24 < lengths["to the window"] + 12
    assert lengths["beyond the window"] > window + 16
    assert {case.sampling.temperature for case in cases} == {0.0, 1.0}
    assert any(case.sampling.top_k for case in cases)
    assert any(case.sampling.min_p for case in cases)


def test_prompts_that_do_not_fit_are_left_out_and_told_of(pair: Pair) -> None:
    told: list[str] = []
    cases = prompts.bundled_cases(replace(pair, max_context=70), [0.0], 20, told.append)
    assert {case.name for case in cases} >= {"prose", "code"}
    assert len(told) >= 2
    assert all("left out" in line and "70" in line for line in told)
    with pytest.raises(mlx_mtp.RequestError, match="lower --max-tokens"):
        prompts.bundled_cases(replace(pair, max_context=21), [0.0], 20, told.append)

"""Sampled tokens follow the filtered distribution, and depend on nothing but logits, settings, seed and position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.config import SamplingParams
from mlx_mtp.spec_decode import sampler
from mlx_mtp.spec_decode.sampler import Sampler

FORCING = 1e4  # more than any logit here: noise of this size forces a token unless it is filtered out


def random_logits(rng: np.random.Generator, *shape: int, scale: float = 3.0) -> np.ndarray:
    return rng.normal(0, scale, shape).astype(np.float32)


def kept(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The plain oracle: which of logits [V] the filters keep, one after the other, in float64.

    Temperature; min-p against the best tempered probability; top-k; top-p over what top-k keeps.
    """
    probabilities = softmax(logits, params)
    order = np.argsort(-probabilities, kind="stable")
    best = order[: params.top_k] if params.top_k else order
    nucleus, mass = [], 0.0
    for token in best:
        if mass >= params.top_p and params.top_p < 1:
            break
        nucleus.append(token)
        mass += probabilities[token] / probabilities[best].sum()
    keep = np.zeros(len(logits), bool)
    keep[nucleus] = True
    return keep & (probabilities >= params.min_p * probabilities.max())


def softmax(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    weights = np.exp((logits.astype(np.float64) - logits.max()) / params.temperature)
    return weights / weights.sum()


def filtered_softmax(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    weights = np.where(kept(logits, params), softmax(logits, params), 0.0)
    return weights / weights.sum()


def probed(logits: np.ndarray, rows: Sequence[SamplingParams]) -> np.ndarray:
    """Which tokens each row of a batch can draw at all: logits [B, V] -> [B, V], every token forced in turn."""
    batch, size = logits.shape
    tiled = mx.broadcast_to(mx.array(logits)[:, None], (batch, size, size))
    noise = mx.broadcast_to(FORCING * mx.eye(size), (batch, size, size))
    return np.array(Sampler.of(rows).choose(tiled, noise)) == np.arange(size)


def draws(logits: np.ndarray, params: SamplingParams, count: int) -> np.ndarray:
    """A token at each of `count` positions, drawn the way the loop does."""
    sampler, positions = Sampler.of([params]), mx.arange(count, dtype=mx.int32)[None]
    tiled = mx.broadcast_to(mx.array(logits), (1, count, len(logits)))
    return np.array(sampler.choose(tiled, sampler.noise(positions, len(logits))))[0]


def random_params(rng: np.random.Generator) -> SamplingParams:
    """Each setting is at its neutral value about half of the time."""
    def either(neutral: Any, value: Any) -> Any:
        return neutral if rng.random() < 0.5 else value

    return SamplingParams(
        temperature=either(1.0, float(rng.uniform(0.1, 2.0))),
        top_k=either(0, int(rng.integers(1, 60))),  # at times more than there are tokens
        top_p=either(1.0, float(rng.uniform(0.05, 0.99))),
        min_p=either(0.0, float(rng.uniform(0.001, 0.5))),
        seed=int(rng.integers(2**32)),
    )


@pytest.mark.parametrize("settings", [
    {}, {"seed": 7}, {"top_k": 1, "top_p": 0.01}, {"top_k": 3, "min_p": 1.0, "top_p": 0.5, "seed": 2**32 - 1},
])
def test_temperature_zero_is_argmax_whatever_else_is_set(settings: dict[str, Any]) -> None:
    logits = mx.array(random_logits(np.random.default_rng(0), 2, 3, 50))
    greedy = SamplingParams(temperature=0.0, **settings)
    alone = Sampler.of([greedy, greedy])
    assert alone.noise(mx.zeros((2, 3), mx.int32), 50) is None
    assert mx.array_equal(alone.choose(logits, None), mx.argmax(logits, axis=-1)).item()
    assert alone.choose(logits, None).dtype == mx.int32

    mixed = Sampler.of([greedy, SamplingParams(temperature=2.0, seed=3)])
    chosen = mixed.choose(logits, mixed.noise(mx.array([[4, 5, 6], [4, 5, 6]], mx.int32), 50))
    assert mx.array_equal(chosen[0], mx.argmax(logits[0], axis=-1)).item()


def test_noise_is_a_function_of_seed_and_position_alone() -> None:
    seeds, positions = [5, 0, 2**32 - 1, 5], [[0, 7, 131_071], [7, 8, 9], [0, 0, 1], [7, 131_071, 0]]
    sampler = Sampler.of([SamplingParams(temperature=1.0, seed=seed, top_k=seed % 3) for seed in seeds])
    noise = sampler.noise(mx.array(positions, mx.int32), 64)
    assert noise is not None
    assert noise.shape == (4, 3, 64)
    for row, seed in enumerate(seeds):
        for column, position in enumerate(positions[row]):
            alone = Sampler.of([SamplingParams(temperature=0.5, seed=seed)])
            single = alone.noise(mx.array([[position]], mx.int32), 64)
            assert single is not None
            assert mx.array_equal(noise[row, column], single[0, 0]).item()


def test_seeds_and_positions_each_change_the_noise() -> None:
    pairs = [(seed, position) for seed in (0, 1, 2**31, 2**32 - 1) for position in (0, 1, 2, 2**17)]
    rows = [SamplingParams(temperature=1.0, seed=seed) for seed, _ in pairs]
    noise = Sampler.of(rows).noise(mx.array([[position] for _, position in pairs], mx.int32), 32)
    values = np.array(noise).reshape(len(pairs), -1)
    assert len({tuple(row) for row in values}) == len(pairs)  # (seed, position) and (position, seed) differ, too
    correlations = np.corrcoef(np.array(Sampler.of(rows).noise(mx.zeros((len(pairs), 1), mx.int32), 4096))[::4, 0])
    assert np.abs(correlations - np.eye(4)).max() < 0.1  # neighbouring seeds are unrelated; 6 sigma is 0.094


def test_the_filters_keep_what_a_plain_reading_of_them_keeps() -> None:
    rng, sizes = np.random.default_rng(2), []
    for _ in range(40):
        rows = [random_params(rng) for _ in range(4)]
        logits = random_logits(rng, 4, 40, scale=float(rng.uniform(0.5, 4)))
        can_draw = probed(logits, rows)
        for row, params in enumerate(rows):
            expected, tells = kept(logits[row], params), softmax(logits[row], params) > 0.0
            assert np.array_equal(can_draw[row] & tells, expected & tells), params
            sizes.append(expected.sum())
    assert min(sizes) == 1
    assert max(sizes) == 40
    assert len(set(sizes)) > 20  # the settings were not all trivial


def test_a_row_is_filtered_alike_whatever_its_neighbours_are() -> None:
    # The neighbours decide how much is sorted: nothing, the widest top-k, or everything.
    rng = np.random.default_rng(3)
    neighbours = [
        SamplingParams(temperature=0.0, top_k=2), SamplingParams(temperature=1.0),
        SamplingParams(temperature=1.0, top_k=30), SamplingParams(temperature=0.7, top_p=0.3, min_p=0.2),
    ]
    for _ in range(10):
        params, logits = random_params(rng), random_logits(rng, 40)
        alone = probed(logits[None], [params])[0]
        for neighbour in neighbours:
            both = probed(np.stack([random_logits(rng, 40), logits]), [neighbour, params])
            tells = softmax(logits, params) > 0.0
            assert np.array_equal(both[1] & tells, alone & tells), (params, neighbour)


def test_greedy_and_sampled_rows_with_different_filters_choose_as_if_alone() -> None:
    rng = np.random.default_rng(4)
    for _ in range(20):
        rows = [SamplingParams(), *(random_params(rng) for _ in range(3)), SamplingParams(top_k=2, seed=9)]
        logits, positions = random_logits(rng, 5, 3, 40), rng.integers(0, 1000, (5, 3))
        sampler = Sampler.of(rows)
        noise = sampler.noise(mx.array(positions, mx.int32), 40)
        chosen = np.array(sampler.choose(mx.array(logits), noise))
        for row, params in enumerate(rows):
            for column in range(3):
                one = logits[row, column]
                if params.temperature > 0:
                    key = mx.array([params.seed, int(positions[row, column])], mx.uint32)
                    drawn = one / params.temperature + np.array(mx.random.gumbel((40,), key=key))
                    one = np.where(kept(one, params), drawn, -np.inf)
                assert chosen[row, column] == one.argmax()


def test_bfloat16_logits_are_drawn_from_in_float32() -> None:
    logits = mx.array(random_logits(np.random.default_rng(5), 1, 4, 40)).astype(mx.bfloat16)
    sampler = Sampler.of([SamplingParams(temperature=0.8, top_k=10, top_p=0.9, min_p=0.01)])
    noise = sampler.noise(mx.arange(4, dtype=mx.int32)[None], 40)
    assert mx.array_equal(sampler.choose(logits, noise), sampler.choose(logits.astype(mx.float32), noise)).item()


def chi_square(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    """How many standard deviations Pearson's statistic lies above its mean; infinite for an impossible token."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    possible = probabilities > 0
    if counts[~possible].any():
        return float("inf")
    expected = probabilities[possible] * len(tokens)
    assert expected.min() >= 5  # below that the statistic is not chi-square
    statistic, freedom = ((counts[possible] - expected) ** 2 / expected).sum(), possible.sum() - 1
    return float((statistic - freedom) / np.sqrt(2 * freedom))


FREQUENCY = np.array([2.0, 1.5, 1.2, 1.0, 0.6, 0.3, 0.0, -0.2, -0.5, -1.0, -4.0, -5.0], np.float32)
LIMIT = 6.0  # standard deviations; the seeds are fixed, so this never flickers


@pytest.mark.parametrize("params", [
    SamplingParams(temperature=1.0, top_k=10),
    SamplingParams(temperature=0.7, top_k=6, seed=1),
    SamplingParams(temperature=1.3, top_p=0.8, seed=2),
    SamplingParams(temperature=1.0, min_p=0.1, seed=2**32 - 1),
    SamplingParams(temperature=0.9, top_k=9, top_p=0.9, min_p=0.05, seed=3),
], ids=["top-k", "cool", "hot top-p", "min-p", "all"])
def test_tokens_at_many_positions_follow_the_filtered_softmax(params: SamplingParams) -> None:
    tokens = draws(FREQUENCY, params, 4000)
    assert chi_square(tokens, filtered_softmax(FREQUENCY, params)) < LIMIT


def test_the_frequency_test_would_catch_a_biased_sampler() -> None:
    params = SamplingParams(temperature=1.0, top_k=10)
    fair, rng = filtered_softmax(FREQUENCY, params), np.random.default_rng(6)
    assert chi_square(rng.choice(12, 4000, p=fair), fair) < LIMIT
    cooler = filtered_softmax(FREQUENCY, SamplingParams(temperature=0.85, top_k=10))
    wider = filtered_softmax(FREQUENCY, SamplingParams(temperature=1.0))
    greedy_at_times = 0.9 * fair + 0.1 * np.eye(12)[0]
    for biased in (cooler, wider, greedy_at_times):
        assert chi_square(rng.choice(12, 4000, p=biased), fair) > LIMIT
    # Uniform noise in place of Gumbel noise, a classic slip:
    scaled = np.where(kept(FREQUENCY, params), FREQUENCY, -np.inf)
    assert chi_square((scaled + rng.random((4000, 12))).argmax(-1), fair) > LIMIT


def test_a_drafter_that_thinks_alike_draws_alike() -> None:
    rng, params, count = np.random.default_rng(7), SamplingParams(temperature=1.0, seed=11), 3000
    target = random_logits(rng, 30, scale=1.5)
    for difference, at_least in ((0.2, 0.8), (0.6, 0.5)):
        drafter = target + random_logits(rng, 30, scale=difference)
        p, q = filtered_softmax(target, params), filtered_softmax(drafter, params)
        distance, by_chance = np.abs(p - q).sum() / 2, float(p @ q)
        agree = float((draws(target, params, count) == draws(drafter, params, count)).mean())
        error = 4 * np.sqrt(0.25 / count)
        # Theory of the coupling: at least (1 - d) / (1 + d), and no coupling can do better than 1 - d.
        assert (1 - distance) / (1 + distance) - error <= agree <= 1 - distance + error
        assert agree > at_least > 3 * by_chance
        other_noise = draws(drafter, SamplingParams(temperature=1.0, seed=12), count)
        assert abs(float((draws(target, params, count) == other_noise).mean()) - by_chance) < error


@pytest.mark.parametrize("neighbour", [SamplingParams(temperature=1.0, top_k=5),
                                       SamplingParams(temperature=1.0, top_p=0.9)])
def test_a_row_without_filters_can_draw_its_rarest_token_whoever_is_beside_it(neighbour: SamplingParams) -> None:
    # A float32 running sum of probabilities reaches 1 long before the tail: 1.4e-4 of the mass was cut at 50000 tokens.
    logits, plain = random_logits(np.random.default_rng(0), 2, 20_000), SamplingParams(temperature=1.0)
    rarest = int(logits[1].argmin())
    noise = np.zeros((2, 1, 20_000), np.float32)
    noise[..., rarest] = FORCING
    for rows, scores in (([plain], logits[1:]), ([neighbour, plain], logits)):
        chosen = Sampler.of(rows).choose(mx.array(scores)[:, None], mx.array(noise[-len(rows) :]))
        assert chosen[-1, 0].item() == rarest


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-38, 1e-40, 1e-46])
def test_the_smaller_the_temperature_the_closer_to_greedy_down_to_the_smallest(temperature: float) -> None:
    sampler, logits = Sampler.of([SamplingParams(temperature=temperature)]), mx.array([[[1.0, 20.0, 30.0, 5.0]]])
    assert sampler.choose(logits, sampler.noise(mx.array([[0]], mx.int32), 4)).item() == 2


def test_a_top_k_beyond_any_vocabulary_keeps_everything() -> None:
    logits = random_logits(np.random.default_rng(0), 1, 40)
    assert probed(logits, [SamplingParams(temperature=1.0, top_k=2**40)]).all()


@pytest.mark.parametrize(("size", "count"), [(3 * 2048, 64), (64 * 2048, 64), (2 * 2048, 1500), (5000, 64), (300, 300)])
def test_the_largest_numbers_are_found_block_by_block_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, size: int, count: int
) -> None:
    monkeypatch.setattr(sampler, "is_gpu", lambda: True)
    scores = np.random.default_rng(0).integers(-500, 500, (2, 3, size)).astype(np.float32)  # many are equal
    scores[0, 0, : size - 10] = -np.inf
    scores[1, 1].sort()  # all are in one block
    found = np.sort(np.array(sampler.largest(mx.array(scores), count)), axis=-1)
    assert np.array_equal(found, np.sort(scores, axis=-1)[..., -count:])

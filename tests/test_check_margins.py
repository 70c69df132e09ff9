"""How much logits must change for a token to be drawn: against the sampler itself, on changed logits."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp import demo
from mlx_mtp.check.margins import default_tolerance, least_change
from mlx_mtp.checkpoint.loader import load_target
from mlx_mtp.config import SamplingParams
from mlx_mtp.spec_decode.sampler import Sampler

FILTERS = [{}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.7}]


def drawn(logits: np.ndarray, noise: np.ndarray, sampling: SamplingParams) -> int:
    """What the sampler chooses."""
    return Sampler.of([sampling]).choose(mx.array(logits)[None, None], mx.array(noise)[None, None]).item()


def cases(filters: dict[str, float]) -> list[tuple[np.ndarray, np.ndarray, SamplingParams]]:
    generator = np.random.default_rng(0)
    return [(generator.normal(0, 2, 12).astype(np.float32), generator.gumbel(size=12).astype(np.float32),
             SamplingParams(temperature=float(generator.choice([0.5, 1.0, 2.0])), **filters)) for _ in range(25)]


@pytest.mark.parametrize("filters", FILTERS)
def test_the_drawn_token_needs_no_change_and_others_do(filters: dict[str, float]) -> None:
    for logits, noise, sampling in cases(filters):
        chosen = drawn(logits, noise, sampling)
        assert least_change(logits, noise, sampling, chosen) < 1e-6
        assert all(least_change(logits, noise, sampling, token) > 1e-6 for token in range(12) if token != chosen)


def test_without_filters_it_is_what_the_score_lacks() -> None:
    for logits, noise, sampling in cases({}):
        scores = logits / sampling.temperature + noise
        for token in range(12):
            lacks = (scores.max() - scores[token]) * sampling.temperature
            assert least_change(logits, noise, sampling, token) == pytest.approx(lacks, abs=2e-6, rel=1e-5)


@pytest.mark.parametrize("filters", FILTERS)
def test_no_smaller_change_draws_the_token(filters: dict[str, float]) -> None:
    generator = np.random.default_rng(1)
    met = 0
    for logits, noise, sampling in cases(filters):
        chosen = drawn(logits, noise, sampling)
        for _ in range(30):
            size = generator.uniform(0, 1)
            changed = drawn(logits + size / 2 * generator.choice([-1, 1], 12).astype(np.float32), noise, sampling)
            if changed != chosen:
                met += 1
                assert least_change(logits, noise, sampling, changed) <= size + 1e-5
    assert met > 20


@pytest.mark.parametrize(("filters", "logits", "missing"), [
    ({"top_k": 2}, [5.0, 4.0, 3.99, 0.0], 0.01),
    ({"min_p": math.exp(-1)}, [5.0, 4.5, 3.98, 0.0], 0.02),
    # softmax of the first two is 0.9 : 0.1; the third comes in when the mass before it, 1 - e^-9 or so, falls below.
    ({"top_p": 0.95}, [math.log(0.9), math.log(0.0501), math.log(0.0499), -20.0], None),
])
def test_a_token_at_the_edge_of_a_filter_lacks_little_however_much_its_noise(
    filters: dict[str, float], logits: list[float], missing: float | None
) -> None:
    """Its score would win by far, were it not dropped: the score's lack is infinite, the edge is near."""
    sampling = SamplingParams(temperature=1.0, **filters)
    numbers, noise = np.array(logits, np.float32), np.array([0, 0, 9, 0], np.float32)
    assert drawn(numbers, noise, sampling) != 2
    change = least_change(numbers, noise, sampling, 2)
    assert change < 0.05
    if missing is not None:
        assert change == pytest.approx(missing, rel=1e-3)


def test_the_tolerance_follows_the_dtype_and_the_soft_cap() -> None:
    tolerances = {}
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        target, _ = load_target(demo.TARGET, dtype)
        tolerances[dtype] = default_tolerance(target)
    assert 0 < tolerances[mx.float32] < tolerances[mx.float16] < tolerances[mx.bfloat16] < 1

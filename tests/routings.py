"""Ways in which a router may send tokens to the 16 experts of the tests' mixture, four a token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mlx_mtp.config import ExpertsConfig

HIDDEN = 32
SETTINGS = ExpertsConfig(num_experts=16, top_k=4, intermediate_size=64)
Routing = Callable[[np.random.Generator, int], np.ndarray]


def uniform(rng: np.random.Generator, tokens: int) -> np.ndarray:
    return np.stack([rng.permutation(SETTINGS.num_experts)[: SETTINGS.top_k] for _ in range(tokens)])


def skewed(rng: np.random.Generator, tokens: int) -> np.ndarray:
    odds = 0.5 ** np.arange(SETTINGS.num_experts)
    return np.stack([
        rng.choice(SETTINGS.num_experts, SETTINGS.top_k, replace=False, p=odds / odds.sum()) for _ in range(tokens)
    ])


def all_alike(rng: np.random.Generator, tokens: int) -> np.ndarray:
    """Every token on the same experts, the last one among them; the others stay empty."""
    return np.tile([[15, 3, 0, 7]], (tokens, 1))


def all_on_one(rng: np.random.Generator, tokens: int) -> np.ndarray:
    """Every route of every token on one expert: more than a router does, but a dispatch must not care."""
    return np.full((tokens, SETTINGS.top_k), 5)


ROUTINGS = pytest.mark.parametrize("routing", [uniform, skewed, all_alike, all_on_one])

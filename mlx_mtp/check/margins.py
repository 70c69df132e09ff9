"""Margins: by how much logits must change for a token to be chosen, and how much change rounding can make.

The unit is a logit after the soft-cap, the number that tokens are chosen by, and a change is one of the difference
between two of them. Greedy: the best logit less the token's. Sampled: the best score, noise included, less the
token's, times the temperature, which the logits were divided by. Where top-k, top-p or min-p decide, a token can also
be in or out by a little: see `least_change`.

**How much rounding can change.** One row and K + 1 rows of several requests go through different kernels, which sum in
different orders. The soft-cap bounds a logit by 30, so an error is a number of roundings at that size:

- float32 on CPU: sums of a few thousand products differ by tens of roundings of 30 * 2**-24 = 2e-6. Seen with the
  built-in pair: none with the reference BLAS, whose rows do not know of each other; 1.4e-5 with OpenBLAS.
- bfloat16: a logit near 30 is a multiple of 1/8, so the last rounding alone can part two by 1/4, and ties are common;
  activations are rounded in every layer besides. Rounding all of the built-in pair's to bfloat16 moved its logits by
  up to 0.2; two kernels for the same sums differ by less, but real models are five times as deep.
- float16 has three bits more. Float32 on a GPU may multiply at that precision (TF32).
- Quantized weights are the same numbers in every kernel: what counts is the type of the activations.

A wrong token loses by more: the best of a trained model's logits beats the second by 1 and more in most places, so of
many wrong tokens few can hide, and those that rounding excuses are counted, by size. Yet a fault that moves logits less
than rounding may do is not told from it: of the six in tests/check_plants.py, float32 finds all; bfloat16 with its
tolerance finds five in 16 answers of 24 tokens, and calls the one token that the sixth changed (a ring with too little
slack) a near-tie.
"""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np

from mlx_mtp import device
from mlx_mtp.config import SamplingParams
from mlx_mtp.models.target import Target

# In logits of a model that caps them at 30; see above.
USUAL_CAP = 30.0
TOLERANCES = {mx.float32: 1e-4, mx.float16: 0.06, mx.bfloat16: 0.5}
SMALLEST, LARGEST, HALVINGS = 1e-7, 1e3, 32  # of the search for a margin
MOST_EXPONENT = 700.0  # that a float holds


def default_tolerance(target: Target) -> float:
    """What rounding can explain on this device, in logits."""
    dtype = mx.float16 if target.dtype == mx.float32 and device.is_gpu() else target.dtype
    return TOLERANCES[dtype] * (target.config.text.softcap or USUAL_CAP) / USUAL_CAP


def least_change(logits: np.ndarray, noise: np.ndarray, sampling: SamplingParams, token: int) -> float:
    """The smallest change of differences between logits that can make a filtered draw choose `token`, to a part in 1e8.

    logits, noise: [V]. Infinite if no change could. First order at the edges of the filters.
    """
    scaled = (logits.astype(np.float64) - logits.max()) / sampling.temperature
    change = _Change(scaled, noise.astype(np.float64), sampling, token)
    low, high = math.log(SMALLEST), math.log(LARGEST)
    if not change.can_choose(math.exp(high) / sampling.temperature):
        return math.inf
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if change.can_choose(math.exp(middle) / sampling.temperature):
            high = middle
        else:
            low = middle
    return math.exp(high)


class _Change:
    """Whether `token` can be drawn if any two tempered logits may come closer, or part, by so much.

    scaled: [V] tempered logits, the best at 0. A token *may* be kept if the filters keep it when all changes are in its
    favour, and is *surely* kept if they do when all are against it. The drawn token must be one that may be kept, and
    beat, with the change, all that surely are.
    """

    def __init__(self, scaled: np.ndarray, noise: np.ndarray, sampling: SamplingParams, token: int) -> None:
        self._scaled, self._sampling = scaled, sampling
        self._own, self._scores, self._score = scaled[token], scaled + noise, scaled[token] + noise[token]
        self._sorted = np.sort(scaled)[::-1]
        kept = np.exp(self._sorted)
        kept[sampling.top_k or len(kept) :] = 0.0
        self._mass = np.concatenate([[0.0], np.cumsum(kept / kept.sum())])  # [i]: of the i best among the top k

    def can_choose(self, change: float) -> bool:
        if not self._is_kept(np.array([self._own]), change)[0]:
            return False
        surely = self._is_kept(self._sorted, -change)  # true up to some rank, then false
        if not surely.any():
            return True
        edge = self._sorted[np.count_nonzero(surely) - 1]
        return bool(self._score + change >= self._scores[self._scaled >= edge].max())

    def _is_kept(self, at: np.ndarray, change: float) -> np.ndarray:
        """Whether tokens with tempered logits `at` pass the filters when `change` favours (or, below 0, hurts) them."""
        sampling = self._sampling
        before = np.searchsorted(-self._sorted, -(at + change), side="left" if change >= 0 else "right")
        if change < 0:
            before = before - 1  # that is the token itself
        kept = before < (sampling.top_k or len(self._sorted))
        if sampling.min_p:
            kept &= at + change >= math.log(sampling.min_p)
        if sampling.top_p < 1:
            mass = np.minimum(self._mass[before], 1.0)
            odds = mass * math.exp(min(-change, MOST_EXPONENT)) * (1 - sampling.top_p)
            kept &= (odds < (1 - mass) * sampling.top_p) | (before == 0)
        return kept

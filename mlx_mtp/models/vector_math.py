"""tanh and softmax for float32 on CPU, as chains of products and sums that a compiler makes vector code of.

MLX's own take one number at a time there, 10 to 30 ns each: tanh was a tenth of a verifying pass. Everywhere else they
are MLX's. The coefficients are minimax fits (reweighted least squares on Chebyshev points), lowest power first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import mlx.core as mx

from mlx_mtp.device import is_gpu

# Element-wise chains become one kernel. On a GPU MLX compiles them itself; on CPU it does where there is a C++ compiler
# and runs them one by one where there is none.
fused = partial(mx.compile, shapeless=True)

# tanh(z) = z * P(z^2) / Q(z^2): relative error 2e-8 up to |z| = 9, from where on float32's tanh is 1 or -1.
TANH_P = (0.999999979, 0.133810214, 0.00349558308, 2.06090005e-05, 1.33545521e-08)
TANH_Q = (1.0, 0.46714337, 0.025876963, 0.000328562661, 7.77651259e-07)
TANH_LIMIT = 9
FRACTION_LIMIT = 9.4  # where the fraction is above 1 by two last bits, so that cutting it off there leaves 1

# exp(z) = 2^n * exp(r) with n = round(z / ln 2), exp(r) = 1 + r + r^2 * P(r): relative error 4e-9. n * LN2_HIGH is
# exact, and LN2_LOW the rest of ln 2. Adding ROUNDS and taking it off again rounds.
EXP_P = (0.49999993, 0.1666652, 0.04166839, 0.00836875, 0.00138145)
LN2_HIGH, LN2_LOW = 0.693359375, math.log(2) - 0.693359375
ROUNDS = 1.5 * 2**23
EXPONENT_BITS, EXPONENT_BIAS = 23, 127  # a float32's exponent starts at this bit, and is 0 where this bias is added


def lacks_fast_kernels(x: mx.array) -> bool:
    """Whether this is float32 on CPU, where mx.fast falls back to chains of small operations. The twins are shorter."""
    return x.dtype == mx.float32 and not is_gpu()


def tanh(z: mx.array) -> mx.array:
    """To be called in a fused function."""
    if not lacks_fast_kernels(z):
        return mx.tanh(z)
    x = z * z
    square = x * x
    ratio = z * _quartic(TANH_P, x, square) / _quartic(TANH_Q, x, square)
    return mx.where(z > TANH_LIMIT, 1.0, mx.where(z < -TANH_LIMIT, -1.0, ratio))


def _quartic(coefficients: Sequence[float], x: mx.array, square: mx.array) -> mx.array:
    """A polynomial of degree 4 in this order, since MLX fuses chains of at most 11 operations."""
    a, b, c, d, e = coefficients
    return (a + b * x) + square * ((c + d * x) + e * square)


def scaled_tanh(x: mx.array, scale: mx.array) -> mx.array:
    """scale * tanh(x / scale). For float32 on CPU in three kernels: one would be too deep, and cut where it costs most.

    Nor would a constant where z is large be vector code: the rest would be skipped for it. A sign is not known before.
    """
    if not lacks_fast_kernels(x):
        return _scaled_tanh(x, scale)
    z = _limited_quotient(x, scale)
    return _scaled_fraction(z, *_fraction(z), scale)


@fused
def _scaled_tanh(x: mx.array, scale: mx.array) -> mx.array:
    return mx.tanh(x / scale) * scale


@fused
def _limited_quotient(x: mx.array, scale: mx.array) -> mx.array:
    z = x / scale
    return mx.where(mx.abs(z) > FRACTION_LIMIT, mx.sign(z) * FRACTION_LIMIT, z)


@fused
def _fraction(z: mx.array) -> tuple[mx.array, mx.array]:
    x = mx.square(z)
    square = mx.square(x)
    return _quartic(TANH_P, x, square), _quartic(TANH_Q, x, square)


@fused
def _scaled_fraction(z: mx.array, numerator: mx.array, denominator: mx.array, scale: mx.array) -> mx.array:
    ratio = z * numerator / denominator
    return mx.where(mx.abs(ratio) > 1, mx.sign(ratio), ratio) * scale


def softmax(scores: mx.array) -> mx.array:
    """Over the last axis."""
    if not lacks_fast_kernels(scores):
        return mx.softmax(scores, axis=-1)
    rest, power = _reduce(scores - scores.max(axis=-1, keepdims=True))
    weights = _exp(rest) * power.view(mx.float32)
    return weights / weights.sum(axis=-1, keepdims=True)


@fused
def _reduce(z: mx.array) -> tuple[mx.array, mx.array]:
    """For z <= 0, exp(z) = 2^n * exp(rest): the rest, and 2^n as a float32's bits, those of 0 where it is too small."""
    z = mx.maximum(z, -EXPONENT_BIAS * math.log(2))
    n = (z * math.log2(math.e) + ROUNDS) - ROUNDS
    rest = (z - n * LN2_HIGH) - n * LN2_LOW
    return rest, mx.left_shift(n.astype(mx.int32) + EXPONENT_BIAS, EXPONENT_BITS)


@fused
def _exp(rest: mx.array) -> mx.array:
    a, b, c, d, e = EXP_P
    square = rest * rest
    return (1 + rest) + square * ((a + b * rest) + square * ((c + d * rest) + square * e))

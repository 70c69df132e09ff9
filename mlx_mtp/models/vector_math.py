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

# 2^x = 2^n * E(x - n), n the integer nearest to x: relative error 8e-8. Adding ROUNDS and taking it off again rounds.
POWER_OF_TWO = (1.00000007, 0.69314695, 0.24022122, 0.05550743, 0.00967546, 0.0013267)
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


def softmax(scores: mx.array) -> mx.array:
    """Over the last axis."""
    if not lacks_fast_kernels(scores):
        return mx.softmax(scores, axis=-1)
    rest, exponent = _split_power(scores - scores.max(axis=-1, keepdims=True))
    powers = _power_of_two(rest) * exponent.view(mx.float32)
    return powers / powers.sum(axis=-1, keepdims=True)


@fused
def _split_power(z: mx.array) -> tuple[mx.array, mx.array]:
    """For z <= 0, exp(z) = 2^(n + rest): the rest, and 2^n as the bits of a float32; those of 0 if it is below them."""
    power = mx.maximum(z * math.log2(math.e), -EXPONENT_BIAS)
    n = (power + ROUNDS) - ROUNDS
    return power - n, mx.left_shift(n.astype(mx.int32) + EXPONENT_BIAS, EXPONENT_BITS)


@fused
def _power_of_two(rest: mx.array) -> mx.array:
    a, b, c, d, e, f = POWER_OF_TWO
    return ((((f * rest + e) * rest + d) * rest + c) * rest + b) * rest + a

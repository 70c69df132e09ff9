"""tanh and softmax for float32 on CPU, as chains of products and sums that a compiler makes vector code of.

MLX's own take one number at a time there, 20 to 30 ns each, which was a fifth of a verifying pass. Everywhere else they
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

EXP2 = (1.00000007, 0.69314697, 0.2402212, 0.05550713, 0.00967554, 0.00132765)  # 2^f, |f| <= 1/2: 8e-8
LEAST_EXPONENT = -126.0  # of a normal float32
EXPONENT_BIAS, MANTISSA_BITS = 127, 23


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


def softmax(scores: mx.array) -> mx.array:
    """Over the last axis. A score of minus infinity weighs next to nothing (1e-38) on CPU, and nothing elsewhere.

    For few scores MLX's own would be as fast. But a row's text must not hang on how many rows there are, and the two
    differ in the last bits.
    """
    if not lacks_fast_kernels(scores):
        return mx.softmax(scores, axis=-1)
    fraction, exponent = _exp2_parts(scores, scores.max(axis=-1, keepdims=True))
    weights = _product(fraction, mx.view(exponent, mx.float32))
    return weights / weights.sum(axis=-1, keepdims=True)


@fused
def _exp2_parts(scores: mx.array, best: mx.array) -> tuple[mx.array, mx.array]:
    """e^(scores - best), best the largest, as 2^f and the bits of 2^n for a whole n."""
    power = mx.maximum((scores - best) * math.log2(math.e), LEAST_EXPONENT)
    whole = (power - 0.5).astype(mx.int32)  # to the nearest, since none is above 0
    f = power - whole.astype(mx.float32)
    square = f * f
    return _quartic(EXP2[:5], f, square) + EXP2[5] * f * square * square, (whole + EXPONENT_BIAS) << MANTISSA_BITS


@fused
def _product(a: mx.array, b: mx.array) -> mx.array:
    return a * b


def _quartic(coefficients: Sequence[float], x: mx.array, square: mx.array) -> mx.array:
    """A polynomial of degree 4 in this order, since MLX fuses chains of at most 11 operations."""
    a, b, c, d, e = coefficients
    return (a + b * x) + square * ((c + d * x) + e * square)

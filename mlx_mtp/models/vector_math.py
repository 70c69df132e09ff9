"""tanh for float32 on CPU, as a chain of products and sums that a compiler makes vector code of.

MLX's own takes one number at a time there, 20 to 30 ns each, which was a tenth of a verifying pass. Everywhere else it
is MLX's. The coefficients are a minimax fit (reweighted least squares on Chebyshev points), lowest power first.
"""

from __future__ import annotations

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

"""The small parts every layer is made of: norms, gated MLP, rotary embedding, soft-cap, scaled embedding."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.config import RotaryConfig
from mlx_mtp.models.vector_math import fused, lacks_fast_kernels, scaled_tanh, tanh


@fused
def geglu(gate: mx.array, up: mx.array) -> mx.array:
    """gelu(gate) * up with the tanh approximation ("gelu_pytorch_tanh").

    In half precision 1 + tanh(z) would cancel below zero; half of it is 1 / (1 + exp(-2z)), which does not.
    """
    z = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate * gate * gate)
    if lacks_fast_kernels(gate):
        return 0.5 * gate * up * (1 + tanh(z))
    return gate * up / (1 + mx.exp(-2 * z))


def softcap(logits: mx.array, cap: float | None) -> mx.array:
    """cap * tanh(logits / cap), or the logits themselves where the model has no cap."""
    return logits if cap is None else scaled_tanh(logits, mx.array(cap, logits.dtype))


ONE_KERNEL = 4096  # numbers up to which a norm in one kernel is faster, although it takes the root for each of them


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32 inside."""
    if not lacks_fast_kernels(x):
        return mx.fast.rms_norm(x, weight, eps)
    given = mx.square(x).sum(axis=-1, keepdims=True), mx.array(x.shape[-1], mx.float32), mx.array(eps)
    if x.size > ONE_KERNEL:  # the same bits either way
        factor = _inverse_root(*given)
        return x * factor if weight is None else _scale(x, factor, weight)
    return _normalize(x, *given) if weight is None else _normalize_and_scale(x, weight, *given)


@fused
def _inverse_root(squares: mx.array, width: mx.array, eps: mx.array) -> mx.array:
    return mx.rsqrt(squares / width + eps)


@fused
def _scale(x: mx.array, factor: mx.array, weight: mx.array) -> mx.array:
    return x * factor * weight


@fused
def _normalize(x: mx.array, squares: mx.array, width: mx.array, eps: mx.array) -> mx.array:
    return x * mx.rsqrt(squares / width + eps)


@fused
def _normalize_and_scale(
    x: mx.array, weight: mx.array, squares: mx.array, width: mx.array, eps: mx.array
) -> mx.array:
    return x * mx.rsqrt(squares / width + eps) * weight


class RMSNorm(nn.Module):
    """Root-mean-square norm. The weight is the factor itself, not 1 + weight as in Gemma 1 to 3."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((width,))
        self._eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x, self.weight, self._eps)


class GatedMLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


def rotary_frequencies(config: RotaryConfig) -> mx.array:
    """Periods `theta^(2i / head_dim) * factor` for mx.fast.rope: [head_dim / 2], infinite where nothing turns.

    Source: transformers' "default" and "proportional" rope; the exponent runs over head_dim in both.
    """
    rotated = config.rotated_dims // 2
    exponents = mx.arange(0, config.rotated_dims, 2, dtype=mx.float32) / config.head_dim
    still = mx.full((config.head_dim // 2 - rotated,), float("inf"))
    return mx.concatenate([config.factor * config.theta**exponents, still])


class Rotary:
    """The rotary embedding of one attention kind. Holds no weights."""

    def __init__(self, config: RotaryConfig) -> None:
        self._periods = rotary_frequencies(config)
        mx.eval(self._periods)  # a lazy array could only be used on the thread that made it

    def at(self, offset: mx.array, length: int) -> Turn:
        """Prepares the rotation of `length` tokens a row from position `offset` [B] on, for all layers of a pass."""
        return Turn(self._periods, offset, length)


class Turn:
    """Rotates queries or keys [B, heads, L, head_dim] by their positions; dimension i is paired with i + half.

    Without a fast kernel sines and cosines are computed once, [B, 1, L, 2, half], the sines of the first half negated.
    """

    def __init__(self, periods: mx.array, offset: mx.array, length: int) -> None:
        self._periods, self._offset, self._length = periods, offset, length
        self._tables: tuple[mx.array, mx.array] | None = None

    def __call__(self, x: mx.array) -> mx.array:
        if not lacks_fast_kernels(x):
            return mx.fast.rope(x, x.shape[-1], traditional=False, base=None, scale=1.0, offset=self._offset,
                                freqs=self._periods)
        if self._tables is None:
            self._tables = self._cosines_sines()
        halves = x.reshape(*x.shape[:-1], 2, -1)
        return _rotate(halves, halves[..., ::-1, :], *self._tables).reshape(x.shape)

    def _cosines_sines(self) -> tuple[mx.array, mx.array]:
        positions = (self._offset[:, None] + mx.arange(self._length))[:, None, :, None, None]
        angles = positions.astype(mx.float32) / self._periods
        sines = mx.sin(angles)
        return mx.cos(angles), mx.concatenate([-sines, sines], axis=-2)


@fused
def _rotate(halves: mx.array, swapped: mx.array, cosines: mx.array, sines: mx.array) -> mx.array:
    return halves * cosines + swapped * sines


def embed_scaled(table: nn.Embedding, tokens: mx.array, width: int) -> mx.array:
    """Embedding times sqrt(width): tokens [...] -> [..., width]. Works for plain and quantized tables.

    The scale takes the table's dtype first, as in the reference: sqrt(1536) is 39.25 in bfloat16. (mxfp and nvfp tables
    give bfloat16 whatever the model's dtype is; mlx-lm goes on with that too, so that logits are equal.)
    """
    x = table(tokens)
    return x * mx.array(width**0.5, x.dtype)

"""The small parts agree with their formulas in float64, and each portable twin with MLX's own kernel.

`twins` sends float32 through the portable code on any device, so that a GPU tests it too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_mtp.config import RotaryConfig
from mlx_mtp.models import attention, layers, vector_math
from mlx_mtp.models.attention import Mask, attend
from mlx_mtp.models.layers import (
    GatedMLP,
    RMSNorm,
    Rotary,
    embed_scaled,
    geglu,
    rms_norm,
    rotary_frequencies,
    softcap,
)
from mlx_mtp.models.vector_math import lacks_fast_kernels

EPS = 1e-6
FLOAT64 = np.float64
SLIDING_ROTARY = RotaryConfig(head_dim=32, theta=1e4, rotated_dims=32)
FULL_ROTARY = RotaryConfig(head_dim=64, theta=1e6, rotated_dims=16)
FAR = 100_000


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (layers, attention, vector_math):
        monkeypatch.setattr(module, "lacks_fast_kernels", lambda x: True)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(0, scale, shape), mx.float32)


def exact(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32), FLOAT64)


def assert_close(got: mx.array, expected: Any, tolerance: float = 2e-6) -> None:
    """Within `tolerance` of the largest expected magnitude."""
    expected = exact(expected) if isinstance(expected, mx.array) else expected
    assert got.shape == expected.shape
    assert np.abs(exact(got) - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.usefixtures("twins")
def test_a_row_normed_among_many_keeps_every_bit_that_it_has_alone(has_weight: bool) -> None:
    many = random(64, 512, scale=3.0)
    assert 512 <= layers.ONE_KERNEL < many.size
    weight = random(512, seed=1) if has_weight else None
    together = np.array(rms_norm(many, weight, EPS))
    alone = np.concatenate([np.array(rms_norm(many[i : i + 1], weight, EPS)) for i in range(64)])
    assert np.array_equal(together, alone)


@pytest.mark.parametrize("shape", [(1, 8), (5, 64), (2, 3, 4, 256)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
@pytest.mark.usefixtures("twins")
def test_rms_norm_equals_the_formula_and_mlx_own_kernel(shape: tuple[int, ...], scale: float) -> None:
    x, weight = random(*shape, scale=scale), random(shape[-1], seed=1)
    formula = exact(x) / np.sqrt((exact(x) ** 2).mean(-1, keepdims=True) + EPS)  # at 1e-4 the eps decides
    for factor, expected in ((None, formula), (weight, formula * exact(weight))):
        assert_close(rms_norm(x, factor, EPS), expected)
        assert_close(rms_norm(x, factor, EPS), mx.fast.rms_norm(x, factor, EPS))
    module = RMSNorm(shape[-1], EPS)
    assert_close(module(x), formula)
    module.weight = weight
    assert_close(module(x), formula * exact(weight))  # the weight itself, not 1 + weight


def turned(x: np.ndarray, positions: np.ndarray, config: RotaryConfig) -> np.ndarray:
    """The formula in float64, one pair at a time. x: [B, H, L, d], positions: [B, L]."""
    half, out = config.head_dim // 2, x.copy()
    for i in range(config.rotated_dims // 2):
        period = config.theta ** (2 * i / config.head_dim) * config.factor
        angles = (positions / period)[:, None, :]
        left, right = x[..., i], x[..., i + half]
        out[..., i] = left * np.cos(angles) - right * np.sin(angles)
        out[..., i + half] = right * np.cos(angles) + left * np.sin(angles)
    return out


ROTARIES = pytest.mark.parametrize("config", [
    SLIDING_ROTARY, FULL_ROTARY, RotaryConfig(head_dim=64, theta=1e6, rotated_dims=64, factor=8.0),
], ids=["all dimensions", "a quarter of them", "with a factor"])


@ROTARIES
def test_periods_follow_the_formula_and_are_infinite_where_nothing_turns(config: RotaryConfig) -> None:
    periods, turning = exact(rotary_frequencies(config)), config.rotated_dims // 2
    expected = config.factor * config.theta ** (2 * np.arange(turning) / config.head_dim)
    assert periods.shape == (config.head_dim // 2,)
    assert np.allclose(periods[:turning], expected, rtol=2e-6)
    assert np.isposinf(periods[turning:]).all()


@ROTARIES
@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("offsets", [[0], [3, 0, 200], [FAR, 7]], ids=["one row", "ragged rows", "far"])
@pytest.mark.usefixtures("twins")
def test_rotation_equals_the_formula_and_mlx_own_kernel(config: RotaryConfig, length: int, offsets: list[int]) -> None:
    x, offset = random(len(offsets), 3, length, config.head_dim), mx.array(offsets, mx.int32)
    got = Rotary(config).at(offset, length)(x)
    # An angle of n radians is known to n * 2^-23 in float32, here with a few roundings: 0.05 at 100000, nothing nearby.
    tolerance = 2e-6 + max(offsets) * 4 * 2.0**-23
    assert_close(got, turned(exact(x), np.array(offsets)[:, None] + np.arange(length), config), tolerance)
    kernel = mx.fast.rope(x, config.head_dim, traditional=False, base=None, scale=1.0, offset=offset,
                          freqs=rotary_frequencies(config))
    assert_close(got, kernel, tolerance)


@pytest.mark.usefixtures("twins")
def test_dimensions_that_do_not_turn_come_through_untouched_however_far() -> None:
    x = random(1, 2, 3, 64)
    out = Rotary(FULL_ROTARY).at(mx.array([FAR], mx.int32), 3)(x).reshape(1, 2, 3, 2, 32)
    still = x.reshape(1, 2, 3, 2, 32)
    assert mx.array_equal(out[..., 8:], still[..., 8:]).item()
    assert not mx.array_equal(out[..., :8], still[..., :8]).item()


@pytest.mark.usefixtures("twins")
def test_one_turn_serves_queries_and_keys_of_all_layers() -> None:
    turn = Rotary(SLIDING_ROTARY).at(mx.array([5, 9], mx.int32), 2)
    queries, keys = random(2, 8, 2, 32), random(2, 1, 2, 32, seed=1)
    again = Rotary(SLIDING_ROTARY).at(mx.array([5, 9], mx.int32), 2)
    turn(queries)
    assert mx.array_equal(turn(keys), again(keys)).item()


def softmax_attention(queries: Any, keys: Any, values: Any, seen: np.ndarray) -> np.ndarray:
    """Every query by itself, in float64; query head h reads kv head h * G // H."""
    heads, groups = queries.shape[1], keys.shape[1]
    out = np.zeros(queries.shape)
    for b, h, i in np.ndindex(*queries.shape[:3]):
        keep = seen[b, 0, i]
        key, value = keys[b, h * groups // heads][keep], values[b, h * groups // heads][keep]
        scores = key @ queries[b, h, i]
        weights = np.exp(scores - scores.max())
        out[b, h, i] = weights / weights.sum() @ value
    return out


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (8, 2), (8, 1)])
@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.usefixtures("twins")
def test_attention_equals_the_formula_and_mlx_own_kernel(heads: int, groups: int, length: int) -> None:
    queries = random(2, heads, length, 16)
    keys, values = random(2, groups, 11, 16, seed=1), random(2, groups, 11, 16, seed=2)
    seen = np.random.default_rng(3).random((2, 1, length, 11)) < 0.5
    seen[..., 4] = True  # a query that sees nothing has no answer
    mask = Mask(mx.array(seen))
    for _ in range(2):  # a mask serves several layers: the second use reads what the first prepared
        got = attend(queries, keys, values, mask)
        assert_close(got, softmax_attention(exact(queries), exact(keys), exact(values), seen), 1e-5)
        assert_close(got, mx.fast.scaled_dot_product_attention(queries, keys, values, scale=1.0, mask=mask.seen), 1e-5)


@pytest.mark.usefixtures("twins")
def test_a_mask_serves_layers_with_other_numbers_of_kv_heads_too() -> None:
    queries, mask = random(2, 8, 3, 16), Mask(mx.ones((2, 1, 3, 11), mx.bool_))
    for groups in (2, 4):
        keys, values = random(2, groups, 11, 16, seed=1), random(2, groups, 11, 16, seed=2)
        assert mx.array_equal(attend(queries, keys, values, mask), attend(queries, keys, values, Mask(mask.seen)))


@pytest.mark.usefixtures("twins")
def test_a_masked_key_and_value_change_no_bit() -> None:
    queries, keys, values = random(1, 4, 2, 16), random(1, 2, 6, 16, seed=1), random(1, 2, 6, 16, seed=2)
    seen = mx.array([True, True, False, True, False, True])[None, None, None]
    mask = mx.tile(seen, (1, 1, 2, 1))
    garbage = mx.where(seen.reshape(1, 1, 6, 1), 0.0, 1e4)
    left = attend(queries, keys, values, Mask(mask))
    assert mx.array_equal(left, attend(queries, keys + garbage, values + garbage, Mask(mask))).item()


class Recorded:
    """Stands in for a function, calls it and counts the calls."""

    def __init__(self, function: Callable[..., mx.array]) -> None:
        self._function, self.calls = function, 0

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        self.calls += 1
        return self._function(*args, **kwargs)


@pytest.mark.parametrize(("name", "call"), [
    ("rms_norm", lambda x: rms_norm(x, None, EPS)),
    ("rope", lambda x: Rotary(SLIDING_ROTARY).at(mx.array([3], mx.int32), 2)(x)),
    ("scaled_dot_product_attention", lambda x: attend(x, x, x, Mask(mx.ones((1, 1, 2, 2), mx.bool_)))),
])
def test_bfloat16_goes_through_mlx_own_kernels(
    name: str, call: Callable[[mx.array], mx.array], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Recorded(getattr(mx.fast, name))
    monkeypatch.setattr(mx.fast, name, kernel)
    x = random(1, 2, 2, 32)
    half = call(x.astype(mx.bfloat16))
    assert (half.dtype, kernel.calls) == (mx.bfloat16, 1)
    full = call(x)
    assert kernel.calls == (1 if lacks_fast_kernels(x) else 2)
    assert_close(half, full, 0.03)


def test_geglu_is_the_tanh_gelu_of_the_gate_times_up() -> None:
    gate, up = mx.linspace(-6, 6, 101), random(101)
    assert_close(geglu(gate, up), gelu_tanh(exact(gate)) * exact(up))


def test_softcap_bounds_logits_and_is_nothing_without_a_cap() -> None:
    logits = mx.linspace(-200, 200, 101)
    assert_close(softcap(logits, 30.0), 30 * np.tanh(exact(logits) / 30))
    assert mx.array_equal(softcap(logits, None), logits).item()
    assert softcap(logits.astype(mx.bfloat16), 30.0).dtype == mx.bfloat16


def test_the_gated_mlp_is_down_of_geglu_of_gate_and_up() -> None:
    mlp, x = GatedMLP(32, 48), random(5, 32)
    gate, up, down = (exact(linear.weight).T for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    assert_close(mlp(x), gelu_tanh(exact(x) @ gate) * (exact(x) @ up) @ down)
    assert sorted(mlp.parameters()) == ["down_proj", "gate_proj", "up_proj"]


@pytest.mark.parametrize(("width", "scale"), [(1536, 39.25), (2560, 50.5), (2816, 53.0), (3840, 62.0), (5376, 73.5)])
def test_the_scale_of_embeddings_is_rounded_in_bfloat16(width: int, scale: float) -> None:
    table, tokens = nn.Embedding(4, width), mx.array([[0, 3], [2, 2]])
    plain = table.weight[tokens] * width**0.5
    assert_close(embed_scaled(table, tokens, width), plain)
    table.weight = random(4, width).astype(mx.bfloat16)
    rounded = (table.weight[tokens].astype(mx.float32) * scale).astype(mx.bfloat16)
    assert mx.array_equal(embed_scaled(table, tokens, width), rounded).item()
    table.weight = mx.ones((4, width), mx.bfloat16)
    ones = embed_scaled(table, tokens, width)
    assert mx.array_equal(ones, mx.full((2, 2, width), scale, mx.bfloat16)).item()


def test_a_quantized_table_embeds_what_it_dequantizes_to() -> None:
    table = nn.Embedding(8, 64)
    quantized = nn.QuantizedEmbedding.from_embedding(table, group_size=32, bits=8)
    tokens = mx.array([5, 0, 7])
    plain = mx.dequantize(quantized.weight, quantized.scales, quantized.biases, group_size=32, bits=8)
    assert_close(embed_scaled(quantized, tokens, 64), exact(plain[tokens]) * 8)

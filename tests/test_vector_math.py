"""tanh and softmax agree with float64 to the last bits of float32, also where they are flat, and at the ends."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.models import vector_math
from mlx_mtp.models.layers import geglu, softcap
from mlx_mtp.models.vector_math import lacks_fast_kernels, scaled_tanh, softmax, tanh

INFINITY = math.inf


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vector_math, "lacks_fast_kernels", lambda x: True)


def exact(x: mx.array) -> np.ndarray:
    return np.array(x, np.float64)


def test_only_float32_on_cpu_lacks_fast_kernels() -> None:
    on_cpu = mx.default_device().type == mx.DeviceType.cpu
    assert lacks_fast_kernels(mx.zeros(1)) == on_cpu
    assert not lacks_fast_kernels(mx.zeros(1, mx.bfloat16))
    assert not lacks_fast_kernels(mx.zeros(1, mx.float16))


@pytest.mark.usefixtures("twins")
def test_tanh_is_right_to_the_last_bits_and_exact_where_it_is_flat() -> None:
    z = mx.linspace(-12, 12, 100_001)
    expected = np.tanh(exact(z))
    assert (np.abs(exact(tanh(z)) - expected) <= 4e-7 * np.abs(expected)).all()
    ends = tanh(mx.array([-INFINITY, -1e30, -9.5, 0.0, 9.5, 1e30, INFINITY, math.nan]))
    assert ends.tolist()[:-1] == [-1, -1, -1, 0, 1, 1, 1]
    assert mx.isnan(ends[-1]).item()


@pytest.mark.usefixtures("twins")
def test_scaled_tanh_is_right_to_the_last_bits_and_exact_where_it_is_flat() -> None:
    x = mx.linspace(-360, 360, 100_001)
    expected = 30 * np.tanh(exact(x) / 30)
    got = exact(scaled_tanh(x, mx.array(30.0)))
    assert (np.abs(got - expected) <= 5e-7 * np.abs(expected)).all()
    assert (np.abs(got) <= 30).all()
    ends = scaled_tanh(mx.array([-INFINITY, -1e30, -283, 0.0, 283, 1e30, INFINITY, math.nan]), mx.array(30.0))
    assert ends.tolist()[:-1] == [-30, -30, -30, 0, 30, 30, 30]
    assert mx.isnan(ends[-1]).item()


def test_scaled_tanh_is_the_same_where_mlx_has_it_in_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x = mx.linspace(-90, 90, 1001)
    monkeypatch.setattr(vector_math, "lacks_fast_kernels", lambda x: False)
    assert np.abs(exact(scaled_tanh(x, mx.array(30.0))) - 30 * np.tanh(exact(x) / 30)).max() <= 1e-5


@pytest.mark.usefixtures("twins")
def test_softmax_is_right_to_the_last_bits() -> None:
    depth = mx.linspace(0, -80, 20_001)  # beside a score that is never far below the best
    scores = mx.stack([mx.zeros(depth.shape), depth], axis=-1) + 7.25
    expected = np.exp(exact(scores) - 7.25)
    expected /= expected.sum(axis=-1, keepdims=True)
    error = np.abs(exact(softmax(scores)) - expected)
    assert error.max() <= 2e-7
    # What a score far below the best is off by grows with its own last bit; that of a weight at 1e-35 is 1e-41.
    assert (error <= (2e-7 + 1e-7 * np.abs(exact(depth)))[:, None] * expected).all()


@pytest.mark.usefixtures("twins")
def test_softmax_gives_what_is_hidden_nothing() -> None:
    scores = mx.array([[-INFINITY, 3.0, -INFINITY, 3.0], [-200.0, 0.0, -88.5, -INFINITY], [5.0, -INFINITY, -1e30, 5.0]])
    assert softmax(scores).tolist() == [[0, 0.5, 0, 0.5], [0, 1, 0, 0], [0.5, 0, 0, 0.5]]
    nowhere = softmax(mx.array([[-INFINITY, -INFINITY], [math.nan, 0.0]]))
    assert mx.isnan(nowhere).all().item()  # as MLX's own


@pytest.mark.usefixtures("twins")
def test_softmax_sums_to_one_over_many() -> None:
    scores = mx.array(np.random.default_rng(0).normal(0, 3, (2, 3, 5000)), mx.float32)
    weights = exact(softmax(scores))
    assert np.abs(weights.sum(axis=-1) - 1).max() <= 1e-5
    expected = np.exp(exact(scores))
    assert np.abs(weights / (expected / expected.sum(axis=-1, keepdims=True)) - 1).max() <= 1e-5


def test_a_gate_far_below_zero_lets_nothing_through() -> None:
    huge = mx.array([-1e4, 1e4])
    assert geglu(huge, mx.ones(2)).tolist() == [0, 1e4]
    assert softcap(huge, 30.0).tolist() == [-30, 30]

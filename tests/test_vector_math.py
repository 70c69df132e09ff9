"""tanh agrees with float64 to the last bits of float32, also where it is flat, and at the ends."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.models import vector_math
from mlx_mtp.models.layers import geglu, softcap
from mlx_mtp.models.vector_math import lacks_fast_kernels, tanh

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


def test_a_gate_far_below_zero_lets_nothing_through() -> None:
    huge = mx.array([-1e4, 1e4])
    assert geglu(huge, mx.ones(2)).tolist() == [0, 1e4]
    assert softcap(huge, 30.0).tolist() == [-30, 30]

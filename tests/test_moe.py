"""Experts give what a dense loop over all of them gives, however tokens are routed, sorted or not, quantized or not."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from routings import HIDDEN, ROUTINGS, SETTINGS, Routing, uniform

from mlx_mtp.models import moe
from mlx_mtp.models.expert_dispatch import GATHER, SORTED, default_plan
from mlx_mtp.models.moe import ExpertLinear, Experts, QuantizedExpertLinear, Router

EPS = 1e-6
COUNTS = [1, 2, 3, 7, 8, 16, 17, 40, 200]  # by the default plan the first are not sorted
Matrices = tuple[np.ndarray, np.ndarray, np.ndarray]


def exact(x: mx.array) -> np.ndarray:
    return np.array(x, np.float64)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def dense(x: np.ndarray, matrices: Matrices, weight_of: np.ndarray) -> np.ndarray:
    """Runs every token through every expert. x: [N, D], matrices [E, out, in], weight_of: [N, E], 0 if not chosen."""
    gate, up, down = matrices
    out = np.zeros_like(x)
    for expert in range(gate.shape[0]):
        hidden = gelu_tanh(x @ gate[expert].T) * (x @ up[expert].T)
        out += weight_of[:, expert, None] * (hidden @ down[expert].T)
    return out


def plain_matrices(experts: Experts) -> Matrices:
    glu = experts.switch_glu
    return exact(glu.gate_proj.weight), exact(glu.up_proj.weight), exact(glu.down_proj.weight)


def routed(routing: Routing, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(chosen [N, top_k], weights [N, top_k], the same weights for each expert [N, E])."""
    rng = np.random.default_rng(tokens)
    chosen, weights = routing(rng, tokens), rng.random((tokens, SETTINGS.top_k)).astype(np.float32)
    weight_of = np.zeros((tokens, SETTINGS.num_experts))
    for token, slot in np.ndindex(*chosen.shape):
        weight_of[token, chosen[token, slot]] += weights[token, slot]
    return chosen, weights, weight_of


def assert_equals_dense(experts: Experts, matrices: Matrices, routing: Routing, tokens: int, tolerance: float) -> None:
    chosen, weights, weight_of = routed(routing, tokens)
    x = np.random.default_rng(0).normal(size=(tokens, HIDDEN)).astype(np.float32)
    got = experts(mx.array(x), mx.array(chosen, mx.uint32), mx.array(weights))
    expected = dense(x.astype(np.float64), matrices, weight_of)
    assert got.shape == (tokens, HIDDEN)
    assert np.abs(exact(got) - expected).max() <= tolerance * np.abs(expected).max()


def test_the_counts_above_lie_on_both_sides_of_sorting() -> None:
    assert {default_plan().strategy(count * SETTINGS.top_k) for count in COUNTS} == {GATHER, SORTED}


@ROUTINGS
@pytest.mark.parametrize("tokens", COUNTS)
def test_experts_equal_a_dense_loop_over_all_of_them(routing: Routing, tokens: int) -> None:
    mx.random.seed(0)
    experts = Experts(HIDDEN, SETTINGS)
    assert_equals_dense(experts, plain_matrices(experts), routing, tokens, 2e-6)


def test_a_gpus_way_of_adding_up_equals_a_dense_loop_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "lacks_fast_kernels", lambda x: False)
    mx.random.seed(0)
    experts = Experts(HIDDEN, SETTINGS)
    assert_equals_dense(experts, plain_matrices(experts), uniform, 5, 2e-6)


@ROUTINGS
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 15, 16, 100])
def test_quantized_experts_equal_a_dense_loop_over_what_they_dequantize_to(
    routing: Routing, bits: int, tokens: int
) -> None:
    mx.random.seed(0)
    experts = Experts(HIDDEN, SETTINGS)
    plain = plain_matrices(experts)
    nn.quantize(experts, group_size=32, bits=bits)
    matrices = []
    for name in ("gate_proj", "up_proj", "down_proj"):
        linear = experts.switch_glu[name]
        assert isinstance(linear, QuantizedExpertLinear)
        matrices.append(exact(mx.dequantize(linear.weight, linear.scales, linear.biases, group_size=32, bits=bits)))
    gate, up, down = matrices
    assert not np.allclose(gate, plain[0], atol=1e-5)  # quantizing did something
    assert_equals_dense(experts, (gate, up, down), routing, tokens, 5e-6)


def test_a_quantized_matrix_keeps_its_format_and_is_not_trained() -> None:
    quantized = ExpertLinear(4, 64, 32).to_quantized(32, 4)
    assert (quantized.group_size, quantized.bits, quantized.mode) == (32, 4, "affine")
    assert quantized.weight.shape == (4, 32, 8)
    assert quantized.scales.shape == quantized.biases.shape == (4, 32, 2)
    assert quantized.trainable_parameters() == {}


def router(seed: int = 0) -> Router:
    """A router with nothing at its neutral value."""
    mx.random.seed(seed)
    made = Router(HIDDEN, SETTINGS, EPS)
    made.scale = mx.random.uniform(0.5, 2.0, (HIDDEN,))
    made.per_expert_scale = mx.random.uniform(0.5, 2.0, (SETTINGS.num_experts,))
    made.proj.weight = mx.random.normal((SETTINGS.num_experts, HIDDEN))
    return made


def routed_densely(made: Router, x: np.ndarray) -> np.ndarray:
    """The reference's order: softmax over all experts, the best top_k of it, renormalised, scaled -> [N, E]."""
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * exact(made.scale) * HIDDEN**-0.5
    scores = normed @ exact(made.proj.weight).T
    probabilities = np.exp(scores - scores.max(-1, keepdims=True))
    probabilities /= probabilities.sum(-1, keepdims=True)
    weight_of = np.zeros_like(probabilities)
    for token, row in enumerate(probabilities):
        best = np.argsort(-row)[: SETTINGS.top_k]
        weight_of[token, best] = row[best] / row[best].sum() * exact(made.per_expert_scale)[best]
    return weight_of


@pytest.mark.parametrize("tokens", [1, 5, 200])
def test_the_router_weighs_as_a_softmax_over_all_experts_renormalised_and_scaled(tokens: int) -> None:
    made, x = router(), np.random.default_rng(tokens).normal(size=(tokens, HIDDEN)).astype(np.float32)
    chosen, weights = made(mx.array(x))
    assert chosen.shape == weights.shape == (tokens, SETTINGS.top_k)
    assert chosen.dtype == mx.uint32
    got = np.zeros((tokens, SETTINGS.num_experts))
    np.put_along_axis(got, np.array(chosen).astype(np.int64), exact(weights), axis=1)
    assert (np.count_nonzero(got, axis=1) == SETTINGS.top_k).all()  # no expert twice
    assert np.abs(got - routed_densely(made, x.astype(np.float64))).max() < 1e-5


@pytest.mark.parametrize("tokens", [1, 9, 60])
def test_router_and_experts_together_equal_the_dense_mixture(tokens: int) -> None:
    made, experts = router(1), Experts(HIDDEN, SETTINGS)
    x = np.random.default_rng(tokens).normal(size=(tokens, HIDDEN)).astype(np.float32)
    got = exact(experts(mx.array(x), *made(mx.array(x))))
    wide = x.astype(np.float64)
    expected = dense(wide, plain_matrices(experts), routed_densely(made, wide))
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_weights_do_not_widen_the_activations() -> None:
    # On CPU gather_mm is float32 only, so bfloat16 goes through quantized experts.
    experts = Experts(HIDDEN, SETTINGS)
    nn.quantize(experts, group_size=32, bits=8)
    experts.set_dtype(mx.bfloat16)
    chosen, weights, _ = routed(uniform, 3)
    x = mx.ones((3, HIDDEN), mx.bfloat16)
    assert experts(x, mx.array(chosen, mx.uint32), mx.array(weights)).dtype == mx.bfloat16

"""Mixture of experts: a router and the expert MLPs it sends each token to."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.config import ExpertsConfig
from mlx_mtp.models.layers import geglu, rms_norm

# Sorting lets neighbouring rows share an expert's weights; below this many routes it costs more than it saves.
SORT_FROM_ROUTES = 64


class Router(nn.Module):
    """Chooses `top_k` experts a token: softmax over the chosen scores, times a learned scale of each expert."""

    def __init__(self, hidden_size: int, experts: ExpertsConfig, eps: float) -> None:
        super().__init__()
        self.proj = nn.Linear(hidden_size, experts.num_experts, bias=False)
        self.scale = mx.ones((hidden_size,))
        self.per_expert_scale = mx.ones((experts.num_experts,))
        self._top_k, self._eps, self._root = experts.top_k, eps, hidden_size**-0.5

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x: [N, D] -> expert indices [N, top_k] (uint32) and their weights [N, top_k]."""
        scores = self.proj(rms_norm(x, self.scale * self._root, self._eps))
        chosen = mx.argpartition(-scores, kth=self._top_k - 1, axis=-1)[:, : self._top_k]
        weights = mx.softmax(mx.take_along_axis(scores, chosen, axis=-1), axis=-1, precise=True)
        return chosen, weights * self.per_expert_scale[chosen]


class ExpertLinear(nn.Module):
    """One matrix an expert: weight [E, out, in]."""

    def __init__(self, num_experts: int, in_dims: int, out_dims: int) -> None:
        super().__init__()
        scale = math.sqrt(1 / in_dims)
        self.weight = mx.random.uniform(-scale, scale, (num_experts, out_dims, in_dims))

    def __call__(self, x: mx.array, experts: mx.array, sorted_experts: bool) -> mx.array:
        """x: [routes, 1, in], experts: [routes] -> [routes, 1, out]."""
        return mx.gather_mm(x, self.weight.swapaxes(-1, -2), rhs_indices=experts, sorted_indices=sorted_experts)

    def to_quantized(self, group_size: int, bits: int, mode: str = "affine", **_: object) -> QuantizedExpertLinear:
        """mlx.nn.quantize calls this."""
        return QuantizedExpertLinear(self.weight, group_size, bits, mode)


class QuantizedExpertLinear(nn.Module):
    """ExpertLinear with weights in `bits`, scales [E, out, in / group_size], biases likewise in affine mode."""

    def __init__(self, weight: mx.array, group_size: int, bits: int, mode: str) -> None:
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.weight, self.scales, *biases = mx.quantize(weight, group_size, bits, mode=mode)
        if biases:
            self.biases = biases[0]
        self.freeze()

    def __call__(self, x: mx.array, experts: mx.array, sorted_experts: bool) -> mx.array:
        """x: [routes, 1, in], experts: [routes] -> [routes, 1, out]."""
        return mx.gather_qmm(
            x, self.weight, self.scales, self.get("biases"), rhs_indices=experts, transpose=True,
            group_size=self.group_size, bits=self.bits, mode=self.mode, sorted_indices=sorted_experts,
        )


class SwitchGLU(nn.Module):
    """The experts' gated MLPs. The names are mlx-lm's, since they are part of the checkpoint format."""

    def __init__(self, hidden_size: int, experts: ExpertsConfig) -> None:
        super().__init__()
        count, width = experts.num_experts, experts.intermediate_size
        self.gate_proj = ExpertLinear(count, hidden_size, width)
        self.up_proj = ExpertLinear(count, hidden_size, width)
        self.down_proj = ExpertLinear(count, width, hidden_size)

    def __call__(self, x: mx.array, experts: mx.array) -> mx.array:
        """x: [N, D], experts: [N, top_k] -> [N, top_k, D], each route's expert applied to its token."""
        tokens, top_k = experts.shape
        routes, flat = mx.repeat(mx.arange(tokens), top_k), experts.flatten()
        if is_sorted := flat.size >= SORT_FROM_ROUTES:
            order = mx.argsort(flat)
            routes, flat = routes[order], flat[order]
        rows = x[routes][:, None]
        hidden = geglu(self.gate_proj(rows, flat, is_sorted), self.up_proj(rows, flat, is_sorted))
        out = self.down_proj(hidden, flat, is_sorted)[:, 0]
        if is_sorted:
            out = out[mx.argsort(order)]
        return out.reshape(tokens, top_k, -1)


class Experts(nn.Module):
    def __init__(self, hidden_size: int, experts: ExpertsConfig) -> None:
        super().__init__()
        self.switch_glu = SwitchGLU(hidden_size, experts)

    def __call__(self, x: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
        """x: [N, D], chosen and weights: [N, top_k] -> [N, D], the weighted sum of the chosen experts' outputs."""
        return (self.switch_glu(x, chosen) * weights[..., None].astype(x.dtype)).sum(axis=1)

"""Mixture of experts: a router and the expert MLPs it sends each token to."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.config import ExpertsConfig
from mlx_mtp.models.expert_dispatch import DispatchPlan, ExpertMLP, default_plan, dispatch
from mlx_mtp.models.expert_kernel import PackedMatrix, pack, pack_quantized
from mlx_mtp.models.expert_statistics import RoutingCounter, Uncounted
from mlx_mtp.models.layers import rms_norm
from mlx_mtp.models.vector_math import lacks_fast_kernels


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
        """x: [n or 1, rows, in], experts: [n] -> [n, rows, out]."""
        return mx.gather_mm(x, self.weight.swapaxes(-1, -2), rhs_indices=experts, sorted_indices=sorted_experts)

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]

    def packed(self) -> PackedMatrix | None:
        """The matrices as the kernel reads them, or None if it cannot."""
        return pack(self.weight)

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
        """x: [n or 1, rows, in], experts: [n] -> [n, rows, out]."""
        return mx.gather_qmm(
            x, self.weight, self.scales, self.get("biases"), rhs_indices=experts, transpose=True,
            group_size=self.group_size, bits=self.bits, mode=self.mode, sorted_indices=sorted_experts,
        )

    @property
    def num_experts(self) -> int:
        return self.weight.shape[0]

    def packed(self) -> PackedMatrix | None:
        """The matrices as the kernel reads them, or None if it cannot."""
        biases = self.get("biases")
        return pack_quantized(self.weight, self.scales, biases, self.bits, self.group_size)


class SwitchGLU(nn.Module):
    """The experts' gated MLPs. The names are mlx-lm's, since they are part of the checkpoint format.

    Gate and up stay two arrays: one of both would have to be a copy, and measured no faster on CPU. The kernel reads
    both in one go as they are.
    """

    def __init__(self, hidden_size: int, experts: ExpertsConfig) -> None:
        super().__init__()
        count, width = experts.num_experts, experts.intermediate_size
        self.gate_proj = ExpertLinear(count, hidden_size, width)
        self.up_proj = ExpertLinear(count, hidden_size, width)
        self.down_proj = ExpertLinear(count, width, hidden_size)
        self._plan = default_plan()
        self._counter: RoutingCounter = Uncounted()

    @property
    def plan(self) -> DispatchPlan:
        return self._plan

    @property
    def mlp(self) -> ExpertMLP:
        return ExpertMLP(self.gate_proj, self.up_proj, self.down_proj)

    def use_dispatch(self, plan: DispatchPlan) -> None:
        """From now on routes go to their experts by this plan."""
        self._plan = plan

    def count_routing(self, counter: RoutingCounter) -> None:
        """From now on this counter is told of every pass."""
        self._counter = counter

    def __call__(self, x: mx.array, experts: mx.array) -> mx.array:
        """x: [N, D], experts: [N, top_k] -> [N, top_k, D], each route's expert applied to its token."""
        self._counter.add(experts)
        return dispatch(self._plan.strategy(experts.size), x, experts, self.mlp)


class Experts(nn.Module):
    def __init__(self, hidden_size: int, experts: ExpertsConfig) -> None:
        super().__init__()
        self.switch_glu = SwitchGLU(hidden_size, experts)

    def __call__(self, x: mx.array, chosen: mx.array, weights: mx.array) -> mx.array:
        """x: [N, D], chosen and weights: [N, top_k] -> [N, D], the weighted sum of the chosen experts' outputs."""
        out, weights = self.switch_glu(x, chosen), weights.astype(x.dtype)
        if lacks_fast_kernels(x):
            return (weights[:, None] @ out)[:, 0]  # a product's sum takes a fourth of the time
        return (out * weights[..., None]).sum(axis=1)

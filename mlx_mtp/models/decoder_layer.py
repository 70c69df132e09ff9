"""One Gemma 4 decoder layer: what the target's and the drafter's layers have in common is all of it."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.config import TextConfig
from mlx_mtp.models.attention import Attention
from mlx_mtp.models.layers import GatedMLP, RMSNorm, geglu
from mlx_mtp.models.moe import Experts, Router


class DecoderLayer(nn.Module):
    """Attention, MLP (with experts beside it in a mixture), per-layer input, layer scalar.

    There is no single call, since attention needs K/V from outside in between: the caller norms the input with
    `input_layernorm`, runs `self_attn` on it, and hands the result to `finish`.
    """

    def __init__(self, config: TextConfig, index: int, owns_kv: bool) -> None:
        super().__init__()
        layer, hidden, eps = config.layers[index], config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, layer, owns_kv)
        self.mlp = GatedMLP(hidden, layer.intermediate_size)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.pre_feedforward_layernorm = RMSNorm(hidden, eps)
        self.post_feedforward_layernorm = RMSNorm(hidden, eps)
        self.layer_scalar = mx.ones((1,))
        self._is_mixture = config.experts is not None
        if config.experts is not None:
            self.router = Router(hidden, config.experts, eps)
            self.experts = Experts(hidden, config.experts)
            self.pre_feedforward_layernorm_2 = RMSNorm(hidden, eps)
            self.post_feedforward_layernorm_1 = RMSNorm(hidden, eps)
            self.post_feedforward_layernorm_2 = RMSNorm(hidden, eps)
        if config.per_layer_input is not None:
            width = config.per_layer_input.width
            self.per_layer_input_gate = nn.Linear(hidden, width, bias=False)
            self.per_layer_projection = nn.Linear(width, hidden, bias=False)
            self.post_per_layer_input_norm = RMSNorm(hidden, eps)

    def finish(self, residual: mx.array, attended: mx.array, per_layer_input: mx.array | None) -> mx.array:
        """Everything after attention.

        residual: [N, D], the layer's input; attended: [N, D], attention's output;
        per_layer_input: [N, width] or None -> [N, D].
        """
        x = residual + self.post_attention_layernorm(attended)
        x = x + self.post_feedforward_layernorm(self._feed_forward(x))
        if per_layer_input is not None:
            gated = geglu(self.per_layer_input_gate(x), per_layer_input)
            x = x + self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return x * self.layer_scalar

    def _feed_forward(self, x: mx.array) -> mx.array:
        dense = self.mlp(self.pre_feedforward_layernorm(x))
        if not self._is_mixture:
            return dense
        chosen, weights = self.router(x)  # the router reads the residual itself; only the experts get a norm
        sparse = self.experts(self.pre_feedforward_layernorm_2(x), chosen, weights)
        return self.post_feedforward_layernorm_1(dense) + self.post_feedforward_layernorm_2(sparse)

"""The Gemma 4 text decoder.

It does not own a cache: each pass is handed a `Stage`, where new keys and values are put and from where the ones to
attend to come back. `kv_cache.CacheStage` is one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.config import SLIDING, AttentionKind, TargetConfig
from mlx_mtp.models.attention import Mask
from mlx_mtp.models.decoder_layer import DecoderLayer
from mlx_mtp.models.layers import RMSNorm, Rotary, embed_scaled, softcap
from mlx_mtp.models.masks import target_mask


class Stage(Protocol):
    """The cache's side of one target pass over L new tokens a row."""

    @property
    def positions(self) -> mx.array:
        """[B, L] int32, the positions of the new tokens."""

    def key_positions(self, kind: AttentionKind) -> mx.array:
        """[B or 1, S] int32, the position that each key returned by `put` stands at; negative: nothing there."""

    def put(self, layer: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Stages [B, kv heads, L, head_dim] of a layer; returns all K/V to attend to, [B, kv heads, S, head_dim]."""


class Target(nn.Module):
    """tokens -> hidden states; `logits` is separate, so that prefill can run the head on one position only."""

    def __init__(self, config: TargetConfig) -> None:
        super().__init__()
        text = config.text
        self.config = config
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = [DecoderLayer(text, i, layer.kv_source == i) for i, layer in enumerate(text.layers)]
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        if (ple := text.per_layer_input) is not None:
            packed = len(text.layers) * ple.width
            self.embed_tokens_per_layer = nn.Embedding(ple.vocab_size, packed)
            self.per_layer_model_projection = nn.Linear(text.hidden_size, packed, bias=False)
            self.per_layer_projection_norm = RMSNorm(ple.width, text.rms_norm_eps)
        self._suppressed: mx.array | None = None  # [V], true for tokens that are never to be generated
        self._last_owner = max(text.donors.values())
        self._rotary = {kind: Rotary(rotary) for kind, rotary in text.rotary.items()}

    def embed(self, tokens: mx.array) -> mx.array:
        """Scaled embeddings: tokens [...] -> [..., D]. The drafter reads the same."""
        return embed_scaled(self.embed_tokens, tokens, self.config.text.hidden_size)

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of activations, and so of keys and values."""
        return self.norm.weight.dtype

    def __call__(self, tokens: mx.array, stage: Stage, keep: mx.array | None = None) -> mx.array:
        """One pass over L tokens a row: [B, L] -> hidden states after the final norm, [B, L, D].

        keep: [B] int32 asks for one position a row only, [B, 1, D]: all K/V are staged, but what comes after the last
        layer that owns K/V runs on the kept position alone. On E2B and E4B that is about half of a prefill.
        """
        text, (batch, length) = self.config.text, tokens.shape
        seen = {
            kind: target_mask(stage.positions, stage.key_positions(kind), text.window if kind == SLIDING else None)
            for kind in self._rotary
        }
        masks = {kind: Mask(array) for kind, array in seen.items()}
        turns = {kind: rotary.at(stage.positions[:, 0], length) for kind, rotary in self._rotary.items()}
        x = self.embed(tokens.reshape(-1))
        per_layer = self._per_layer_inputs(tokens.reshape(-1), x)
        shared: dict[int, tuple[mx.array, mx.array]] = {}
        for i, (layer, settings) in enumerate(zip(self.layers, text.layers, strict=True)):
            normed = layer.input_layernorm(x)
            if settings.kv_source == i:
                shared[i] = stage.put(i, *layer.self_attn.keys_values(normed, batch, turns[settings.kind]))
            if i == self._last_owner and keep is not None:
                kept = mx.arange(batch) * length + keep
                x, normed = x[kept], normed[kept]
                per_layer = [None if one is None else one[kept] for one in per_layer]
                at = keep[:, None, None, None]
                masks = {kind: Mask(mx.take_along_axis(array, at, axis=2)) for kind, array in seen.items()}
                turns = {kind: rotary.at(stage.positions[:, 0] + keep, 1) for kind, rotary in self._rotary.items()}
            attended = layer.self_attn(normed, *shared[settings.kv_source], masks[settings.kind], turns[settings.kind])
            x = layer.finish(x, attended, per_layer[i])
        return self.norm(x).reshape(batch, -1, text.hidden_size)

    def logits(self, hidden: mx.array) -> mx.array:
        """Soft-capped logits of the tied head: [..., D] -> [..., V]."""
        return softcap(self.embed_tokens.as_linear(hidden), self.config.text.softcap)

    def suppress(self, tokens: Sequence[int]) -> None:
        """From now on `choice_logits` rules these tokens out."""
        ids = mx.arange(self.config.text.vocab_size)
        self._suppressed = (ids[:, None] == mx.array(list(tokens), mx.int32)).any(axis=-1) if tokens else None
        mx.eval(self._suppressed)  # on this thread, whoever decodes

    def choice_logits(self, hidden: mx.array) -> mx.array:
        """What tokens are chosen by: `logits`, with those that are never to be generated at minus infinity."""
        logits = self.logits(hidden)
        return logits if self._suppressed is None else mx.where(self._suppressed, -math.inf, logits)

    def _per_layer_inputs(self, tokens: mx.array, x: mx.array) -> Sequence[mx.array | None]:
        """PLE: what each layer gets beside the residual stream, from the token's identity and from its embedding.

        tokens: [N], x: their scaled embeddings [N, D] -> for each layer [N, width], or None without PLE.
        """
        text = self.config.text
        if text.per_layer_input is None:
            return [None] * len(text.layers)
        width = text.per_layer_input.width
        shape = (*tokens.shape, len(text.layers), width)
        identity = embed_scaled(self.embed_tokens_per_layer, tokens, width).reshape(shape)
        context = (self.per_layer_model_projection(x) * text.hidden_size**-0.5).reshape(shape)
        inputs = (self.per_layer_projection_norm(context) + identity) * 2.0**-0.5
        return [inputs[:, i] for i in range(len(text.layers))]

"""The Gemma 4 text decoder.

It does not own a cache: each pass is handed a `Stage`, where new keys and values are put and from where the ones to
attend to come back. `kv_cache.Stage` is one; the tests' full-history oracle is another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.config import ATTENTION_KINDS, SLIDING, AttentionKind, TargetConfig
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
        self._last_owner = max(text.donors.values())
        self._rotary = {kind: Rotary(rotary) for kind, rotary in text.rotary.items()}

    def embed(self, tokens: mx.array) -> mx.array:
        """Scaled embeddings: tokens [B, L] -> [B, L, D]. The drafter reads the same."""
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
        text = self.config.text
        x = self.embed(tokens)
        per_layer = self._per_layer_inputs(tokens, x)
        offset = stage.positions[:, 0]
        masks = {
            kind: target_mask(stage.positions, stage.key_positions(kind), text.window if kind == SLIDING else None)
            for kind in ATTENTION_KINDS if kind in text.rotary
        }
        shared: dict[int, tuple[mx.array, mx.array]] = {}
        for i, (layer, settings) in enumerate(zip(self.layers, text.layers, strict=True)):
            rotary, normed = self._rotary[settings.kind], layer.input_layernorm(x)
            if settings.kv_source == i:
                shared[i] = stage.put(i, *layer.self_attn.keys_values(normed, rotary, offset))
            if i == self._last_owner and keep is not None:
                x, normed = _at(x, keep, axis=1), _at(normed, keep, axis=1)
                per_layer = [None if one is None else _at(one, keep, axis=1) for one in per_layer]
                masks = {kind: _at(mask, keep, axis=2) for kind, mask in masks.items()}
                offset = offset + keep
            attended = layer.self_attn(normed, *shared[settings.kv_source], masks[settings.kind], rotary, offset)
            x = layer.finish(x, attended, per_layer[i])
        return self.norm(x)

    def logits(self, hidden: mx.array) -> mx.array:
        """Soft-capped logits of the tied head: [..., D] -> [..., V]."""
        return softcap(self.embed_tokens.as_linear(hidden), self.config.text.softcap)

    def _per_layer_inputs(self, tokens: mx.array, x: mx.array) -> Sequence[mx.array | None]:
        """PLE: what each layer gets beside the residual stream, from the token's identity and from its embedding.

        tokens: [B, L], x: their scaled embeddings [B, L, D] -> for each layer [B, L, width], or None without PLE.
        """
        text = self.config.text
        if text.per_layer_input is None:
            return [None] * len(text.layers)
        width = text.per_layer_input.width
        shape = (*tokens.shape, len(text.layers), width)
        identity = embed_scaled(self.embed_tokens_per_layer, tokens, width).reshape(shape)
        context = (self.per_layer_model_projection(x) * text.hidden_size**-0.5).reshape(shape)
        inputs = (self.per_layer_projection_norm(context) + identity) * 2.0**-0.5
        return [inputs[:, :, i] for i in range(len(text.layers))]


def _at(array: mx.array, index: mx.array, axis: int) -> mx.array:
    """One position a row, `index` [B], of an array's `axis`; the axis stays, with size 1."""
    return mx.take_along_axis(array, index.reshape(-1, *[1] * (array.ndim - 1)), axis=axis)

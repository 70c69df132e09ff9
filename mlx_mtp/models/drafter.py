"""The MTP drafter: a few layers of queries that read the target's own keys, values and hidden state.

One step turns (a token, a hidden state) into scores for the next token and a hidden state for the next step:

    x = pre_projection([target's scaled embedding of the token, hidden])
    x = layers(x), every step of a round at one constant position, over the target's committed K/V
    y = norm(x);  scores = head(y);  next hidden = post_projection(y)

Position, masks and K/V do not change within a round: `Context` holds them. Source: transformers 5.22,
Gemma4AssistantForCausalLM, whose position id is that of the newest token, the one not in the cache yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.config import SLIDING, AttentionKind, CentroidConfig, DrafterConfig
from mlx_mtp.models.attention import Mask
from mlx_mtp.models.decoder_layer import DecoderLayer
from mlx_mtp.models.layers import RMSNorm, Rotary, Turn
from mlx_mtp.models.masks import drafter_mask


@dataclass(frozen=True)
class Context:
    """What all steps of a round share.

    keys_values: for each attention kind the donor layer's committed K/V, [B, kv heads, S, head_dim] each;
    masks: of [B, 1, 1, S], for each kind; turns: the queries' rotation to their position, for each kind.
    """

    keys_values: Mapping[AttentionKind, tuple[mx.array, mx.array]]
    masks: Mapping[AttentionKind, Mask]
    turns: Mapping[AttentionKind, Turn]


@dataclass(frozen=True)
class Candidates:
    """Scores of the tokens a draft may be: logits [B, C] of `token_ids` [B, C], or of all V tokens if None."""

    logits: mx.array
    token_ids: mx.array | None = None


class CentroidHead(nn.Module):
    """Scores only the tokens of the best clusters: [B, d] -> C = top_k * V / num_centroids candidates.

    token_ordering: [V], cluster by cluster the ids of its tokens; centroids choose clusters and score nothing else.
    """

    def __init__(self, config: CentroidConfig, hidden_size: int, vocab_size: int) -> None:
        super().__init__()
        self.centroids = nn.Linear(hidden_size, config.num_centroids, bias=False)
        self.token_ordering = mx.zeros((vocab_size,), mx.int32)
        self._config = config

    def __call__(self, y: mx.array, embeddings: nn.Embedding) -> Candidates:
        clusters = mx.argpartition(-self.centroids(y), kth=self._config.top_k - 1, axis=-1)[..., : self._config.top_k]
        members = self.token_ordering.reshape(self._config.num_centroids, -1)[clusters]
        token_ids = members.reshape(y.shape[0], -1)
        logits = (embeddings(token_ids) @ y[:, :, None])[:, :, 0]
        return Candidates(logits, token_ids)


class Drafter(nn.Module):
    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        text, backbone = config.text, config.backbone_hidden_size
        self.config = config
        self.pre_projection = nn.Linear(2 * backbone, text.hidden_size, bias=False)
        self.post_projection = nn.Linear(text.hidden_size, backbone, bias=False)
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = [DecoderLayer(text, i, owns_kv=False) for i in range(len(text.layers))]
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        if config.centroids is not None:
            self.masked_embedding = CentroidHead(config.centroids, text.hidden_size, text.vocab_size)
        self._rotary = {kind: Rotary(rotary) for kind, rotary in text.rotary.items()}

    def context(
        self,
        keys_values: Mapping[AttentionKind, tuple[mx.array, mx.array]],
        key_positions: Mapping[AttentionKind, mx.array],
        newest_positions: mx.array,
        position_shift: int = 0,
    ) -> Context:
        """What the steps of a round share.

        keys_values: the donor layers' arrays; key_positions: [B or 1, S] for each kind; newest_positions: [B], where
        the newest token stands (its own K/V are not committed). position_shift moves the queries: other stacks put
        them one to the left, at -1; which keys they see does not change.
        """
        masks = {
            kind: Mask(drafter_mask(newest_positions, positions, self.config.text.window if kind == SLIDING else None))
            for kind, positions in key_positions.items()
        }
        turns = {kind: rotary.at(newest_positions + position_shift, 1) for kind, rotary in self._rotary.items()}
        return Context(keys_values, masks, turns)

    def __call__(self, embedding: mx.array, hidden: mx.array, context: Context) -> tuple[Candidates, mx.array]:
        """One step. embedding: [B, backbone], the target's scaled embedding of the last token; hidden: [B, backbone],
        the target's after its final norm, or the last step's. Returns candidates and the next hidden."""
        x = self.pre_projection(mx.concatenate([embedding, hidden], axis=-1))
        for layer, settings in zip(self.layers, self.config.text.layers, strict=True):
            kind = settings.kind
            keys, values = context.keys_values[kind]
            attended = layer.self_attn(layer.input_layernorm(x), keys, values, context.masks[kind], context.turns[kind])
            x = layer.finish(x, attended, None)
        y = self.norm(x)
        if self.config.centroids is None:
            return Candidates(self.embed_tokens.as_linear(y)), self.post_projection(y)
        return self.masked_embedding(y, self.embed_tokens), self.post_projection(y)

"""Judges a text by plain decoding: one row, no drafts, one token a pass, told what to say.

Each emitted token must be what plain decoding would have chosen after the emitted tokens before it. So a text is
judged whole, even behind a near-tie, where plain decoding itself would have gone on with another token.

The passes are those of plain decoding and no others: one token each, through the same cache. One pass over the whole
text would be quicker, but it multiplies matrices of many rows, as verification does: its rounding is not that of plain
decoding, and a fault of verification could be a fault of the judge too. For the same reason the loop below is not
`spec_decode.loop.decode_round`, which made the text; it has prefill, target, cache and sampler in common with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_mtp.check.margins import least_change
from mlx_mtp.config import EngineConfig, SamplingParams
from mlx_mtp.device import release_unused
from mlx_mtp.engine.request import FinishReason, Request
from mlx_mtp.kv_cache import KVCache, layer_shapes
from mlx_mtp.models.target import Target
from mlx_mtp.spec_decode.loop import DecodeState, padded, prefill_chunk
from mlx_mtp.spec_decode.sampler import Sampler

BLOCK = 32  # decisions that are read from the device at once; it holds their logits until then


@dataclass(frozen=True)
class Text:
    """What the engine made of a request. Equal ones need one replay, whichever cells of a sweep they come from."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    stop_tokens: frozenset[int]
    most_tokens: int
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None

    @classmethod
    def of(cls, request: Request) -> Text:
        return cls(tuple(request.prompt), request.sampling, request.stop_tokens, request.most_tokens,
                   tuple(request.tokens), request.finish_reason)


@dataclass(frozen=True)
class Flip:
    """A token that plain decoding would not have chosen.

    index: in the answer. got: None if the text ended there without a stop token; expected: None if it should have
    ended. margin: by how much `got` loses, in logits (see `margins`); infinite if it is not a matter of margins.
    """

    index: int
    got: int | None
    expected: int | None
    margin: float


@dataclass(frozen=True)
class Replay:
    """leads: [judged tokens], by how much plain decoding's choice beats the next best token, in logits.

    near_ties: flips within the tolerance. violation: the first one beyond it; no token behind it was judged, for the
    state it was drawn from may be wrong already.
    """

    leads: np.ndarray
    near_ties: tuple[Flip, ...]
    violation: Flip | None

    @property
    def is_plain(self) -> bool:
        """Whether plain decoding gives this text, token for token."""
        return not self.near_ties and self.violation is None


def replay(target: Target, text: Text, tolerance: float) -> Replay:
    """Judges every token of a text, and the stop token that ended it."""
    leads: list[float] = []
    near_ties: list[Flip] = []
    for lead, flip in _judged(target, text):
        leads.append(lead)
        if flip is not None and not flip.margin <= tolerance:  # so that NaN is a violation
            return Replay(np.array(leads), tuple(near_ties), flip)
        near_ties += [] if flip is None else [flip]
    return Replay(np.array(leads), tuple(near_ties), _wrong_end(text))


def _wrong_end(text: Text) -> Flip | None:
    """What is wrong with where a text ends, whatever its tokens are."""
    for index, token in enumerate(text.tokens):
        if token in text.stop_tokens:
            return Flip(index, token, None, math.inf)
    count = len(text.tokens)
    if text.finish_reason == "stop" or (text.finish_reason == "length" and count == text.most_tokens):
        return None
    return Flip(count, None, None, math.inf)


def _judged(target: Target, text: Text) -> Iterator[tuple[float, Flip | None]]:
    """Of each token in order, and of the stop token: its lead, and the flip if it is one."""
    sampler, stops = Sampler.of([text.sampling]), mx.array(sorted(text.stop_tokens), mx.int32)
    vocab_size = target.config.text.vocab_size
    last = len(text.tokens) - (text.finish_reason != "stop")
    if last < 0:
        return
    block: list[tuple[mx.array, mx.array, mx.array | None]] = []
    for index, logits in enumerate(_plain_passes(target, text)):
        noise = sampler.noise(mx.array([[len(text.prompt) + index]], mx.int32), vocab_size)
        scores = sampler.scores(logits, noise)[0, 0]
        said = text.tokens[index : index + 1]  # nothing: a stop token, and the engine does not say which one
        got = mx.array(said[0], mx.int32) if said else stops[mx.argmax(scores[stops])]
        block.append((_decision(scores, got), logits, noise))
        mx.async_eval(block[-1][0])
        if len(block) == BLOCK or index == last:
            yield from _read(block, index + 1 - len(block), text.sampling)
            block.clear()
        if index == last:
            return


def _plain_passes(target: Target, text: Text) -> Iterator[mx.array]:
    """Plain decoding of one row that is told its tokens: the logits [1, 1, V] before each, and after the last one."""
    config, settings = target.config.text, EngineConfig()
    length = len(text.prompt) + len(text.tokens) + 1
    cache = KVCache(layer_shapes(config), config.window, settings.ring_slack, 1, target.dtype, length)
    state = DecodeState(mx.zeros((1,), mx.int32), mx.zeros((1, config.hidden_size), target.dtype), cache,
                        Sampler.of([text.sampling]))
    for start in range(0, len(text.prompt), settings.prefill_chunk):
        piece = text.prompt[start : start + settings.prefill_chunk]
        state, _ = prefill_chunk(target, state, *padded([piece]))
        mx.eval(state.hidden, *cache.arrays)
        release_unused()
    yield target.choice_logits(state.hidden)[:, None]
    for token in text.tokens:
        hidden = target(mx.array([[token]], mx.int32), cache.stage(1))
        cache.commit(mx.array([1], mx.int32), 1)
        yield target.choice_logits(hidden)


def _decision(scores: mx.array, got: mx.array) -> mx.array:
    """Scores [V] and a token -> the best token, the token, and by how much the best beats the second and that one.

    [4] float32, which holds every token id exactly.
    """
    best = mx.argmax(scores)
    second = mx.where(mx.arange(scores.size) == best, -float("inf"), scores).max()
    return mx.stack([best.astype(mx.float32), got.astype(mx.float32), scores[best] - second,
                     scores[best] - scores[got]])


def _read(
    block: list[tuple[mx.array, mx.array, mx.array | None]], first: int, sampling: SamplingParams
) -> Iterator[tuple[float, Flip | None]]:
    values = np.array(mx.stack([packed for packed, _, _ in block])).tolist()
    scale = sampling.temperature or 1.0
    for index, (best, got, lead, gap) in enumerate(values, first):
        if best == got and not math.isnan(lead):
            yield lead * scale, None
            continue
        margin = gap * scale
        _, logits, noise = block[index - first]
        if math.isnan(lead):
            margin = math.nan  # no filter may make a choice among such logits look near
        elif noise is not None and (sampling.top_k or sampling.top_p < 1 or sampling.min_p):
            margin = least_change(np.array(logits[0, 0].astype(mx.float32)), np.array(noise[0, 0]), sampling, int(got))
        yield lead * scale, Flip(index, int(got), int(best), margin)

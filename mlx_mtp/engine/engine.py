"""Runs requests: prefill, then rounds, with the next round handed to the device before the last one is read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_mtp.config import EngineConfig
from mlx_mtp.device import wired_memory
from mlx_mtp.engine.request import Request
from mlx_mtp.kv_cache import KVCache, layer_shapes
from mlx_mtp.models.target import Target
from mlx_mtp.spec_decode.loop import (
    DecodeState,
    DraftModel,
    RoundOutput,
    decode_round,
    first_token,
    padded_chunks,
    prefill_chunk,
)
from mlx_mtp.spec_decode.sampler import Sampler

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Event:
    """New tokens of a request; its `finish_reason` says whether they were the last."""

    request: Request
    tokens: list[int]


@dataclass(frozen=True)
class _Flight:
    """What the device works on, and whose rows it has: compaction may reorder them before it is read.

    num_draft_tokens is None for the first token, which a prefill draws.
    """

    output: RoundOutput
    rows: tuple[Request, ...]
    num_draft_tokens: int | None


def read(output: RoundOutput) -> np.ndarray:
    """The one place where the host waits for the device and reads from it: [B, K + 2] int32, once a round."""
    return np.array(output.packed)


class Engine:
    """Decodes a batch of requests to its end. `drafter` None is plain decoding, whatever K says."""

    def __init__(self, target: Target, drafter: DraftModel | None, config: EngineConfig) -> None:
        self._target, self._drafter, self._config = target, drafter, config
        self._num_draft_tokens = config.num_draft_tokens if drafter is not None else 0

    def run(self, requests: Sequence[Request], on_prefill: Progress | None = None) -> Iterator[Event]:
        """Yields events as tokens come. A request whose finish_reason the caller sets leaves at the next round.

        on_prefill(done, total) is told of prompt tokens run, a chunk at a time.
        """
        for request in requests:
            request.submitted = time.perf_counter()
        with wired_memory():
            state = self._prefill(requests, on_prefill)
            packed = mx.stack([state.last_token, mx.zeros_like(state.last_token)], axis=1)
            flight: _Flight | None = _Flight(RoundOutput(packed), tuple(requests), None)
            mx.async_eval(packed, state.hidden)
            rows = list(requests)
            while rows and flight is not None:
                in_flight = flight
                if all(len(row.tokens) + 1 >= row.most_tokens for row in rows):
                    flight = None  # what is in flight fills every row: another round would be thrown away
                else:
                    state, flight = self._launch(state, rows)
                yield from self._land(in_flight)
                for i in reversed(range(len(rows))):
                    if rows[i].is_finished:
                        rows[i] = rows[-1]
                        rows.pop()
                        if rows:
                            state = state.drop_row(i, Sampler.of([row.sampling for row in rows]))
                if flight is not None and rows:
                    # Committed as far as the host knows, and what the round in flight may add.
                    state.cache.tighten(max(row.length - 1 for row in rows) + self._num_draft_tokens + 1)

    def _launch(self, state: DecodeState, rows: Sequence[Request]) -> tuple[DecodeState, _Flight]:
        num_draft_tokens = self._num_draft_tokens
        state, output = decode_round(self._target, self._drafter, state, num_draft_tokens)
        mx.async_eval(output.packed, state.last_token, state.hidden, state.cache.lengths)
        return state, _Flight(output, tuple(rows), num_draft_tokens)

    def _land(self, flight: _Flight) -> Iterator[Event]:
        packed = read(flight.output)
        for request, row in zip(flight.rows, packed.tolist(), strict=True):
            if request.is_finished:
                continue
            yield Event(request, request.receive(row[: row[-1] + 1], flight.num_draft_tokens))

    def _prefill(self, requests: Sequence[Request], on_prefill: Progress | None) -> DecodeState:
        text = self._target.config.text
        prompts = [request.prompt for request in requests]
        slack = self._config.max_draft_tokens + 1
        reserve = max(len(prompt) for prompt in prompts) + slack
        cache = KVCache(layer_shapes(text), text.window, slack, len(prompts), self._target.dtype, reserve)
        state = DecodeState(
            last_token=mx.zeros((len(prompts),), mx.int32),
            hidden=mx.zeros((len(prompts), text.hidden_size), self._target.dtype),
            cache=cache,
            sampler=Sampler.of([request.sampling for request in requests]),
        )
        total, done = sum(len(prompt) for prompt in prompts), 0
        for start, tokens, valid in padded_chunks(prompts, self._config.prefill_chunk):
            state = prefill_chunk(self._target, state, tokens, valid)
            mx.eval(state.hidden, *cache.arrays)
            done += sum(min(max(len(prompt) - start, 0), tokens.shape[1]) for prompt in prompts)
            if on_prefill is not None:
                on_prefill(done, total)
        cache.tighten(max(len(prompt) for prompt in prompts))
        return first_token(self._target, state)

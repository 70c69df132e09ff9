"""Runs requests that join and leave between rounds: a step is plan, prefill a chunk, launch a round, land the last one.

The device never waits for Python: a step hands over the next round before it reads the tokens of the last one.

    device   round 1 | chunk of a new prompt | round 2 | round 3 ...
    host     step: chunk, round 2, read 1      step: round 3, read 2 ...

A request that ends is known to have ended one round late: it costs one row of one round. Rows are a prefix of the
batch: when one ends, the last one moves into its place.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_mtp import device
from mlx_mtp.config import SLIDING, EngineConfig
from mlx_mtp.engine.prefix_cache import PrefixCache
from mlx_mtp.engine.request import Request
from mlx_mtp.engine.scheduler import CacheCosts, Scheduler
from mlx_mtp.errors import QueueFullError, RequestError
from mlx_mtp.kv_cache import GROW_STEP, KVCache, layer_shapes
from mlx_mtp.models.target import Target
from mlx_mtp.spec_decode.draft_length import draft_length
from mlx_mtp.spec_decode.loop import (
    DecodeState,
    DraftModel,
    RoundOutput,
    decode_round,
    first_token,
    padded,
    prefill_chunk,
)
from mlx_mtp.spec_decode.round_costs import RoundCosts
from mlx_mtp.spec_decode.sampler import Sampler

Progress = Callable[[int, int], None]

LEAST_WAIT = 0.2  # of a round's time, for the host to have waited for the device rather than the device for it
SCORES_SHARE = 0.5  # of the working space, at most, for the scores of one layer and one chunk
LEAST_CHUNK = 32  # tokens, which is still so many times faster than one at a time
RELEASE_EVERY = 256  # rounds
PREFIX_SHARE = 0.2  # of the memory beside the weights, at most, for prefixes that no row uses


@dataclass(frozen=True)
class Event:
    """New tokens of a request; its `finish_reason` says whether they were the last."""

    request: Request
    tokens: list[int]


@dataclass(frozen=True)
class _Flight:
    """What the device works on, and whose rows it has: compaction may reorder them before it is read.

    num_draft_tokens is None for the first token, which a prefill draws. is_timed: the device goes from the flight
    before straight to this one, so that the time between their reads is this one's.
    """

    output: RoundOutput
    rows: tuple[Request, ...]
    num_draft_tokens: int | None
    is_timed: bool = False


def read(output: RoundOutput) -> np.ndarray:
    """The one place where the host waits for the device and reads from it: [B, K + 2] int32, once a round."""
    return np.array(output.packed)


class Engine:
    """Decodes up to `config.max_rows` requests together. `drafter` None is plain decoding, whatever K says.

    `submit` and `abort` may be called from any thread; all else belongs to the one thread that steps.
    """

    def __init__(
        self, target: Target, drafter: DraftModel | None, config: EngineConfig, costs: RoundCosts | None = None
    ) -> None:
        """costs: what rounds were measured to take, for K = "auto"; engines of the same pair can share them."""
        self._target, self._drafter, self._config = target, drafter, config
        self._draft_length = draft_length(config, drafter is not None, costs or RoundCosts())
        cache_costs, prefix_bytes, memory = _budget(target, drafter, config)
        self._most_scores = device.memory_bytes() * device.WORKING_SPACE * SCORES_SHARE
        self._prefixes = PrefixCache(target.config.text.window, prefix_bytes)
        self._scheduler = Scheduler(config, cache_costs, memory, self._prefixes.match)
        self._decoding: DecodeState | None = None
        self._prefilling: DecodeState | None = None
        self._flights: deque[_Flight] = deque()
        self._is_disturbed = True  # the device has other work than rounds before the next one
        self._landed_at = 0.0
        self._launched = 0
        self._is_broken = False  # true also while a step runs
        self._lock = threading.Lock()  # of the queue and of what follows
        self._live: dict[int, Request] = {}
        self._aborted: list[int] = []
        self._submitted = 0

    @property
    def is_idle(self) -> bool:
        """Whether a step would find nothing to do."""
        return self._scheduler.is_idle

    @property
    def decoding(self) -> Sequence[Request]:
        """Requests that hold a row of the batch now, in the order of their rows."""
        return tuple(self._scheduler.decoding)

    @property
    def active_rows(self) -> int:
        return len(self._scheduler.decoding)

    @property
    def waiting(self) -> int:
        """Requests that hold no row yet."""
        return len(self._scheduler.waiting) + len(self._scheduler.prefilling)

    def submit(self, request: Request) -> int:
        """Queues a request and returns its id.

        Raises QueueFullError, MemoryBudgetError if it could never run, and RequestError if it was submitted before.
        """
        if request.id >= 0 or request.is_finished:
            raise RequestError("this request was submitted before; expected a new one (mlx_mtp.new_request)")
        with self._lock:
            request.submitted = time.perf_counter()
            self._scheduler.submit(request)
            request.id, self._submitted = self._submitted, self._submitted + 1
            self._live[request.id] = request
        return request.id

    def abort(self, request_id: int) -> bool:
        """Ends a request wherever it is, by the next step; whether the engine still had it (a finished one leaves with
        the next step)."""
        with self._lock:
            is_live = request_id in self._live
            if is_live:
                self._aborted.append(request_id)
            return is_live

    def step(self) -> list[Event]:
        """Runs at most one prefill chunk and one round. Returns the tokens of the round before, and who was aborted.

        Stop strings are not looked for: a request that the caller ends (`Request.stop_after`) leaves at the next step.
        Raises RequestError where an earlier step was broken off: what is known of the rows may be half of it.
        """
        if self._is_broken:
            raise RequestError("a step of this engine was broken off: make a new one (mlx_mtp.new_engine)")
        self._is_broken = True
        events = self._step()
        self._is_broken = False
        return events

    def _step(self) -> list[Event]:
        events = self._abort()
        self._compact()
        with self._lock:
            plan = self._scheduler.plan()
        if plan.prefill:
            self._run_chunk(plan.prefill)
        is_launched = self._launch()
        while len(self._flights) > is_launched:
            events += self._land(self._flights.popleft())
        return events

    def plain_seconds(self, request: Request) -> float | None:
        """What its tokens would have taken without drafts, by the rounds of K = 0 that were timed; None if none was."""
        return self._draft_length.plain_seconds(request.tokens_by_rows)

    def check(self, request: Request) -> None:
        """Raises MemoryBudgetError for a request that could not run even alone."""
        self._scheduler.check(request)

    def run(self, requests: Iterable[Request], on_prefill: Progress | None = None) -> Iterator[Event]:
        """Submits requests, taken one after the other when rows come free, and steps until they are finished.

        Yields their events as tokens come, and holds none that is finished; events of requests that were submitted
        elsewhere are not told. A caller that stops early aborts the rest.
        on_prefill(done, total) is told of prompt tokens run, a chunk at a time, of the requests taken so far.
        """
        upcoming = iter(requests)
        following = next(upcoming, None)
        mine: set[Request] = set()
        gone = told = total = 0  # tokens of prompts: of finished requests, as told last, of all taken
        try:
            with device.wired_memory():
                while mine or following is not None:
                    while following is not None and len(mine) < 2 * self._config.max_rows:
                        try:
                            self.submit(following)
                        except QueueFullError:
                            break  # others fill the queue
                        mine.add(following)
                        total += len(following.prompt)
                        following = next(upcoming, None)
                    events = self.step()
                    done = gone + sum(request.prefilled for request in mine)
                    if on_prefill is not None and done != told:
                        on_prefill(done, total)
                    told = done
                    for event in events:
                        if event.request in mine:
                            yield event
                    gone += sum(request.prefilled for request in mine if request.is_finished)
                    mine = {request for request in mine if not request.is_finished}
        finally:
            for request in mine:
                self.abort(request.id)

    def _abort(self) -> list[Event]:
        with self._lock:
            asked = [self._live[i] for i in self._aborted if i in self._live]
            self._aborted.clear()
            gone = [request for request in dict.fromkeys(asked) if not request.is_finished]
            for request in gone:
                request.finish_reason = "aborted"
            for request in self._scheduler.drop_waiting() if gone else ():
                del self._live[request.id]
        return [Event(request, []) for request in gone]

    def _forget(self, request: Request) -> None:
        with self._lock:
            del self._live[request.id]

    def _compact(self) -> None:
        """Frees the rows of finished requests, and lowers the cache's bound to what the host knows."""
        if (given_up := self._scheduler.drop_prefilling()) is not None:
            self._forget(given_up)
            self._prefilling = None
        rows = self._scheduler.decoding
        for i in reversed(range(len(rows))):
            if not rows[i].is_finished:
                continue
            assert self._decoding is not None
            if rows[i].keep_answer:
                self._keep_answer(i)
            self._forget(self._scheduler.drop_row(i))
            self._is_disturbed = True
            if rows:
                self._decoding = self._decoding.drop_row(i, Sampler.of([row.sampling for row in rows]))
        if not rows:
            self._decoding = None
            self._flights.clear()
        elif self._decoding is not None:
            most = max(row.length - 1 for row in rows)
            self._decoding.cache.tighten(most + sum((flight.num_draft_tokens or 0) + 1 for flight in self._flights))

    def _keep_answer(self, row: int) -> None:
        assert self._decoding is not None
        request = self._scheduler.decoding[row]
        tokens = [*request.prompt, *request.tokens]
        start, stop = len(request.prompt), len(tokens) - 1  # the newest token's K/V may not be there
        if stop > start:
            written = request.committed + self._draft_length.longest + 1
            self._prefixes.insert(tokens, self._decoding.cache.cut(row, start, stop, written))

    def _run_chunk(self, requests: Sequence[Request]) -> None:
        """Hands over the next chunk of these prompts, and with their last one their first tokens."""
        self._is_disturbed = True
        if self._prefilling is None:
            self._prefilling = self._begin(requests)
        size = self._chunk_size(requests)
        pieces = [request.prompt[request.prefilled : request.prefilled + size] for request in requests]
        state, stage = prefill_chunk(self._target, self._prefilling, *padded(pieces))
        mx.async_eval(state.hidden, *state.cache.arrays)
        for row, (request, piece) in enumerate(zip(requests, pieces, strict=True)):
            if self._config.prefix_tokens:
                self._prefixes.insert(request.prompt, stage.span(row, request.prefilled, len(piece)))
            request.prefilled += len(piece)
        state.cache.tighten(max(request.prefilled for request in requests))
        if self._decoding is None:
            mx.eval(state.hidden)  # no round is read that would keep the host from running ahead
        self._prefilling = state
        if any(request.prefilled < len(request.prompt) for request in requests):
            device.release_unused()  # the next chunk's scores are larger
        else:
            self._join(first_token(self._target, state))

    def _chunk_size(self, requests: Sequence[Request]) -> int:
        """Tokens of the next chunk: fewer far into a long prompt, where one layer's scores would fill the memory.

        Metal has no kernel in MLX that attends from many positions with heads as wide as the full layers'.
        """
        size, text = self._config.prefill_chunk, self._target.config.text
        if len(requests) > 1:
            return size  # holds all of their prompts
        bytes_each = text.num_heads * self._target.dtype.size
        while size > LEAST_CHUNK and bytes_each * size * (requests[0].prefilled + size) > self._most_scores:
            size = max(size // 2, LEAST_CHUNK)
        return size

    def _begin(self, requests: Sequence[Request]) -> DecodeState:
        text = self._target.config.text
        longest = max(len(request.prompt) for request in requests)
        slack = self._config.ring_slack
        cache = KVCache(layer_shapes(text), text.window, slack, len(requests), self._target.dtype, longest + slack)
        if requests[0].reused:
            assert len(requests) == 1
            reused, spans = self._prefixes.take(requests[0].prompt)
            assert reused == requests[0].reused
            cache.paste(spans, reused)
        for request in requests:
            request.prefill_began_at = time.perf_counter()
        return DecodeState(
            last_token=mx.zeros((len(requests),), mx.int32),
            hidden=mx.zeros((len(requests), text.hidden_size), self._target.dtype),
            cache=cache,
            sampler=Sampler.of([request.sampling for request in requests]),
        )

    def _join(self, state: DecodeState) -> None:
        """Adds prefilled rows, whose first tokens are drawn, to those that decode."""
        self._draft_length.new_task()
        requests = tuple(self._scheduler.prefilling)
        packed = mx.stack([state.last_token, mx.zeros_like(state.last_token)], axis=1)
        self._scheduler.prefilled()
        if self._decoding is None:
            self._decoding = state
        else:
            sampler = Sampler.of([row.sampling for row in self._scheduler.decoding])
            self._decoding = self._decoding.join(state, sampler)
        self._prefilling = None
        mx.async_eval(packed, self._decoding.last_token, self._decoding.hidden, *self._decoding.cache.arrays)
        self._flights.append(_Flight(RoundOutput(packed), requests, None))

    def _launch(self) -> bool:
        """Hands the next round to the device, unless what is in flight fills every row anyway."""
        rows = self._scheduler.decoding
        if self._decoding is None or (self._flights and all(len(row.tokens) + 1 >= row.most_tokens for row in rows)):
            return False
        num_draft_tokens = self._draft_length.choose(len(rows))
        state, output = decode_round(self._target, self._drafter, self._decoding, num_draft_tokens)
        mx.async_eval(output.packed, state.last_token, state.hidden, state.cache.lengths)
        self._decoding = state
        self._launched += 1
        if self._launched % RELEASE_EVERY == 0:
            device.release_unused()
        is_timed = bool(self._flights) and not self._is_disturbed
        self._flights.append(_Flight(output, tuple(rows), num_draft_tokens, is_timed))
        self._is_disturbed = False
        return True

    def _land(self, flight: _Flight) -> list[Event]:
        began = time.perf_counter()
        packed = read(flight.output).tolist()
        landed = time.perf_counter()
        took, waited, self._landed_at = landed - self._landed_at, landed - began, landed
        num_drafted, width = flight.num_draft_tokens, len(flight.rows)
        live = [(request, row) for request, row in zip(flight.rows, packed, strict=True) if not request.is_finished]
        if num_drafted is not None:
            accepted = [row[-1] for _, row in live]
            self._draft_length.observe(width, num_drafted, accepted)
            self._time(flight, took, waited)
        events = []
        for request, row in live:
            events.append(Event(request, request.receive(row[: row[-1] + 1], num_drafted, width)))
        return events

    def _time(self, flight: _Flight, took: float, waited: float) -> None:
        """Tells what a round took: the one that landed, or, if the host hardly waited for it, the next.

        Then it was the host that took the time, and it was busy with the next round: building it, or, as MLX has it on
        a CPU, waiting until most of it was done. Where no next one was handed over, most of the time may lie before.
        """
        if not self._flights:
            return
        timed = flight if waited > LEAST_WAIT * took else self._flights[0]
        if timed.num_draft_tokens is not None:
            seconds = took if flight.is_timed and timed.is_timed else None
            self._draft_length.observe_seconds(len(timed.rows), timed.num_draft_tokens, seconds)


def _budget(target: Target, drafter: DraftModel | None, config: EngineConfig) -> tuple[CacheCosts, int, int]:
    """What rows cost, the bytes that kept prefixes may take, and those that rows may take."""
    text, size = target.config.text, target.dtype.size
    shapes = layer_shapes(text).values()
    sliding = sum(shape.numbers_per_position * size for shape in shapes if shape.kind == SLIDING)
    full = sum(shape.numbers_per_position * size for shape in shapes if shape.kind != SLIDING)
    slack = config.ring_slack
    costs = CacheCosts(sliding * (text.window + slack), full, GROW_STEP, slack)
    models = [model for model in (target, drafter) if isinstance(model, nn.Module)]
    weights = sum(array.nbytes for model in models for _, array in tree_flatten(model.parameters()))
    room = int(device.memory_bytes() * (1 - device.WORKING_SPACE)) - weights
    prefix_bytes = min(config.prefix_tokens * (sliding + full), int(room * PREFIX_SHARE))
    return costs, max(prefix_bytes, 0), room - max(prefix_bytes, 0)

"""Who runs next. Pure Python: requests and sizes in, a plan out; the engine does what it says.

    waiting ──admit──▶ prefilling ──▶ decoding ──▶ finished
                       one chunk a step, between two rounds of the rows that decode

First come, first served: a request that does not fit yet holds back those behind it, so none can starve.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_mtp.config import EngineConfig
from mlx_mtp.engine.request import Request
from mlx_mtp.errors import MemoryBudgetError, QueueFullError

GB = 1e9


@dataclass(frozen=True)
class CacheCosts:
    """Bytes of K/V. per_row: the rings of the sliding layers; per_token: of the full layers, which grow by `step`.

    slack: positions that a row takes beyond its tokens.
    """

    per_row: int
    per_token: int
    step: int
    slack: int

    def bytes(self, rows: int, longest: int) -> int:
        """What a batch takes: its rows share one buffer a layer, as long as the longest needs it."""
        capacity = -(-(longest + self.slack) // self.step) * self.step
        return rows * (self.per_row + self.per_token * capacity)


@dataclass(frozen=True)
class Plan:
    """What one step does: run the next chunk of `prefill`'s prompts, and a round of the decoding rows if there are any.

    Several requests are prefilled together only if one chunk holds all of their prompts, padding included.
    """

    prefill: tuple[Request, ...]
    decodes: bool


class Scheduler:
    """Owns which request is where; finished ones it forgets.

    memory: bytes for the caches of all rows. reusable: how many of a prompt's first tokens need not be run.
    """

    def __init__(
        self, config: EngineConfig, costs: CacheCosts, memory: int, reusable: Callable[[Sequence[int]], int]
    ) -> None:
        self._config, self._costs, self._memory, self._reusable = config, costs, memory, reusable
        self.waiting: deque[Request] = deque()
        self.prefilling: list[Request] = []
        self.decoding: list[Request] = []

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.prefilling or self.decoding)

    def submit(self, request: Request) -> None:
        """Queues a request. Raises QueueFullError, and MemoryBudgetError for one that could never run."""
        if len(self.waiting) >= self._config.max_waiting:
            raise QueueFullError(f"{len(self.waiting)} requests wait already, which is the limit (max_waiting): try "
                                 "again when some have finished")
        self.check(request)
        self.waiting.append(request)

    def check(self, request: Request) -> None:
        """Raises MemoryBudgetError for a request that could not run even alone."""
        needed = self._bytes([request])
        if needed > self._memory:
            raise MemoryBudgetError(
                f"a prompt of {len(request.prompt)} tokens and its answer need {needed / GB:.2f} GB of cache, but the "
                f"device has {self._memory / GB:.2f} GB for it beside the weights and kept prefixes: shorten the "
                "prompt or lower max_tokens")

    def plan(self) -> Plan:
        """Admits what fits and says what to run now."""
        if not self.prefilling:
            self._admit()
        return Plan(tuple(self.prefilling), bool(self.decoding))

    def prefilled(self) -> None:
        """Tells that the prompts being prefilled are through: they decode from now on, behind the other rows."""
        self.decoding += self.prefilling
        self.prefilling = []

    def drop_row(self, row: int) -> Request:
        """Takes a finished request out of the decoding ones; the last one moves into its place."""
        gone, last = self.decoding[row], self.decoding.pop()
        if last is not gone:
            self.decoding[row] = last
        return gone

    def drop_prefilling(self) -> Request | None:
        """Gives up a prefill whose request finished (aborted), and returns that."""
        # Only a request alone can be here between two steps: several have prompts of one chunk.
        if not (self.prefilling and self.prefilling[0].is_finished):
            return None
        return self.prefilling.pop()

    def drop_waiting(self) -> list[Request]:
        """Takes those out of the queue that finished there (aborted)."""
        gone = [request for request in self.waiting if request.is_finished]
        if gone:
            self.waiting = deque(request for request in self.waiting if not request.is_finished)
        return gone

    def _admit(self) -> None:
        widest = 0
        while self.waiting and self._fits(request := self.waiting[0]):
            reused = self._reusable(request.prompt)
            widest = max(widest, len(request.prompt))
            is_alone = reused > 0 or (len(self.prefilling) + 1) * widest > self._config.prefill_chunk
            if is_alone and self.prefilling:
                return
            request.reused = request.prefilled = reused
            self.prefilling.append(self.waiting.popleft())
            if is_alone:
                return

    def _fits(self, request: Request) -> bool:
        admitted = [*self.decoding, *self.prefilling, request]
        if len(admitted) > self._config.max_rows:
            return False
        joining = [*self.prefilling, request]  # a copy of their own until they join the others
        copy = self._bytes(joining) if self.decoding else 0
        return len(admitted) == 1 or self._bytes(admitted) + copy <= self._memory

    def _bytes(self, requests: Sequence[Request]) -> int:
        return self._costs.bytes(len(requests), max(self._planned(request) for request in requests))

    def _planned(self, request: Request) -> int:
        """Tokens to set memory aside for: an answer may become longer than planned."""
        planned = len(request.prompt) + min(request.most_tokens, self._config.planned_answer)
        return max(planned, request.length)

"""Many prompts, a few at a time: results come out in the prompts' order, and what is out is not held.

    prompts ──▶ jobs ──▶ rows that run ──▶ finished ones that wait for those before them ──▶ results
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

from mlx_mtp import api
from mlx_mtp.api import Pair, Result, Segment
from mlx_mtp.config import SamplingParams
from mlx_mtp.engine.engine import Engine
from mlx_mtp.output_file import OutputFile
from mlx_mtp.progress import Progress
from mlx_mtp.prompts_file import Line, told

TELLING_ROUNDS = 4  # of an answer; the speed of fewer is more chance than speed


@dataclass(frozen=True)
class Job:
    """A request that was checked: its tokens in little memory, and a short hash of all that its text depends on."""

    tokens: array[int]
    sampling: SamplingParams
    id: str | int | None
    fingerprint: str


def jobs(
    pair: Pair, engine: Engine, lines: Sequence[Line], encode: Callable[[Line], list[int]], model: str
) -> list[Job]:
    """Checks all prompts, so that a long job cannot come upon a bad one after hours.

    model: the checkpoint's name, for the fingerprints. Raises RequestError or MemoryBudgetError with the line's number.
    """
    made = []
    for line in lines:
        with told(line.where):
            tokens = encode(line)
            request = api.new_request(pair, tokens, line.sampling)
            engine.check(request)
        # Of the settings, max_tokens counts as far as the context lets it.
        settings = asdict(line.sampling) | {"max_tokens": request.most_tokens, "model": model, "id": line.id}
        hashed = hashlib.sha256(json.dumps([settings, tokens], sort_keys=True).encode())
        made.append(Job(array("i", tokens), line.sampling, line.id, hashed.hexdigest()[:16]))
    return made


def model_name(model: str | None) -> str:
    """What a checkpoint is called in fingerprints: a folder by its whole path, whatever the working directory."""
    if model is None:
        return "the built-in pair"
    return os.path.realpath(model) if os.path.isdir(model) else model


@dataclass
class Begun:
    """What has come of a completion so far; result: the whole, at its end."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    result: Result | None = None


class Sink(Protocol):
    """Where completions go."""

    def finished(self, index: int, result: Result) -> None:
        """Called in order, without a gap."""

    def interrupted(self, index: int, begun: Begun) -> None:
        """Called in order for what had not been handed out when the user stopped the job; some may have its result."""


class Texts:
    """Prints texts; if verbose, the number of each goes to stderr before it and its statistics after it."""

    def __init__(self, progress: Progress, is_verbose: bool) -> None:
        self._progress, self._is_verbose = progress, is_verbose

    def finished(self, index: int, result: Result) -> None:
        self._print(index, result.text)
        if self._is_verbose:
            print(summary(result), file=sys.stderr, flush=True)

    def interrupted(self, index: int, begun: Begun) -> None:
        self._print(index, begun.text)  # whole or not, it is all there is

    def _print(self, index: int, text: str) -> None:
        self._progress.clear()
        if self._is_verbose:
            print(f"--- {index + 1}", file=sys.stderr, flush=True)
        print(text, flush=True)


class JsonLines:
    """Prints one JSON object a completion; `jobs`, where there is a prompts file, add what they are called by."""

    def __init__(self, progress: Progress, jobs: Sequence[Job] | None) -> None:
        self._progress, self._jobs = progress, jobs

    def finished(self, index: int, result: Result) -> None:
        self._print(index, described(result))

    def interrupted(self, index: int, begun: Begun) -> None:
        unfinished = {"text": begun.text, "tokens": begun.tokens, "finish_reason": "interrupted", "stats": None}
        self._print(index, unfinished if begun.result is None else described(begun.result))

    def _print(self, index: int, shown: dict[str, Any]) -> None:
        self._progress.clear()
        print(json.dumps(shown if self._jobs is None else named(index, self._jobs[index], shown)), flush=True)


class ToFile:
    """Appends finished completions to the output file; what was interrupted is run again by the next job."""

    def __init__(self, output: OutputFile, jobs: Sequence[Job]) -> None:
        self._output, self._jobs = output, jobs

    def finished(self, index: int, result: Result) -> None:
        self._output.write(named(index, self._jobs[index], described(result)))

    def interrupted(self, index: int, begun: Begun) -> None:
        pass  # a line behind one that is missing would be no answer to its prompt


def described(result: Result) -> dict[str, Any]:
    shown = {part.name: getattr(result, part.name) for part in fields(result)}
    return shown | {"stats": asdict(result.stats)}


def named(index: int, job: Job, shown: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the output file: `index` comes first (see `OutputFile`)."""
    name = {} if job.id is None else {"id": job.id}
    return {"index": index, **name, **shown, "fingerprint": job.fingerprint}


def summary(result: Result) -> str:
    """A completion's sizes and speeds, and what the drafter gave, in one line."""
    stats = result.stats
    drafts = ""
    speed = f", {stats.generation_tps:.1f} tok/s" if stats.rounds >= TELLING_ROUNDS else ""
    if stats.drafted:
        drafts = (f"; accepted {stats.accepted} of {stats.drafted} drafts, {stats.mean_acceptance_length:.2f} tokens a "
                  "round")
    return (f"[prompt {stats.prompt_tokens} tokens, {stats.prompt_tps:.0f} tok/s; answer {stats.generation_tokens} "
            f"tokens{speed}; finished: {result.finish_reason}{drafts}; peak memory "
            f"{stats.peak_memory:.2f} GB]")


class Totals:
    """What a job has done since it began."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self.requests = self.tokens = self.drafted = self.rounds = self.accepted = 0

    @property
    def rate(self) -> float:
        """Tokens a second, prefill and all."""
        return self.tokens / max(time.perf_counter() - self._began, 1e-9)

    @property
    def acceptance(self) -> str:
        """The mean acceptance length of what has finished, if anything was drafted."""
        return f", {1 + self.accepted / self.rounds:.2f} tokens a round" if self.drafted else ""

    def add(self, segment: Segment) -> None:
        self.tokens += len(segment.tokens)
        if segment.stats is not None:
            self.requests += 1
            self.drafted += segment.stats.drafted
            self.rounds += segment.stats.rounds
            self.accepted += segment.stats.accepted

    def __str__(self) -> str:
        accepted = f"; accepted {self.accepted} of {self.drafted} drafts{self.acceptance}" if self.drafted else ""
        return f"{self.requests} requests, {self.tokens} tokens, {self.rate:.1f} tok/s{accepted}"


def run(pair: Pair, engine: Engine, jobs: Sequence[Job], sink: Sink, progress: Progress, first: int = 0) -> Totals:
    """Runs the jobs from number `first` on and hands their results to the sink in order."""
    totals = Totals()
    begun: dict[int, Begun] = {}
    upcoming = first

    def show() -> None:
        done, rows = first + totals.requests, engine.active_rows
        progress.show(f"{done}/{len(jobs)}, {rows} row{'s' * (rows != 1)}, {totals.rate:.1f} tok/s{totals.acceptance}",
                      done, len(jobs))

    requests = (api.new_request(pair, list(job.tokens), job.sampling) for job in jobs[first:])
    try:
        for segment in api.stream_requests(pair, engine, requests, lambda done, total: show()):
            one = begun.setdefault(first + segment.index, Begun())
            one.text += segment.text
            one.tokens += segment.tokens
            one.result = segment.result
            totals.add(segment)
            while upcoming in begun and (result := begun[upcoming].result) is not None:
                del begun[upcoming]
                upcoming += 1  # first: what is interrupted while it goes out is not told once more
                sink.finished(upcoming - 1, result)
            show()
    except KeyboardInterrupt:
        progress.clear()
        for index in range(upcoming, max(begun, default=upcoming - 1) + 1):
            sink.interrupted(index, begun.get(index, Begun()))
        raise
    return totals

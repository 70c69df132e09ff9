"""What a round costs against its parts measured alone in the same process: drafting, verifying, and the rest.

    python -m bench.rounds FOLDER            a pair made by bench.medium_pair

Parts: one target pass over B * (K + 1) tokens at that length, with its head, and K drafter steps. A round is timed in
the engine's pipeline. Interleaved in blocks of five: rounds, passes, drafts, rounds, ...
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

import mlx_mtp
from bench import blas
from bench.card import environment_card, print_card
from bench.prompts import RANDOM, random_prompts
from mlx_mtp import Pair
from mlx_mtp.command import guarded
from mlx_mtp.config import EngineConfig, SamplingParams
from mlx_mtp.engine.engine import Engine
from mlx_mtp.engine.request import Request
from mlx_mtp.kv_cache import KVCache, layer_shapes
from mlx_mtp.spec_decode.loop import DecodeState, draft, padded, prefill_chunk
from mlx_mtp.spec_decode.sampler import Sampler

BLOCK = 5
CHUNK = 512


@dataclass(frozen=True)
class Parts:
    """Median seconds of a round in the engine's pipeline, of one target pass over every row's K + 1 tokens with head
    and argmax, and of K drafter steps (0 for plain decoding)."""

    round: float
    verify: float
    draft: float


def measure_parts(pair: Pair, rows: int, length: int, num_draft_tokens: int, runs: int) -> Parts:
    """All three in turns, after a warm-up, for rows that hold `length` tokens."""
    makers = [round_timer, pass_timer, *([draft_timer] if num_draft_tokens else [])]
    times = interleaved([make(pair, rows, length, num_draft_tokens) for make in makers], runs)
    return Parts(*[*map(statistics.median, times), 0.0][:3])


def interleaved(timers: Sequence[Callable[[], float]], runs: int) -> list[list[float]]:
    """What each timer says in each run, after one that warms up."""
    turns = [[timer() for timer in timers] for _ in range(runs + 1)]
    return [list(found) for found in zip(*turns[1:], strict=True)]


def round_timer(pair: Pair, rows: int, length: int, num_draft_tokens: int) -> Callable[[], float]:
    """Seconds of one step of an engine in the middle of decoding."""
    config = EngineConfig(num_draft_tokens=num_draft_tokens, prefix_tokens=0, max_rows=rows)
    engine = Engine(pair.target, pair.drafter, config)
    requests = [Request(prompt, SamplingParams(100_000), frozenset(), 10**6)
                for prompt in random_prompts(RANDOM, rows, length)]
    for request in requests:
        engine.submit(request)
    while not all(request.tokens for request in requests):
        engine.step()

    def run() -> float:
        engine.step()  # one round is in flight when the clock starts, and when it stops
        start = time.perf_counter()
        for _ in range(BLOCK):
            engine.step()
        seconds = time.perf_counter() - start
        mx.synchronize()
        return seconds / BLOCK

    return run


def block(work: Callable[[], object]) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        for _ in range(BLOCK):
            work()
        return (time.perf_counter() - start) / BLOCK

    return run


def state_at(pair: Pair, rows: int, length: int) -> DecodeState:
    text = pair.target.config.text
    cache = KVCache(layer_shapes(text), text.window, EngineConfig().ring_slack, rows, pair.target.dtype, length + 64)
    state = DecodeState(mx.zeros((rows,), mx.int32), mx.zeros((rows, text.hidden_size), pair.target.dtype), cache,
                        Sampler.of([SamplingParams()] * rows))
    prompts = random_prompts(RANDOM, rows, length)
    for start in range(0, length, CHUNK):
        state, _ = prefill_chunk(pair.target, state, *padded([prompt[start : start + CHUNK] for prompt in prompts]))
        mx.eval(state.hidden, *cache.arrays)
    return state


def pass_timer(pair: Pair, rows: int, length: int, num_draft_tokens: int) -> Callable[[], float]:
    """Seconds of one target pass over K + 1 tokens a row, head and argmax included."""
    state = state_at(pair, rows, length)
    # Each token another one: equal ones would all take the same experts.
    tokens = mx.array(random_prompts(RANDOM, rows, num_draft_tokens + 2))[:, 1:]

    def work() -> None:
        hidden = pair.target(tokens, state.cache.stage(num_draft_tokens + 1))
        mx.eval(mx.argmax(pair.target.choice_logits(hidden), axis=-1), *state.cache.arrays)

    return block(work)


def draft_timer(pair: Pair, rows: int, length: int, num_draft_tokens: int) -> Callable[[], float]:
    """Seconds of a round's K drafter steps."""
    state = state_at(pair, rows, length)

    return block(lambda: mx.eval(draft(pair.target, pair.drafter, state, num_draft_tokens, None)))


def main() -> int:
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("folder", type=Path)
    cli.add_argument("--length", type=int, default=256)
    cli.add_argument("--runs", type=int, default=8)
    cli.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8])
    cli.add_argument("--num-draft-tokens", type=int, nargs="+", default=[0, 3, 5])
    blas.add_flag(cli)
    args = cli.parse_args()
    pair = mlx_mtp.load(args.folder / "target", max_context=8192)
    print_card(environment_card())
    for rows in args.rows:
        for num_draft_tokens in args.num_draft_tokens:
            parts = measure_parts(pair, rows, args.length, num_draft_tokens, args.runs)
            one, verify, drafts = 1e3 * parts.round, 1e3 * parts.verify, 1e3 * parts.draft
            print(f"rows {rows}  K {num_draft_tokens}  round {one:7.2f} ms  pass {verify:7.2f}  drafts {drafts:6.2f}  "
                  f"round / parts {one / (verify + drafts):.3f}", flush=True)
    return 0


if __name__ == "__main__":
    blas.prefer_openblas()
    sys.exit(guarded(main))

"""What a round costs against the sum of its parts measured alone in the same process.

    python -m bench.rounds FOLDER            a pair made by bench.medium_pair

Parts: one target pass over B * (K + 1) tokens at that length, with its head, and K drafter steps. A round is timed in
the engine's pipeline. Interleaved in blocks of five: rounds, passes, drafts, rounds, ...
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

import mlx_mtp
from bench.card import environment_card
from mlx_mtp import Pair
from mlx_mtp.config import EngineConfig, SamplingParams
from mlx_mtp.engine.engine import Engine
from mlx_mtp.engine.request import Request
from mlx_mtp.kv_cache import KVCache, layer_shapes
from mlx_mtp.spec_decode.loop import DecodeState, draft, padded, prefill_chunk
from mlx_mtp.spec_decode.sampler import Sampler

BLOCK = 5


def prompts(rows: int, length: int) -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [[2, *generator.integers(3, 1000, length - 1).tolist()] for _ in range(rows)]


def round_timer(pair: Pair, rows: int, length: int, num_draft_tokens: int) -> Callable[[], float]:
    """Seconds of one step of an engine in the middle of decoding."""
    config = EngineConfig(num_draft_tokens=num_draft_tokens, prefill_chunk=rows * length, prefix_tokens=0)
    engine = Engine(pair.target, pair.drafter, config)
    for prompt in prompts(rows, length):
        engine.submit(Request(prompt, SamplingParams(100_000), frozenset(), 10**6))
    for _ in range(3):
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
    state, _ = prefill_chunk(pair.target, state, *padded(prompts(rows, length)))
    mx.eval(state.hidden, *cache.arrays)
    return state


def pass_timer(pair: Pair, rows: int, length: int, num_draft_tokens: int) -> Callable[[], float]:
    """Seconds of one target pass over K + 1 tokens a row, head and argmax included."""
    state = state_at(pair, rows, length)
    tokens = mx.full((rows, num_draft_tokens + 1), 7)

    def work() -> None:
        hidden = pair.target(tokens, state.cache.stage(num_draft_tokens + 1))
        mx.eval(mx.argmax(pair.target.logits(hidden), axis=-1), *state.cache.arrays)

    return block(work)


def draft_timer(pair: Pair, rows: int, length: int, num_draft_tokens: int) -> Callable[[], float]:
    """Seconds of a round's K drafter steps."""
    state = state_at(pair, rows, length)

    return block(lambda: mx.eval(draft(pair.target, pair.drafter, state, num_draft_tokens, None)))


def main() -> None:
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("folder", type=Path)
    cli.add_argument("--length", type=int, default=256)
    cli.add_argument("--runs", type=int, default=8)
    cli.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8])
    cli.add_argument("--num-draft-tokens", type=int, nargs="+", default=[0, 3, 5])
    args = cli.parse_args()
    pair = mlx_mtp.load(args.folder / "target", max_context=8192)
    for key, value in environment_card().items():
        print(f"{key:10} {value}")
    for rows in args.rows:
        for num_draft_tokens in args.num_draft_tokens:
            makers = (round_timer, pass_timer, draft_timer)
            timers = [make(pair, rows, args.length, num_draft_tokens) for make in makers]
            times: list[list[float]] = [[], [], []]
            for turn in range(args.runs + 1):
                for timer, found in zip(timers, times, strict=True):
                    seconds = timer()
                    if turn:
                        found.append(seconds)
            one, verify, drafts = (1e3 * statistics.median(found) for found in times)
            print(f"rows {rows}  K {num_draft_tokens}  round {one:7.2f} ms  pass {verify:7.2f}  drafts {drafts:6.2f}  "
                  f"round / parts {one / (verify + drafts * (num_draft_tokens > 0)):.3f}", flush=True)


if __name__ == "__main__":
    main()

"""What continuous batching promises beside speed, measured on one pair.

    python -m bench.serving FOLDER stall      a 4,000-token prompt arrives while seven rows decode
    python -m bench.serving FOLDER prefix     a shared 1,000-token beginning: time to first token, first and second
    python -m bench.serving FOLDER mixed      200 requests, random lengths, settings, arrivals, aborts: equal to alone
    python -m bench.serving FOLDER soak       2,000 short requests: resident memory as they pass

FOLDER: a target's folder with its drafter beside it (`bench.medium_pair` makes one), or `demo`.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import statistics
import sys
import time
from collections.abc import Callable

import mlx.core as mx

import mlx_mtp
from bench import blas
from bench.card import environment_card
from mlx_mtp import Pair
from mlx_mtp.command import guarded
from mlx_mtp.config import EngineConfig, SamplingParams
from mlx_mtp.engine.engine import Engine
from mlx_mtp.engine.request import Request


def prompt_of(length: int, generator: random.Random) -> list[int]:
    return [2, *(generator.randrange(3, 1000) for _ in range(length - 1))]


def request_of(prompt: list[int], sampling: SamplingParams) -> Request:
    return Request(prompt, sampling, frozenset(), 100_000)


def stall(pair: Pair) -> None:
    """The longest a decoding row waits for tokens while a long prompt is prefilled, against one chunk + one round."""
    generator = random.Random(0)
    engine = Engine(pair.target, pair.drafter, EngineConfig())
    rows = [request_of(prompt_of(32, generator), SamplingParams(5000)) for _ in range(7)]
    for row in rows:
        engine.submit(row)
    while not all(row.tokens for row in rows):
        engine.step()
    plain = [timed(engine.step) for _ in range(20)]
    long = request_of(prompt_of(4000, generator), SamplingParams(8))
    engine.submit(long)
    steps, fewest = [], len(rows)
    while not long.tokens:
        before = [len(row.tokens) for row in rows]
        steps.append(timed(engine.step))
        fewest = min(fewest, sum(len(row.tokens) > count for row, count in zip(rows, before, strict=True)))
    alone = Engine(pair.target, pair.drafter, EngineConfig(prefix_tokens=0))
    alone.submit(request_of(prompt_of(4000, generator), SamplingParams(8)))
    chunks = [timed(alone.step) for _ in range(7)]
    round_, chunk = statistics.median(plain), max(chunks)
    print(f"round {1e3 * round_:.1f} ms; prefill chunk alone: median {1e3 * statistics.median(chunks):.1f}, longest "
          f"{1e3 * chunk:.1f} ms; steps while the prompt came: median {1e3 * statistics.median(steps):.1f}, longest "
          f"{1e3 * max(steps):.1f} ms = {max(steps) / (chunk + round_):.2f} x (chunk + round); rows served in each "
          f"step: at least {fewest} of 7")


def timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def prefix(pair: Pair) -> None:
    generator = random.Random(0)
    ratios = []
    for _ in range(5):
        engine = Engine(pair.target, pair.drafter, EngineConfig())
        system = prompt_of(1000, generator)
        waits = []
        for _ in range(2):
            request = request_of(system + prompt_of(30, generator), SamplingParams(16))
            engine.submit(request)
            while not engine.is_idle:
                engine.step()
            waits.append(request.first_token_at - request.submitted)
        ratios.append(waits[1] / waits[0])
        print(f"time to first token: first {1e3 * waits[0]:.1f} ms, second {1e3 * waits[1]:.1f} ms, "
              f"{waits[1] / waits[0]:.3f} x")
    print(f"median {statistics.median(ratios):.3f} x")


def random_settings(generator: random.Random, longest: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=generator.randint(1, longest), temperature=generator.choice([0.0, 0.7, 1.0]),
        top_k=generator.choice([0, 40]), top_p=generator.choice([1.0, 0.9]), seed=generator.randrange(10_000))


def mixed(pair: Pair) -> None:
    """Every finished request against the same request alone, without drafts."""
    generator = random.Random(1)
    window = pair.target.config.text.window
    engine = Engine(pair.target, pair.drafter, EngineConfig())
    waiting = [request_of(prompt_of(generator.randint(1, 6 * window), generator), random_settings(generator, 40))
               for _ in range(200)]
    requests: list[Request] = []
    while waiting or not engine.is_idle:
        while waiting and generator.random() < 0.3:
            requests.append(waiting.pop())
            engine.submit(requests[-1])
        engine.step()
        live = [request for request in requests if not request.is_finished]
        if live and generator.random() < 0.03:
            engine.abort(generator.choice(live).id)
    finished = [request for request in requests if request.finish_reason != "aborted"]
    different = tokens = 0
    for request in finished:
        alone = request_of(list(request.prompt), request.sampling)
        for _ in Engine(pair.target, None, EngineConfig()).run([alone]):
            pass
        tokens += len(alone.tokens)
        different += alone.tokens != request.tokens
    print(f"{len(requests)} requests, {len(requests) - len(finished)} aborted, {tokens} tokens compared; "
          f"{different} requests differ from being run alone")


def resident() -> float:
    """MB, without the freed pages that glibc keeps between those in use: how many those are depends on chance.

    Outside Linux only what MLX's arrays take.
    """
    if sys.platform != "linux":
        return mx.get_active_memory() / 1e6
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def soak(pair: Pair) -> None:
    """The room for kept prefixes is small enough to be full when the first 200 have passed."""
    generator = random.Random(2)
    engine = Engine(pair.target, pair.drafter, EngineConfig(prefix_tokens=4096))
    started = time.perf_counter()
    count, finished, after_200, next_line = 0, 0, 0.0, 400
    while finished < 2000:
        while count < 2000 and engine.active_rows + engine.waiting < 12:
            engine.submit(request_of(prompt_of(generator.randint(4, 60), generator), random_settings(generator, 24)))
            count += 1
        finished += sum(event.request.is_finished for event in engine.step())
        if not after_200 and finished >= 200:
            after_200 = resident()
        if finished >= next_line:
            next_line += 400
            print(f"{finished} finished: {resident():.1f} MB resident, {mx.get_active_memory() / 1e6:.1f} MB active")
    end = resident()
    print(f"after 200: {after_200:.1f} MB, after {finished}: {end:.1f} MB, {100 * (end / after_200 - 1):+.2f}%; "
          f"{time.perf_counter() - started:.0f} s")


def main() -> int:
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("folder")
    cli.add_argument("what", choices=["stall", "prefix", "mixed", "soak"])
    blas.add_flag(cli)
    args = cli.parse_args()
    pair = mlx_mtp.load(None if args.folder == "demo" else args.folder)
    for key, value in environment_card().items():
        print(f"{key:10} {value}")
    {"stall": stall, "prefix": prefix, "mixed": mixed, "soak": soak}[args.what](pair)
    return 0


if __name__ == "__main__":
    blas.prefer_openblas()
    sys.exit(guarded(main))

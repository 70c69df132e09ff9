"""Batches against the peers: tokens/s of decoding at 1, 4 and 8 rows, of equal and of ragged prompts, interleaved.

    python -m bench.batch FOLDER             a pair made by bench.medium_pair; needs the extra `peers`

With drafts (K = 3, replayed acceptance, each side pays its own drafter's steps) against mlx-vlm; without against
mlx-lm. Time and tokens are counted from when every row has its first token until the first row ends. Texts are
compared with this package's plain decoding of each row alone before any speed is printed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

import mlx_mtp
from bench.card import environment_card
from bench.peer_vlm import LmPeer, Tokens, VlmPeer
from bench.replay import ReplayDrafter, replayed_drafts
from mlx_mtp import Pair
from mlx_mtp.config import EngineConfig, SamplingParams
from mlx_mtp.engine.engine import Engine
from mlx_mtp.engine.request import Request
from mlx_mtp.spec_decode.loop import DraftModel

ACCEPTANCE = 0.8
K = 3


@dataclass
class Measured:
    """One run: tokens of each row, and tokens/s while all rows decode."""

    texts: list[list[int]]
    speed: float


def measure(rows: int, max_tokens: int, steps: Iterable[Tokens]) -> Measured:
    texts: list[list[int]] = [[] for _ in range(rows)]
    began = counted = 0.0
    ended = None
    for step in steps:
        for row, token in step:
            texts[row].append(token)
        now = time.perf_counter()
        if not began and all(texts):
            began, counted = now, sum(map(len, texts))
        if ended is None and any(len(text) >= max_tokens for text in texts):
            ended = (sum(map(len, texts)) - counted) / (now - began)
    assert ended is not None
    return Measured(texts, ended)


def our_steps(
    pair: Pair, drafter: DraftModel | None, prompts: list[list[int]], max_tokens: int, k: int
) -> Iterator[Tokens]:
    """All rows are prefilled together, as the peers do."""
    config = EngineConfig(num_draft_tokens=k, prefill_chunk=len(prompts) * max(map(len, prompts)), prefix_tokens=0)
    engine = Engine(pair.target, drafter, config)
    requests = [Request(prompt, SamplingParams(max_tokens), frozenset(), 8192) for prompt in prompts]
    for request in requests:
        engine.submit(request)
    row = {request.id: i for i, request in enumerate(requests)}
    while not engine.is_idle:
        yield [(row[event.request.id], token) for event in engine.step() for token in event.tokens]


def cases(prompt: int) -> dict[str, list[list[int]]]:
    """Name -> prompts; a ragged batch's are sorted by length, since mlx-vlm sorts them."""
    generator = np.random.default_rng(7)

    def make(length: int) -> list[int]:
        return [2, *generator.integers(3, 1000, length - 1).tolist()]

    equal = {f"{rows} rows": [make(prompt) for _ in range(rows)] for rows in (1, 4, 8)}
    ragged = {f"{rows} ragged rows": [make(length) for length in np.linspace(8, prompt, rows).astype(int)]
              for rows in (4, 8)}
    return equal | ragged


def compare(
    name: str, rows: int, max_tokens: int, runners: dict[str, Callable[[], Iterable[Tokens]]], texts: list[list[int]],
    runs: int,
) -> None:
    """Runs them in turns and prints median and spread; says whose texts differ."""
    speeds: dict[str, list[float]] = {runner: [] for runner in runners}
    differ: set[str] = set()
    for turn in range(runs + 1):
        for runner, run in runners.items():
            measured = measure(rows, max_tokens, run())
            if any(got != text[: len(got)] for got, text in zip(measured.texts, texts, strict=True)):
                differ.add(runner)
            if turn:
                speeds[runner].append(measured.speed)
    ours = statistics.median(speeds["ours"])
    for runner, values in speeds.items():
        middle = statistics.median(values)
        print(f"{name:16} {runner:8} {middle:8.1f} tok/s ({min(values):.1f} to {max(values):.1f})  ours is "
              f"{ours / middle:.2f}x" + ("  TEXT DIFFERS from plain decoding" if runner in differ else ""), flush=True)


def main() -> None:
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("folder", type=Path)
    cli.add_argument("--prompt", type=int, default=48)
    cli.add_argument("--max-tokens", type=int, default=72, help="with the prompt within the window of 128, beyond "
                     "which mlx-vlm's ragged batches are wrong (default: %(default)s)")
    cli.add_argument("--runs", type=int, default=5)
    cli.add_argument("--cases", nargs="+", help="only these, such as '8 rows' (default: all)")
    args = cli.parse_args()
    pair = mlx_mtp.load(args.folder / "target", max_context=8192)
    assert pair.drafter is not None
    vlm, lm = VlmPeer(args.folder / "target"), LmPeer(args.folder / "target")
    for key, value in environment_card().items():
        print(f"{key:10} {value}")
    n = args.max_tokens
    for name, prompts in cases(args.prompt).items():
        if args.cases and name not in args.cases:
            continue
        rows = len(prompts)
        texts = [measure(1, n, our_steps(pair, None, [prompt], n, 0)).texts[0] for prompt in prompts]
        whole = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        drafts = replayed_drafts(whole, ACCEPTANCE, pair.target.config.text.vocab_size)
        replay = ReplayDrafter(pair.drafter, drafts)
        compare(f"{name}, K = {K}", rows, n, {
            "ours": partial(our_steps, pair, replay, prompts, n, K),
            "mlx-vlm": partial(vlm.steps, prompts, n, drafts, K),
        }, texts, args.runs)
        compare(f"{name}, K = 0", rows, n, {
            "ours": partial(our_steps, pair, None, prompts, n, 0),
            "mlx-lm": partial(lm.steps, prompts, n),
        }, texts, args.runs)
        mx.clear_cache()


if __name__ == "__main__":
    main()

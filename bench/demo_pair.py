"""The built-in pair on held-out prompts: acceptance, and tokens/s drafted, plain, and plain by mlx-lm, interleaved.

    python -m bench.demo_pair
    LD_PRELOAD=libblas.so.3 python -m bench.demo_pair     with the path of OpenBLAS's, see README.md

Only prompts whose greedy answer ends by itself are used: looping text flatters acceptance. All three decode the same
prompts greedily in float32; texts are compared before any speed is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlx_mtp
from bench.card import environment_card
from mlx_mtp import Pair, Result, demo

MAX_TOKENS = 200


def held_out_prompts() -> list[str]:
    raw = json.loads((Path(demo.__file__).parent / "heldout_prompts.json").read_text(encoding="utf-8"))
    return [entry["prompt"] for entry in raw if entry["stops"]]


def drafted(pair: Pair, num_draft_tokens: int) -> Callable[[list[int]], tuple[list[int], float, Result]]:
    """Decodes a prompt with K drafts; returns its tokens, the seconds after the first one, and the result."""
    def run(tokens: list[int]) -> tuple[list[int], float, Result]:
        result = mlx_mtp.generate(pair, tokens, max_tokens=MAX_TOKENS, num_draft_tokens=num_draft_tokens)
        assert isinstance(result, Result)
        return result.tokens, (len(result.tokens) - 1) / result.stats.generation_tps, result

    return run


def plain_by_mlx_lm(pair: Pair, folder: Path) -> Callable[[list[int]], tuple[list[int], float, None]]:
    """The same target decoded by mlx-lm's generate_step, in float32."""
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model: Any = load_model(folder)[0]
    model.set_dtype(mx.float32)

    def run(tokens: list[int]) -> tuple[list[int], float, None]:
        got: list[int] = []
        first = last = time.perf_counter()
        for token, _ in generate_step(mx.array(tokens), model, max_tokens=MAX_TOKENS):
            last = time.perf_counter()
            first = first if got else last
            if int(token) in pair.tokenizer.stop_tokens:
                break
            got.append(int(token))
        return got, last - first, None

    return run


def main() -> int:
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("--num-draft-tokens", type=int, default=3)
    cli.add_argument("--runs", type=int, default=3, help="times that each prompt is decoded (default: %(default)s)")
    cli.add_argument("--mixture", action="store_true", help="the mixture-of-experts pair instead of the edge pair")
    args = cli.parse_args()

    folder = demo.MIXTURE_TARGET if args.mixture else demo.TARGET
    pair = mlx_mtp.load(folder, dtype=mx.float32)
    prompts = [pair.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in held_out_prompts()]
    name = f"K = {args.num_draft_tokens}"
    runners = {name: drafted(pair, args.num_draft_tokens), "K = 0": drafted(pair, 0),
               "mlx-lm, plain": plain_by_mlx_lm(pair, folder)}
    speeds: dict[str, list[float]] = {runner: [] for runner in runners}
    results: list[Result] = []
    for turn in range(args.runs + 1):  # the first one warms up
        totals = dict.fromkeys(runners, (0, 0.0))
        for tokens in prompts:
            texts = {}
            for runner, run in runners.items():
                texts[runner], seconds, result = run(tokens)
                count, total = totals[runner]
                totals[runner] = count + len(texts[runner]) - 1, total + seconds
                if turn == 0 and runner == name and result is not None and result.finish_reason == "stop":
                    results.append(result)
            if texts[name] != texts["K = 0"]:
                print(f"error: drafting changed the text of {tokens}", file=sys.stderr)
                return 1
            if turn == 0 and texts["K = 0"] != texts["mlx-lm, plain"]:
                print("note: mlx-lm's text differs (a near-tie in floats)")
        for runner, (count, total) in totals.items():
            if turn:
                speeds[runner].append(count / total)
    report(results, speeds, name)
    return 0


def report(results: list[Result], speeds: dict[str, list[float]], name: str) -> None:
    for key, value in environment_card().items():
        print(f"{key:10} {value}")
    rounds = sum(result.stats.rounds for result in results)
    accepted = sum(result.stats.accepted for result in results)
    depth = max(len(result.stats.accepted_at) for result in results)
    at = [sum(sum(result.stats.accepted_at[i : i + 1]) for result in results) / rounds for i in range(depth)]
    print(f"{len(results)} held-out prompts that end by themselves, float32, greedy, one row, {name}")
    print(f"mean acceptance length {1 + accepted / rounds:.2f} ({accepted} accepted in {rounds} rounds); "
          f"acceptance at position {', '.join(f'{i + 1}: {share:.2f}' for i, share in enumerate(at))}")
    base = statistics.median(speeds["K = 0"])
    for runner, values in speeds.items():
        middle = statistics.median(values)
        print(f"{runner:14} {middle:7.1f} tok/s ({min(values):.1f} to {max(values):.1f} in {len(values)} runs), "
              f"{middle / base:.2f}x plain")


if __name__ == "__main__":
    sys.exit(main())

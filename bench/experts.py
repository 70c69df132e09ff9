"""Experts dispatched as calibration chose against mlx-lm's SwitchGLU, on the same weights and routes.

    python -m bench.experts                                  the whole grid (some minutes)
    python -m bench.experts --experts 32 --widths 512x1024   one shape
    python -m bench.experts --reads                          how often experts are read, not how long it takes

Float32 on CPU unless MLX has a GPU. On Linux it starts again with OpenBLAS: with the reference BLAS a product of m rows
takes m times as long as one of a row, and there is nothing to share.

Both run in turn, the first one alternating. The ratio that counts is that of their fastest runs, since anything else
that the machine does slows products of many rows on all cores more than it slows single rows; the median of the pairs'
ratios stands beside it. Routing is uniform, each token's experts distinct.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from bench import blas
from bench.card import environment_card
from mlx_mtp.checkpoint.cpu_layout import lay_out_for_cpu
from mlx_mtp.command import guarded
from mlx_mtp.config import ExpertsConfig
from mlx_mtp.models.expert_calibration import DECODE_TOKENS, PORTABLE, Shape, measure, random_pass
from mlx_mtp.models.expert_dispatch import most_tiles, tiles_of
from mlx_mtp.models.expert_kernel import TILE_ROWS
from mlx_mtp.models.expert_statistics import distinct_experts
from mlx_mtp.models.moe import QuantizedExpertLinear, SwitchGLU

TOP_K = 4
ROUTES = (4, 8, 16, 32, 64, 128, 256, 512)
ALLOWED = 1.02  # of mlx-lm's time
TARGET_SHAPE, TARGET = (32, 512, 1024, 256), 0.65  # experts, hidden, width, routes: few and large


def mlx_lm_twin(ours: SwitchGLU, hidden: int, settings: ExpertsConfig) -> nn.Module:
    """mlx-lm's module as its Gemma 4 uses it, holding the same weights as they are now."""
    from mlx_lm.models.gemma4_text import GeGLU
    from mlx_lm.models.switch_layers import SwitchGLU as MlxLmSwitchGLU

    theirs = MlxLmSwitchGLU(hidden, settings.intermediate_size, settings.num_experts, activation=GeGLU())
    if isinstance(ours.gate_proj, QuantizedExpertLinear):
        nn.quantize(theirs, ours.gate_proj.group_size, ours.gate_proj.bits)
    theirs.update(ours.parameters())
    return theirs


class Ratio(NamedTuple):
    """What the second takes of the first: milliseconds of the first, and ratios."""

    milliseconds: float
    fastest: float
    median: float


def interleaved(first: Callable[[], mx.array], second: Callable[[], mx.array], seconds: float) -> Ratio:
    """Runs both in turn for about so many seconds, at least six times."""

    def timed(work: Callable[[], mx.array]) -> float:
        start = time.perf_counter()
        mx.eval(work())
        return time.perf_counter() - start

    timed(first), timed(second)
    pairs: list[tuple[float, float]] = []
    begun = time.perf_counter()
    while len(pairs) < 6 or (time.perf_counter() - begun < seconds and len(pairs) < 60):
        if len(pairs) % 2:
            one, two = timed(first), timed(second)
        else:
            two, one = timed(second), timed(first)
        pairs.append((one, two))
    least = [min(times) for times in zip(*pairs, strict=True)]
    return Ratio(1e3 * least[0], least[1] / least[0], statistics.median(two / one for one, two in pairs))


def compare(experts: int, hidden: int, width: int, bits: int, seconds: float) -> list[float]:
    """Prints a line for every count of routes of one shape; returns the ratios."""
    settings = ExpertsConfig(experts, TOP_K, width)
    mx.random.seed(0)
    ours = SwitchGLU(hidden, settings)
    if bits:
        nn.quantize(ours, group_size=64, bits=bits)
    mx.eval(ours.parameters())
    theirs = mlx_lm_twin(ours, hidden, settings)
    lay_out_for_cpu(ours)  # as loading a checkpoint does
    shape = Shape(hidden, experts, TOP_K, mx.float32)
    start = time.perf_counter()
    plan = measure([ours], shape, (*DECODE_TOKENS, ROUTES[-1] // TOP_K), PORTABLE).plan(TOP_K, PORTABLE)
    took = time.perf_counter() - start
    ours.use_dispatch(plan)
    print(f"{experts} experts, {hidden} -> {width}, {bits or 32} bits; calibrated in {took:.1f} s", flush=True)
    ratios = []
    for routes in ROUTES:
        x, chosen = random_pass(shape, routes // TOP_K, seed=99)
        mx.eval(x, chosen)
        found = interleaved(lambda x=x, chosen=chosen: theirs(x, chosen),
                            lambda x=x, chosen=chosen: ours(x, chosen), seconds)
        goal = TARGET if (experts, hidden, width, routes) == TARGET_SHAPE and not bits else ALLOWED
        print(f"  {routes:4} routes  mlx-lm {found.milliseconds:8.2f} ms  {plan.strategy(routes):10} "
              f"{found.fastest:.2f} x  (median {found.median:.2f})"
              + ("" if found.fastest <= goal else f"  above {goal}"), flush=True)
        ratios.append(found.fastest)
    return ratios


def print_reads(experts: int = 128, top_k: int = 8, drafts: int = 3) -> None:
    """What one layer reads in a round of drafts, in experts: uniform routing."""
    print(f"reads of experts, {experts} experts, top {top_k}, K = {drafts}, uniform routing, mean of 100 draws")
    rng = np.random.default_rng(0)
    for rows in (1, 2, 4, 8):
        routes = rows * (drafts + 1) * top_k
        distinct, tiles = [], []
        for _ in range(100):
            flat = mx.array(np.argsort(rng.random((routes // top_k, experts)), axis=1)[:, :top_k].flatten(), mx.uint32)
            distinct.append(distinct_experts(flat).item())
            tiles.append((tiles_of(flat, experts, TILE_ROWS).rows > 0).sum().item())
        print(f"  {rows} rows: {routes} routes (gather reads one each)  distinct {np.mean(distinct):.1f}  "
              f"kernel and grouped-{TILE_ROWS} read {np.mean(tiles):.1f}  (grouped runs "
              f"{most_tiles(routes, experts, TILE_ROWS)} tiles, those not needed on the last expert)")


def main() -> int:
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("--experts", type=int, nargs="+", default=[16, 32, 64, 128])
    cli.add_argument("--widths", nargs="+", default=["128x256", "512x256", "512x1024", "1024x512"],
                     help="hidden x intermediate")
    cli.add_argument("--bits", type=int, nargs="+", default=[0], help="0 is float32; 4 and 8 by groups of 64")
    cli.add_argument("--seconds", type=float, default=0.5, help="a count of routes")
    cli.add_argument("--reads", action="store_true", help="count reads only")
    blas.add_flag(cli)
    args = cli.parse_args()
    if args.reads:
        print_reads()
        return 0
    for key, value in environment_card().items():
        print(f"{key:10} {value}")
    ratios: list[float] = []
    for bits, experts, width in product(args.bits, args.experts, args.widths):
        ratios += compare(experts, *map(int, width.split("x")), bits, args.seconds)
    slower = sum(ratio > ALLOWED for ratio in ratios)
    print(f"{len(ratios)} cells: median {statistics.median(ratios):.2f} x, worst {max(ratios):.2f} x, "
          f"best {min(ratios):.2f} x; {slower} above {ALLOWED}")
    return 0


if __name__ == "__main__":
    blas.prefer_openblas()
    sys.exit(guarded(main))

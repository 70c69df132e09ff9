"""Published measurements of Gemma 4 with its drafter on MLX, beside what the bytes model says of the same case.

The estimate's constants (`round_cost.MEASURED`) are one set for all rows. They were rounded from some of these very
measurements (the 31B on M3 Ultra, both on M1 Ultra), so those rows test the model's form, the others its reach.

Sources, all public: mlxcel (github.com/lablup/mlxcel: docs/benchmark_results, README, issue 1217, pull requests 216 and
1621); mlx-vlm (github.com/Blaizzy/mlx-vlm: issue 1144); omlx on an M5 and an M2 Pro, one person's notes of August 2026;
the rest, marked so, is arithmetic on the architecture, or a figure whose author does not say how it was taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bench.chips import chip
from bench.model_bytes import Dispatch, family_drafter, family_target
from bench.round_cost import BOUND, MEASURED, Decoding
from mlx_mtp.convert import recipes

TOLERANCE = 0.25
CODE = (0.77,)  # the middle of what is published for code, 0.66 to 0.88; for rows that state no acceptance

# mlx-community's 12B "4bit" keeps its MLPs at 8 bits (seen by mlxcel, pull request 1192).
MLP_AT_8_BITS = (recipes.Rule(recipes.MLP, 4, "as mlx-community's checkpoint"),)


@dataclass(frozen=True)
class Row:
    """published: from lowest to highest. lacks: what the publication does not say. reason: likely, of a miss."""

    what: str
    published: tuple[float, float]
    model: float | None
    lacks: str = ""
    reason: str = ""

    @property
    def error(self) -> float | None:
        """How far the model is from the nearest published figure, as a share of it."""
        if self.model is None:
            return None
        low, high = self.published
        nearest = min(max(self.model, low), high)
        return self.model / nearest - 1

    @property
    def is_within(self) -> bool:
        return self.error is not None and abs(self.error) <= TOLERANCE

    @property
    def verdict(self) -> str:
        said = "no figure" if self.error is None else f"{self.error:+.0%}"
        if self.lacks:
            return f"{said}; states too little: {self.lacks}"
        return said if self.is_within else f"MISSES, {said}: {self.reason}"


def decoding(
    chip_name: str, model: str, bits: int, draft_bits: int, rows: int = 1, mode: str = "affine",
    dispatch: Dispatch = "sorted",
) -> Decoding:
    """As mlx-community quantizes: every module alike, but for the 12B's MLPs."""
    target = family_target(model, bits, "uniform")
    if model == "12B":
        target = replace(target, rules=MLP_AT_8_BITS)
    if mode != "affine":
        target = replace(target, settings=recipes.asked(None, None, mode))
    drafter = family_drafter(target, draft_bits)
    return Decoding(chip(chip_name), target, drafter, rows, dispatch=dispatch, efficiency=MEASURED)


def rows() -> Iterator[Row]:
    yield from plain_rows()
    yield from dense_rows()
    yield from mixture_rows()
    yield from arithmetic_rows()
    yield from vague_rows()


def plain_rows() -> Iterator[Row]:
    """Tokens/s of plain decoding at one row: what share of its bandwidth a chip reaches."""
    cases = (
        ("M3 Ultra", "31B", "affine", 31.7), ("M3 Ultra", "12B", "affine", 64.0), ("M5 Max", "31B", "affine", 26.0),
        ("M5 Max", "12B", "affine", 43.3), ("M5", "26B-A4B", "nvfp4", 38.7), ("M1 Ultra", "31B", "affine", 18.2),
        ("M1 Ultra", "12B", "affine", 34.5),
    )
    for chip_name, model, mode, speed in cases:
        plain = decoding(chip_name, model, 4, 4, mode=mode).tokens_per_second(0, CODE)
        yield Row(f"{model}, {chip_name}: plain tok/s ({'omlx' if chip_name == 'M5' else 'mlxcel'})", (speed, speed),
                  plain, reason="M1 Ultra reaches 0.4 to 0.5 of its bandwidth, the estimate takes 0.8 for every chip"
                  if chip_name == "M1 Ultra" else "")


def dense_rows() -> Iterator[Row]:
    """Speed-up over plain decoding, from the mean acceptance length that was measured beside it."""
    cases = (  # chip, model, drafter's bits, task, K, mean acceptance length, speed-up
        ("M3 Ultra", "31B", 16, "enumeration", 3, 3.990, 2.65),
        ("M3 Ultra", "31B", 16, "code", 3, 3.646, 2.41),
        ("M3 Ultra", "31B", 16, "prose", 3, 2.956, 1.95),
        ("M3 Ultra", "31B", 16, "code", 1, 1.942, 1.68),
        ("M3 Ultra", "31B", 16, "code", 2, 2.794, 2.12),
        ("M3 Ultra", "31B", 16, "code", 4, 4.096, 2.44),
        ("M3 Ultra", "31B", 16, "code", 5, 4.530, 2.37),
        ("M3 Ultra", "31B", 16, "code", 7, 4.983, 2.32),
        ("M1 Ultra", "31B", 16, "a short answer", 3, 2.59, 14.8 / 18.2),  # drafted and plain from two different runs
        ("M5 Max", "12B", 4, "enumeration", 3, 3.990, 3.14),
        ("M5 Max", "12B", 4, "prose", 3, 2.463, 1.90),
        # The author gives this host's lengths by the cost of a round only: 1.51 x 1.74, and 3.990 on the other two.
        ("M3 Ultra", "12B", 4, "enumeration", 3, 3.990, 2.61),
        ("M3 Ultra", "12B", 4, "prose", 3, 2.63, 1.74),
        ("M1 Ultra", "12B", 4, "enumeration", 3, 3.990, 1.48),
        ("M1 Ultra", "12B", 4, "code", 4, 3.934, 1.25),
        ("M1 Ultra", "12B", 4, "prose", 3, 2.574, 0.95),
    )
    for chip_name, model, draft_bits, task, k, length, speedup in cases:
        cost = decoding(chip_name, model, 4, draft_bits).round_cost(k)
        yield Row(f"{model}, {chip_name}, {task}, K = {k}: speed-up (mlxcel)", (speedup, speedup), length / cost)


def mixture_rows() -> Iterator[Row]:
    m5 = decoding("M5", "26B-A4B", 4, 4, mode="nvfp4").round_cost(4)
    yield Row("26B, M5, prose, K = 4: speed-up (omlx)", (0.991, 0.997), 2.60 / m5)
    yield Row("26B, M5, code, K = 4: speed-up (omlx)", (1.215, 1.215), 3.35 / m5)
    yield Row("26B, M5: plain steps of one more position, draft included (omlx)", (0.425, 0.43), (m5 - 1) / 4)
    four = decoding("M5 Max", "26B-A4B", 16, 16, rows=4).round_cost(3)
    yield Row("26B bf16, M5 Max, 4 rows, K = 3: speed-up (mlx-vlm)", (0.74, 0.74), 2.48 / four)


def arithmetic_rows() -> Iterator[Row]:
    """Not measured by anyone: published reasoning about bytes that ours should repeat."""
    target = family_target("26B-A4B", 4, "uniform")
    one = target.weight_bytes(1, "per route")
    for tokens in (4, 8, 16, 32):
        published = 0.625 + 0.375 * tokens
        yield Row(f"26B, pass over {tokens} tokens, experts per route, in plain passes (arithmetic)",
                  (published, published), target.weight_bytes(tokens, "per route") / one)
    for tokens, published in ((8, 3.0), (16, 4.5), (32, 5.9)):
        yield Row(f"26B, pass over {tokens} tokens, experts once, in plain passes (arithmetic)",
                  (published, published), target.weight_bytes(tokens, "once") / one)
    for model, published in (("26B-A4B", 0.39), ("12B", 0.13), ("31B", 0.05)):
        target = family_target(model, 4, "uniform")
        yield Row(f"{model}: a bf16 drafter's step in bytes of a 4-bit plain pass (arithmetic)", (published, published),
                  family_drafter(target, 16).step(1).bytes / target.weight_bytes(1, "once"))
    cache = family_target("26B-A4B", 4)
    yield Row("26B: KB of K/V a token beyond the window (arithmetic)", (20.0, 20.0),
              (cache.kv_bytes(5000) - cache.kv_bytes(4000)) / 1000 / 1024)


def vague_rows() -> Iterator[Row]:
    """Published without the chip, K or acceptance; the model's figure is for the assumption that stands beside it."""
    short = decoding("M5 Max", "31B", 4, 16)
    yield Row("31B, M5 Max, short context: speed-up", (1.9, 1.9), short.speedup(3, CODE),
              "neither K nor acceptance; here K = 3 and 0.77")
    yield Row("31B, M5 Max: speed-up at 200k over that at short context", (1.4 / 1.9, 1.4 / 1.9),
              short.round_cost(3) / replace(short, context=200_000).round_cost(3),
              "not K (here 3). Heads of 512 have no fused attention in MLX, so K/V cost more than their bytes")
    for model in ("E2B", "E4B"):
        edge = decoding("M4 Max", model, 4, 16)
        yield Row(f"{model}, code: speed-up", (1.27, 1.27), edge.speedup(3, CODE),
                  "neither chip, K nor acceptance; here M4 Max, 3 and 0.77. The passes are a few ms: starting hundreds "
                  "of kernels counts, and bytes do not see it")
    yield Row("E2B and E4B, essays: speed-up", (0.0, 1.0), None, "neither chip, K nor acceptance")
    other = decoding("M5", "31B", 4, 4, mode="mxfp4")
    yield Row("dense, M5: plain steps of one more position, draft included (omlx)", (0.087, 0.09),
              (other.round_cost(3) - 1) / 3, "measured on another family's 27B with a one-layer head; here the 31B")
    code = decoding("M5 Max", "26B-A4B", 4, 4)
    yield Row("26B, code, one row: speed-up", (1.16, 1.37), code.speedup(3, CODE),
              "neither chip, K nor acceptance (but see M5 above); here M5 Max, 4-bit drafter, 3 and 0.77")
    older = decoding("M2 Pro", "26B-A4B", 4, 4, mode="nvfp4")
    yield Row("26B, M2 Pro: speed-up (omlx)", (0.88, 0.88), 2.60 / older.round_cost(4),
              "neither K nor acceptance; here as the same author's on M5, K = 4 and 2.60 tokens a round")
    eight = decoding("M5 Max", "26B-A4B", 16, 16, rows=8)
    yield Row("26B bf16, M5 Max, 8 to 11 rows, K = 3: speed-up (mlx-vlm)", (1.04, 1.11), 2.48 / eight.round_cost(3),
              "no acceptance there (here as at 4 rows), and its author says that one row was decoded apart. With "
              f"experts read once it would be {2.48 / replace(eight, dispatch='once').round_cost(3):.2f}: MLX's bf16 "
              "gather does reuse experts from 2 routes each on")
    yield from _of_others()


def _of_others() -> Iterator[Row]:
    for rows_ in (4, 8):
        cases = [decoding(name, "26B-A4B", 4, 4, rows=rows_) for name in ("M3 Ultra", "M5 Max")]
        best, bound = (max(replace(case, dispatch="once", efficiency=efficiency).speedup(
            k, (0.8,), replace(case, efficiency=efficiency)) for case in cases for k in range(1, 8))
            for efficiency in (MEASURED, BOUND))
        yield Row(f"26B, Apple Silicon, batch 4 to 8: speed-up (Google), here {rows_} rows", (2.2, 2.2), best,
                  "neither chip, bits, K nor acceptance; here experts once over plain decoding with MLX's, 4 bits, "
                  f"0.8, the better of M3 Ultra and M5 Max at the best K up to 7; the roofline allows {bound:.2f}")
    yield Row("8 concurrent requests: K = 2 over K = 4", (304 / 210, 304 / 210), None, "neither model nor chip")
    yield Row("26B and 31B on H100 (vLLM)", (1.49, 3.1), None, "not a chip of this table, nor MLX")


def table() -> str:
    lines = ["| published | measured | model | verdict |", "|---|---|---|---|"]
    for row in rows():
        low, high = row.published
        published = f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"
        model = "none" if row.model is None else f"{row.model:.2f}"
        lines.append(f"| {row.what} | {published} | {model} | {row.verdict} |")
    return "\n".join(lines)

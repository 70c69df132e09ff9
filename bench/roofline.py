"""The bytes model: what a round moves, what that bounds, and from which acceptance on drafting pays.

    python -m bench.roofline                                          26B-A4B at 4 bits on an M3 Ultra
    python -m bench.roofline --chip "M5 Max" "M1 Max" --model 31B --rows 1 --context 32768
    python -m bench.roofline --published                              beside published measurements
    python -m bench.roofline --chip all --plot speedup.png            needs the extra `bench`

Nothing here was measured by running: chips are as specified, models as published. "Bound" is the roofline, the chip's
full bandwidth or FLOP/s, whichever is slower; "estimate" takes `round_cost.MEASURED`. Of a mixture, "MLX" reads an
expert once for every route until there are four routes an expert, "once" each distinct expert once; a speed-up is over
plain decoding with the same dispatch, where nothing else is said.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn, TypeVar

from bench.chips import CHIPS, Chip, chip
from bench.model_bytes import BITS, Dispatch, family_drafter, family_target
from bench.published import table as published_table
from bench.recipe_sizes import FAMILY
from bench.round_cost import MEASURED, Decoding, Efficiency, mean_acceptance_length
from mlx_mtp.convert.recipes import RECIPES
from mlx_mtp.errors import MtpError, RequestError

USER_ERROR = 2
ALL = "all"
LABELS: dict[Dispatch, str] = {"sorted": "MLX", "once": "once"}
OVER_MLX = "once, over plain decoding with MLX's"
COLORS, MARKERS = 10, "osv^"
PLOTTED_ROWS = (1, 2, 3, 4, 6, 8, 12, 16)

N = TypeVar("N", int, float)


class Parser(argparse.ArgumentParser):
    """Complains in one line that begins with "error:"."""

    def error(self, message: str) -> NoReturn:
        self.exit(USER_ERROR, f"error: {message}; see --help\n")


def number(kind: Callable[[str], N], lowest: float, highest: float = math.inf) -> Callable[[str], N]:
    """An argparse type."""
    def parse(text: str) -> N:
        value = kind(text)
        if not lowest <= value <= highest:
            upper = "" if highest == math.inf else f" and at most {highest:g}"
            raise argparse.ArgumentTypeError(f"{text} is out of range; expected at least {lowest:g}{upper}")
        return value

    parse.__name__ = "number"
    return parse


def parser() -> argparse.ArgumentParser:
    cli = Parser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("--chip", nargs="+", default=["M3 Ultra"], metavar="NAME", help=f"or {ALL} (default: M3 Ultra)")
    cli.add_argument("--model", nargs="+", default=["26B-A4B"], metavar="NAME",
                     help=f"of {', '.join(FAMILY)}, or {ALL} (default: 26B-A4B)")
    cli.add_argument("--bits", type=int, choices=BITS, default=4)
    cli.add_argument("--draft-bits", type=int, choices=BITS, default=4)
    cli.add_argument("--recipe", choices=RECIPES, default=RECIPES[0])
    cli.add_argument("--rows", type=number(int, 1), nargs="+", default=[1, 4, 8])
    cli.add_argument("--num-draft-tokens", type=number(int, 0), nargs="+", default=list(range(8)), metavar="K")
    cli.add_argument("--context", type=number(int, 0), default=1024, help="tokens of each row")
    cli.add_argument("--acceptance", type=number(float, 0, 1), nargs="+", default=[0.8], help="of a draft whose "
                     "predecessors were accepted; several: by position, the last one goes on (default: 0.8)")
    cli.add_argument("--bandwidth-share", type=number(float, 0.01, 1), default=MEASURED.bandwidth,
                     help="of the chip's bandwidth, in the estimate (default: %(default)s)")
    cli.add_argument("--compute-share", type=number(float, 0.01, 1), default=MEASURED.compute,
                     help="of the chip's FLOP/s, in the estimate (default: %(default)s)")
    cli.add_argument("--published", action="store_true", help="compare with published measurements instead")
    cli.add_argument("--plot", type=Path, metavar="FILE", help="speed-up against rows, for every chip and model")
    return cli


def chips(names: Sequence[str]) -> list[Chip]:
    return list(CHIPS.values()) if ALL in names else [chip(name) for name in names]


def decodings(args: argparse.Namespace) -> list[Decoding]:
    """Every model on every chip, one row, as the roofline sees them."""
    found = []
    for name in FAMILY if ALL in args.model else args.model:
        target = family_target(name, args.bits, args.recipe)
        drafter = family_drafter(target, args.draft_bits)
        found += [Decoding(on, target, drafter, context=args.context) for on in chips(args.chip)]
    return found


def dispatches(decoding: Decoding) -> tuple[Dispatch, ...]:
    """Those that differ: a dense model has no experts to read again."""
    return ("once",) if decoding.target.config.text.experts is None else ("sorted", "once")


def heading(decoding: Decoding, args: argparse.Namespace) -> str:
    on, target = decoding.chip, decoding.target
    return (f"{target.name} at {args.bits} bits ({args.recipe}, {target.total.bytes / 1e9:.2f} GB) on {on.name} "
            f"({on.bandwidth:g} GB/s, {on.flop_per_second / 1e12:.1f} TFLOP/s). Drafter at {args.draft_bits} bits: "
            f"{decoding.drafter.step(1).bytes / 1e9:.3f} GB a step. K/V at {args.context} tokens: "
            f"{target.kv_bytes(args.context) / 1e9:.3f} GB a row and pass, "
            f"{decoding.drafter.kv_bytes(args.context) / 1e9:.4f} a row and draft. "
            f"Acceptance {spelled(args.acceptance)}.")


def spelled(numbers: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in numbers)


def estimate(args: argparse.Namespace) -> Efficiency:
    return replace(MEASURED, bandwidth=args.bandwidth_share, compute=args.compute_share)


def table(decoding: Decoding, args: argparse.Namespace) -> str:
    """One line for each batch and K; pairs of figures are bound / estimate."""
    kinds = dispatches(decoding)
    names = {kind: f", {LABELS[kind]}" if len(kinds) > 1 else "" for kind in kinds}
    columns = ["rows", "K", "tokens a round", *(["GB a pass, per route"] if len(kinds) > 1 else []),
               *(f"{column}{names[kind]}" for column in ("GB a pass", "tok/s", "speed-up", "break-even acceptance")
                 for kind in kinds), *([OVER_MLX] if len(kinds) > 1 else []), "bound by"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for rows in args.rows:
        for k in args.num_draft_tokens:
            pairs = [[replace(decoding, rows=rows, dispatch=kind, efficiency=efficiency)
                      for efficiency in (decoding.efficiency, estimate(args))] for kind in kinds]
            cells = [str(rows), str(k), f"{mean_acceptance_length(args.acceptance, k):.2f}"]
            if len(kinds) > 1:
                cells.append(f"{replace(pairs[0][0], dispatch='per route').pass_bytes(k) / 1e9:.2f}")
            cells += [f"{bound.pass_bytes(k) / 1e9:.2f}" for bound, _ in pairs]
            cells += [" / ".join(f"{case.tokens_per_second(k, args.acceptance):.0f}" for case in pair)
                      for pair in pairs]
            cells += [" / ".join(f"{case.speedup(k, args.acceptance):.2f}" for case in pair) for pair in pairs]
            cells += [" / ".join(break_even(case, k) for case in pair) for pair in pairs]
            if len(kinds) > 1:
                cells.append(" / ".join(f"{once.speedup(k, args.acceptance, plain=as_mlx):.2f}"
                                        for as_mlx, once in zip(*pairs, strict=True)))
            cells.append("FLOP/s" if pairs[-1][0].is_compute_bound(k) else "bytes")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def break_even(case: Decoding, num_draft_tokens: int) -> str:
    acceptance = case.break_even(num_draft_tokens) if num_draft_tokens else 0.0
    return "never" if acceptance is None else f"{acceptance:.2f}"


def plot(cases: Sequence[Decoding], args: argparse.Namespace) -> None:
    """Speed-up over MLX's plain decoding, with the best K of those asked for, against rows: estimates, a panel a model.

    Raises RequestError where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # an extra
    except ModuleNotFoundError as error:
        raise RequestError("--plot needs matplotlib, which is not installed: pip install 'mlx-mtp[bench]'") from error
    models = list(dict.fromkeys(case.target.name for case in cases))
    figure = Figure(figsize=(6 * len(models), 4.5), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        of_model = [case for case in cases if case.target.name == model]
        for i, case in enumerate(of_model):
            for kind in dispatches(case):
                speedups = [best_speedup(replace(case, rows=rows, efficiency=estimate(args)), kind, args)
                            for rows in PLOTTED_ROWS]
                axes.plot(PLOTTED_ROWS, speedups, color=f"C{i % COLORS}", marker=MARKERS[i // COLORS],
                          linestyle="-" if kind == "once" else "--", label=case.chip.name if kind == "once" else None)
        axes.axhline(1, color="grey", linewidth=0.8)
        dashed = "; experts read once, dashed: as MLX does" if len(dispatches(of_model[0])) > 1 else ""
        axes.set(xlabel="rows", ylabel="speed-up over plain decoding in MLX, best K",
                 title=f"{model}, {args.bits} bits, acceptance {spelled(args.acceptance)}\n(estimate{dashed})")
        axes.legend(fontsize="x-small", ncols=1 + len(of_model) // COLORS)
    try:
        figure.savefig(args.plot, dpi=150)
    except (OSError, ValueError) as error:  # ValueError: a format that matplotlib does not have
        raise RequestError(f"--plot {args.plot} cannot be written ({error}); give a .png, .svg or .pdf file in a "
                           "folder that exists") from error


def best_speedup(case: Decoding, kind: Dispatch, args: argparse.Namespace) -> float:
    """Over plain decoding as MLX does it today, so that the ways of dispatch can be compared."""
    drafted, plain = replace(case, dispatch=kind), replace(case, dispatch="sorted")
    return max(drafted.speedup(k, args.acceptance, plain) for k in args.num_draft_tokens)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        if args.published:
            print(published_table())
            return 0
        cases = decodings(args)
        for case in cases:
            print(heading(case, args), table(case, args), sep="\n\n", end="\n\n")
        if args.plot is not None:
            plot(cases, args)
    except MtpError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How fast does it decode, against what, and why: rows × K × prompts × context, with baselines in the same run.

    python -m bench.decode --quick                                   the built-in pair, under a minute
    python -m bench.decode --model FOLDER --peers --output results/
    python -m bench.decode --model FOLDER --acceptance 0.8 --prompts random ragged

Texts are compared with plain decoding before any speed is printed. Decoders take turns within a cell. `--acceptance`
replaces the drafter's words by known ones, right as often as was asked, while its steps are still paid for. Of earlier
runs only one thing is used: which way through a mixture's experts is the fastest here, as for every user; with
`--no-calibration` it is the default way. The JSON file's schema stands in bench/record.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import blas, plots
from bench.bandwidth import PROBE_BYTES, measure_bandwidth
from bench.card import checkpoint_card, environment_card, print_card
from bench.peers import load_peers
from bench.prompts import ALL_KINDS
from bench.record import (
    COLUMNS,
    SPLIT_COLUMNS,
    Agreement,
    Record,
    cell_lines,
    print_table,
    split_lines,
)
from bench.sweep import NoPeers, ParityError, Peers, Sweep, SweepConfig, is_exact
from mlx_mtp import Pair, demo
from mlx_mtp.api import NO_DRAFTER
from mlx_mtp.check import command as command_line
from mlx_mtp.check import loading
from mlx_mtp.check.command import check_output_folder
from mlx_mtp.checkpoint.hub import find_drafter, local_folder
from mlx_mtp.command import Parser, num_draft_tokens
from mlx_mtp.config import AUTO
from mlx_mtp.device import wired_memory
from mlx_mtp.errors import RequestError

QUICK = SweepConfig(rows=(1, 4), num_draft_tokens=(0, 3, AUTO), prompts=("code", "prose"), max_tokens=32, runs=3)
NOT_PARITY = 1
MOST_APART = 0.03  # of the bench's tokens/s from generate's own


def add_sweep_flags(cli: argparse.ArgumentParser) -> None:
    """The fields of SweepConfig; what is not given keeps its default, or --quick's."""
    add, default = cli.add_argument, SweepConfig()
    many = {"nargs": "+", "metavar": "N"}
    add("--rows", type=int, **many, help=f"batch sizes (default: {_shown(default.rows)})")
    add("--num-draft-tokens", type=num_draft_tokens, **many,
        help=f"K, or auto; 0 is always among them (default: {_shown(default.num_draft_tokens)})")
    add("--prompts", nargs="+", metavar="KIND", help=f"of {', '.join(ALL_KINDS)} (default: {_shown(default.prompts)})")
    add("--context", type=int, **many, help="fill prompts up to so many tokens; 0: as they are (default: "
                                            f"{_shown(default.context)})")
    add("--max-tokens", type=int, help=f"of an answer (default: {default.max_tokens})")
    add("--runs", type=int, help=f"measured runs after a warm-up (default: {default.runs})")
    add("--output", type=Path, metavar="FOLDER", help="for decode.json and the plots (default: bench-results)",
        default=Path("bench-results"))
    add("--no-plots", dest="plots", action="store_false", help="only the tables and the JSON file")
    add("--no-calibration", action="store_true", help="run a mixture's experts the default way, not the fastest one "
                                                      "here")
    add("--quick", action="store_true", help="a small sweep, for a first look; other flags change it")
    blas.add_flag(cli)


def parser() -> argparse.ArgumentParser:
    cli = Parser(prog="python -m bench.decode", description=(__doc__ or "").splitlines()[0])
    cli.add_argument("--model", help="checkpoint folder or Hub name (default: the built-in pair)")
    cli.add_argument("--draft-model", default=AUTO, help="drafter's folder or Hub name, or 'none' (default: "
                                                         "%(default)s)")
    cli.add_argument("--peers", action="store_true", default=None,
                     help="mlx-lm and mlx-vlm in turns with ours, where they are installed")
    cli.add_argument("--acceptance", type=float, metavar="A",
                     help="replay known texts, right with this probability at each position (default: the drafter's "
                          "own words)")
    add_sweep_flags(cli)
    return cli


def sweep_config(args: argparse.Namespace, **fixed: Any) -> SweepConfig:
    """`fixed` over what was given over --quick's or the default values."""
    base = asdict(QUICK if args.quick else SweepConfig())
    given = {name: value for name, value in vars(args).items() if name in base and value is not None}
    return SweepConfig(**{name: tuple(value) if isinstance(value, list) else value
                          for name, value in (base | given | fixed).items()})


def run(
    pair: Pair, config: SweepConfig, card: dict[str, str], peers: Peers, tell: Callable[[str], None]
) -> Record:
    """Checks, measures and prints the tables. Raises ParityError."""
    print_card(card)
    bandwidth = measure_bandwidth(pair.target.dtype)
    print_card({"bandwidth": f"{bandwidth.best:.1f} GB/s (best of: adding to numbers {bandwidth.copy:.1f}, matrix "
                             f"times vector {bandwidth.matvec:.1f}; {PROBE_BYTES / 1e9:.2f} GB each)"})
    sweep = Sweep(pair, config, bandwidth, peers)
    with wired_memory():
        sweep.check(tell)
        cells = tuple(sweep.measure(tell))
        agreement = tuple(sweep.agreement())
    tell("")
    record = Record(card, asdict(config), asdict(bandwidth) | {"best": bandwidth.best}, is_exact(pair), cells,
                    agreement)
    report(record)
    return record


def report(record: Record) -> None:
    """The tables, with what is true of all of them."""
    runs = record.settings["runs"]
    print(f"\ngreedy; medians of {runs} runs after a warm-up, decoders in turns; speed-up over ours with K = 0; "
          f"{_drafts(record)}")
    print_table(COLUMNS, [line for cell in record.cells for line in cell_lines(cell)])
    print("\na round of ours, and its parts measured alone, in turns: K drafter steps, one verifying pass, the rest")
    print_table(SPLIT_COLUMNS, [line for cell in record.cells for line in split_lines(cell)])
    for one in record.agreement:
        print(_agreement_line(one))
    differing = [runner for cell in record.cells for runner in cell.runners
                 if runner.difference is not None and runner.name == "ours"]
    if differing:
        first = differing[0].difference
        assert first is not None
        print(f"note: in {len(differing)} lines ours differs from plain decoding, first at token {first.position}, as "
              "near-ties may in this arithmetic; see python -m mlx_mtp.check")


def _drafts(record: Record) -> str:
    acceptance = record.settings["acceptance"]
    return "drafts by the drafter" if acceptance is None else (
        f"drafts replayed, right with probability {acceptance}, the drafter's steps really run")


def _agreement_line(one: Agreement) -> str:
    return (f"overhead: K = {one.num_draft_tokens}, bench {one.bench_tokens_per_s.median:.1f} tok/s, generate's own "
            f"{one.generate_tokens_per_s.median:.1f}: {one.apart:.1%} apart, the median of pairs"
            + (f", which is more than {MOST_APART:.0%}: the machine was not quiet" if one.apart > MOST_APART else ""))


def save(record: Record, folder: Path, with_plots: bool) -> None:
    tell("")
    record.write(folder / "decode.json")
    written = [folder / "decode.json"]
    if with_plots:
        written += plots.draw(asdict(record), folder)
    print("wrote " + ", ".join(map(str, written)))


def guarded(command: Callable[[], None]) -> int:
    """Runs a command; returns 0, 1 if drafting changed a text, 2 for what the user can fix, with one line for each.

    130 after Ctrl-C, 141 where nobody reads the tables any more.
    """
    def run() -> int:
        try:
            command()
        except ParityError as error:
            tell("")
            print(f"error: drafting changed a text: {error}", file=sys.stderr)
            return NOT_PARITY
        return 0

    return command_line.guarded(run, lambda: tell(""))


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    return guarded(lambda: _main(args))


def _main(args: argparse.Namespace) -> None:
    config = sweep_config(args)
    if args.plots:
        plots.check_installed()
    check_output_folder(args.output)
    pair = loading.load(args.model, args.draft_model, calibrate=not args.no_calibration)
    target, drafter = folders(args.model, args.draft_model)
    if pair.drafter is None and (config.acceptance is not None):
        raise RequestError("--acceptance replays a drafter's words, and there is no drafter: name one with "
                           "--draft-model")
    card = environment_card() | checkpoint_card(pair, target, drafter)
    with tempfile.TemporaryDirectory() as work:
        peers: Peers = NoPeers()
        if config.peers:
            peers = load_peers(target, drafter, pair.target.dtype, Path(work), print)
        record = run(pair, config, card, peers, tell)
    save(record, args.output, args.plots)


def folders(model: str | None, draft_model: str | None) -> tuple[Path, Path | None]:
    """Where the two checkpoints that `mlx_mtp.load` took lie."""
    if draft_model == AUTO:
        drafter = find_drafter(model or demo.TARGET)
    else:
        drafter = None if draft_model in (None, NO_DRAFTER) else local_folder(draft_model)
    return local_folder(model or demo.TARGET), drafter


def tell(text: str) -> None:
    """Progress, on a terminal's last line only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _shown(values: Sequence[Any]) -> str:
    return " ".join(map(str, values))


if __name__ == "__main__":
    blas.prefer_openblas()
    sys.exit(main())

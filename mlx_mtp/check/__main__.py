"""The command `python -m mlx_mtp.check`: does the lossless promise hold on this machine, with this checkpoint?

Prompts are decoded by the engine, greedy and sampled, for several numbers of rows and drafts; then each token of each
text is judged by plain decoding (see `replay`). The verdict and its table go to stdout, everything else to stderr.

Exit codes: 0 the promise holds; 1 it is broken, or no draft was rejected, which proves nothing; 2 bad input, or a disk
that is full; 130 after Ctrl-C; 141 without a reader. It compares paths of this package with its own plain decoding.
Whether that computes Gemma 4 is another question, which the tests ask of transformers. Nothing is taken from earlier
runs but which way through a mixture's experts is the fastest here, for that is the one to be checked (see `loading`).

The report that --output writes is one JSON object:

    verdict      "holds", "broken" or "proves nothing"; reason: the same in a sentence or two
    environment  device, versions, checkpoint (name and fingerprint), dtype of the activations, drafter
    settings     rows, num_draft_tokens, max_tokens, temperatures, tolerance (logits)
    totals       the sums of the cells' counts; replays, replayed_tokens: of distinct texts (stop tokens count);
                 seconds: of the whole sweep
    cells        a list: rows, num_draft_tokens; texts, and plain_texts that equal plain decoding's; tokens; rounds;
                 drafted, and of these rejected (in the middle of a text); near_ties; violations
    margins      a list: tokens of distinct texts by the size of a margin in logits, above the entry before and as far
                 as up_to (null: any); decided: by how much plain decoding's choice beats its second; flipped: by how
                 much an emitted token that is not its choice loses to that
    violations   a list, at most one a text, the first: prompt, temperature, seed, rows, num_draft_tokens; index in the
                 answer, position in the row; got, expected: token ids (null: the text's end); margin (null: not a
                 matter of margins). near_ties: likewise, those within the tolerance
    notes        a list of sentences
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from mlx_mtp import api, prompts_file
from mlx_mtp.api import Pair
from mlx_mtp.check import environment, loading, prompts, sweep
from mlx_mtp.check.command import check_output_folder, guarded, write_whole
from mlx_mtp.check.margins import default_tolerance
from mlx_mtp.check.prompts import Case
from mlx_mtp.check.report import Report, console_for_stdout
from mlx_mtp.check.settings import QUICK, CheckConfig
from mlx_mtp.command import Parser, check_output, num_draft_tokens
from mlx_mtp.config import SamplingParams
from mlx_mtp.progress import Progress
from mlx_mtp.prompts_file import Line

NOT_SHOWN_TO_HOLD = 1


def parser() -> argparse.ArgumentParser:
    """The flags; one that is not given is CheckConfig's default, or QUICK's."""
    default = CheckConfig()
    cli = Parser(prog="python -m mlx_mtp.check", description="Check that drafting and batching change no text: "
                                                                    "on this machine, with this checkpoint.")
    add = cli.add_argument
    add("--model", help="checkpoint folder or Hub name (default: the small built-in demonstration pair)")
    add("--draft-model", default=api.AUTO, help="drafter's folder or Hub name, or 'none' (default: auto, which looks "
                                               "for <model>-assistant)")
    add("--draft-bits", type=int, help="quantize the drafter to this many bits while loading")
    add("--max-context", type=int, help="limit of prompt and answer together, in tokens; memory is planned for it "
                                        "(default: the model's own)")
    add("--prompts-file", metavar="FILE", help="prompts to decode instead of the bundled ones, one a line as for "
                                               "generate (- reads stdin); a line with settings of its own is decoded "
                                               "with these alone")
    add("--max-tokens", "-m", type=int, help=f"of each answer (default: {default.max_tokens})")
    add("--rows", type=int, nargs="+", metavar="N", help="requests decoded together, one sweep for each (default: "
                                                         f"{_words(default.rows)})")
    add("--num-draft-tokens", type=num_draft_tokens, nargs="+", metavar="K",
        help=f"drafts a round, likewise (default: {_words(default.num_draft_tokens)})")
    add("--temp", type=float, nargs="+", metavar="T", dest="temperatures",
        help=f"temperatures, likewise; 0 is greedy (default: {_words(default.temperatures)})")
    add("--tolerance", type=float, metavar="LOGITS", help="by how much a token may lose to plain decoding's choice "
                                                          "(default: what rounding can explain, by dtype)")
    add("--no-calibration", action="store_true", help="run a mixture's experts the default way, not the one that is "
                                                      "the fastest here, which is what generate runs")
    add("--no-kernels", action="store_true", help="run MLX's own operations only, no GPU kernels of this package")
    add("--output", type=Path, metavar="FILE", help="write the report there, as JSON")
    add("--quick", action="store_true", help=f"fewer cells and tokens: rows {_words(QUICK.rows)}, K "
                                             f"{_words(QUICK.num_draft_tokens)}, {QUICK.max_tokens} tokens an answer")
    return cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code (see above)."""
    args = parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an encoding that lacks a token's letter must not hide the verdict
    progress = Progress(True)
    return guarded(lambda: _run(args, progress), progress.clear)


def _run(args: argparse.Namespace, progress: Progress) -> int:
    settings = _settings(args)
    defaults = SamplingParams(settings.max_tokens)
    lines: list[Line] = []
    if args.prompts_file is not None:
        lines = prompts_file.load(args.prompts_file, defaults)
    if args.output is not None:
        check_output(args.output, args.prompts_file)
        if os.path.isfile(args.output) or not os.path.exists(args.output):
            check_output_folder(args.output.absolute().parent, is_made=False)
    cases: list[Case] = []
    notes: list[str] = []

    def prepare(pair: Pair) -> None:
        """What cannot be run is complained of before any weight is read."""
        if lines:
            cases.extend(prompts.file_cases(pair, lines, settings.temperatures, defaults))
        else:
            cases.extend(prompts.bundled_cases(pair, settings.temperatures, settings.max_tokens, notes.append))
        engine = api.new_engine(pair)
        for case in cases:
            engine.check(case.request(pair))

    progress.show(f"loading {args.model or 'the built-in pair'}")
    pair = loading.load(args.model, args.draft_model, draft_bits=args.draft_bits, max_context=args.max_context,
                        before_reading=prepare, calibrate=not args.no_calibration, kernels=not args.no_kernels)
    notes[:0] = pair.notes
    report = _checked(pair, cases, settings, notes, environment.card(pair, args.model), progress)
    progress.clear()
    for note in notes:
        print(note, file=sys.stderr)
    try:
        report.show(console_for_stdout())
    finally:  # a reader that is gone, or a full disk behind stdout, must not cost the report
        if args.output is not None:
            write_whole(args.output, json.dumps(report.as_json(), indent=1, allow_nan=False) + "\n")
    return 0 if report.verdict == "holds" else NOT_SHOWN_TO_HOLD


def _checked(
    pair: Pair, cases: Sequence[Case], settings: CheckConfig, notes: list[str], card: dict[str, str],
    progress: Progress,
) -> Report:
    drafts = settings.num_draft_tokens
    if pair.drafter is None:
        drafts = (0,)
        notes.append("there is no drafter: batches and kept prefixes are checked, drafting is not")
    if len(cases) < max(settings.rows):
        notes.append(f"there are {len(cases)} texts to decode, so no more rows than that were ever decoded together: "
                     "give more prompts (--prompts-file) or temperatures")
    tolerance = default_tolerance(pair.target) if settings.tolerance is None else settings.tolerance
    began = time.perf_counter()
    swept = sweep.run(pair, cases, settings.rows, drafts, tolerance, progress.show)
    return Report(pair, swept, settings, tolerance, card, notes, time.perf_counter() - began)


def _settings(args: argparse.Namespace) -> CheckConfig:
    base = QUICK if args.quick else CheckConfig()
    given = {field.name: value for field in fields(CheckConfig) if (value := getattr(args, field.name)) is not None}
    return CheckConfig(**{field.name: given.get(field.name, getattr(base, field.name)) for field in fields(base)})


def _words(values: Sequence[object]) -> str:
    return " ".join(str(value) for value in values)


if __name__ == "__main__":
    sys.exit(main())

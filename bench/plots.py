"""Pictures of a sweep, from its JSON file.

    python -m bench.plots decode.json [--output FOLDER]

`PLOTS` names them: a picture more is a function of the record and of axes, and an entry there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_mtp.errors import MtpError, RequestError

Json = Mapping[str, Any]
Plot = Callable[[Json, Any], None]  # a record (bench.record) and matplotlib's axes


class MissingPlotsError(MtpError):
    """matplotlib is not installed."""


def speed_up(record: Json, axes: Any) -> None:
    """Tokens/s over plain decoding of as many rows, against rows: a line for each decoder and K, over all prompts."""
    lines: dict[str, dict[int, list[float]]] = {}
    for cell, runner in _measured(record):
        if runner["speedup"] is not None and (runner["name"], runner["num_draft_tokens"]) != ("ours", 0):
            label = f"{runner['name']}, K = {runner['num_draft_tokens']}"
            lines.setdefault(label, {}).setdefault(cell["rows"], []).append(runner["speedup"])
    for label, points in lines.items():
        rows = sorted(points)
        axes.plot(rows, [statistics.median(points[row]) for row in rows], "--" if "mlx" in label else "-", marker="o",
                  label=label)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(title="Speed-up over plain decoding (ours, K = 0)", xlabel="rows", ylabel="times", ylim=(0, None),
             xticks=sorted({cell["rows"] for cell in record["cells"]}))


def acceptance(record: Json, axes: Any) -> None:
    """The share of rounds that accepted at least so many drafts: a line for each kind of prompts, at the largest K."""
    found: dict[str, tuple[float, ...]] = {}
    for cell, runner in _measured(record):
        name = f"{cell['prompts']} {cell['context']}" if cell["context"] else cell["prompts"]
        if runner["name"] == "ours" and runner["num_draft_tokens"] != "auto":
            found[name] = max(found.get(name, ()), tuple(runner["acceptance_at"]), key=len)
    for name, shares in found.items():
        axes.plot(range(1, len(shares) + 1), shares, marker="o", label=name)
    longest = max(map(len, found.values()), default=1)
    axes.set(title="Acceptance by position, largest K", xlabel="position in the draft", ylabel="share of rounds",
             ylim=(0, 1), xticks=range(1, longest + 1))


def round_split(record: Json, axes: Any) -> None:
    """A bar for each rows and K: verifying, drafting, and what is left of the round's time."""
    bars = [(f"{cell['rows']}, K {split['num_draft_tokens']}" + (f"\n{cell['context']}" if cell["context"] else ""),
             split) for cell in record["cells"] for split in cell["splits"]]
    bottoms = [0.0] * len(bars)
    for part in ("verify", "draft", "rest"):
        heights = [max(0.0, split[f"{part}_ms"]) for _, split in bars]
        axes.bar(range(len(bars)), heights, bottom=bottoms, label=part)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set(title="A round's time (parts measured alone)", xlabel="rows, drafts", ylabel="ms")
    axes.set_xticks(range(len(bars)), [name for name, _ in bars], rotation=45, ha="right", fontsize=8)


PLOTS: dict[str, Plot] = {"speedup": speed_up, "acceptance": acceptance, "round": round_split}


def draw(record: Json, folder: Path, plots: Mapping[str, Plot] = PLOTS) -> list[Path]:
    """Writes one PNG each, named by `plots`' keys. Raises MissingPlotsError without matplotlib."""
    figure_class = _figure()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, plot in plots.items():
        figure = figure_class(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        plot(record, axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
        figure.supxlabel(_caption(record["card"]), fontsize=6)
        written.append(folder / f"{name}.png")
        figure.savefig(written[-1], dpi=120)
    return written


def check_installed() -> None:
    """Raises MissingPlotsError early, before anything is measured."""
    _figure()


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure  # imported here: only this module needs the extra
    except ImportError as error:
        raise MissingPlotsError("plots need matplotlib, which is not installed: pip install 'mlx-mtp[bench]', or give "
                                "--no-plots") from error
    return Figure


def _measured(record: Json) -> Iterator[tuple[Json, Json]]:
    return ((cell, runner) for cell in record["cells"] for runner in cell["runners"] if runner["failed"] is None)


def _caption(card: Json) -> str:
    return " · ".join(card[key].split(" (config.json")[0] for key in ("machine", "backend", "blas", "target")
                      if key in card)


def main(arguments: list[str] | None = None) -> int:
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("record", type=Path)
    cli.add_argument("--output", type=Path, help="folder for the pictures (default: the file's own)")
    args = cli.parse_args(arguments)
    try:
        if not args.record.is_file():
            raise RequestError(f"there is no file {args.record}; expected what bench.decode wrote")
        record = json.loads(args.record.read_text(encoding="utf-8"))
        for path in draw(record, args.output or args.record.parent):
            print(path)
    except MtpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

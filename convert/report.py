"""What a conversion cost, as figures: the report, its JSON, its table.

The JSON is one object with the fields of `Report`; tuples are lists, a figure that is no finite number is null. Units
are in the docstrings below.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import mlx_mtp
from mlx_mtp.checkpoint.weights import Part
from mlx_mtp.errors import CheckpointError

MB = 1e6


@dataclass(frozen=True)
class ClassErrors:
    """How far the tensors of one class moved.

    part: "target" or "drafter"; name: the class; modules: how many; numbers: of weights in them; stored_bytes: what
    they take in the output, scales included. formats: e.g. {"affine 4 bits, groups of 64": 28}, modules of each.
    An error is |output - source| / |source| of one module, in Euclidean norm: mean_error and worst_error over modules;
    worst names the module as config.json does.
    """

    part: Part
    name: str
    modules: int
    numbers: int
    stored_bytes: int
    formats: Mapping[str, int]
    mean_error: float
    worst_error: float
    worst: str

    @property
    def bits(self) -> float:
        """Bits a weight takes, scales included."""
        return 8 * self.stored_bytes / max(self.numbers, 1)


@dataclass(frozen=True)
class TextComparison:
    """Source and output over the same text, each predicting its next token from the true ones before it.

    text: which text; tokens: its length; positions: predictions compared, one less. Perplexities are exp of the mean
    nats a token. kl: mean of KL(source || output) a position, in nats. top1_agreement: share of positions, 0 to 1,
    where both have the same likeliest token. dtype: of the activations.
    """

    text: str
    tokens: int
    positions: int
    source_perplexity: float
    output_perplexity: float
    kl: float
    top1_agreement: float
    dtype: str


@dataclass(frozen=True)
class Acceptance:
    """A pair's greedy rounds over all prompts, and the drafts accepted; ended: answers that ended by themselves."""

    rounds: int
    accepted: int
    ended: int

    @property
    def mean_length(self) -> float:
        """Mean acceptance length: tokens a round, 1 + accepted / rounds."""
        return 1 + self.accepted / self.rounds if self.rounds else 1.0


@dataclass(frozen=True)
class DraftingComparison:
    """Both pairs on the same prompts, greedily, one K.

    prompts: how many, prompts_from: which; max_tokens: the most of each answer, which keeps loops from flattering the
    figures. before, after: source's and output's acceptance, None if it was not measured; note says why. same_answers:
    how many answers are equal; same_beginnings: the share of an answer, 0 to 1, before its first different token, on
    average; both None without `before`.
    """

    num_draft_tokens: int
    prompts: int
    prompts_from: str
    max_tokens: int
    before: Acceptance | None
    after: Acceptance | None
    same_answers: int | None = None
    same_beginnings: float | None = None
    note: str | None = None

    @property
    def kept(self) -> float | None:
        """Share of the mean acceptance length that the output keeps; None if one of both was not measured."""
        if self.before is None or self.after is None:
            return None
        return self.after.mean_length / self.before.mean_length


@dataclass(frozen=True)
class Report:
    """All that `verify` found. source, output: the folders' names; seconds: it took; versions: of the packages."""

    source: str
    output: str
    tensors: tuple[ClassErrors, ...]
    text: TextComparison
    drafting: DraftingComparison | None
    device: str
    versions: Mapping[str, str]
    seconds: float

    def to_json(self) -> str:
        """The report as JSON text, with what can be derived (bits, mean acceptance lengths, kept) written out too."""
        return json.dumps(_finite(asdict(self) | {"derived": self._derived()}), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Reads what `to_json` wrote. Raises CheckpointError for anything else."""
        try:
            raw = json.loads(text)
            drafting = raw["drafting"]
            if drafting is not None:
                pairs = {key: None if drafting[key] is None else Acceptance(**drafting[key])
                         for key in ("before", "after")}
                drafting = DraftingComparison(**drafting | pairs)
            return cls(
                **{key: raw[key] for key in ("source", "output", "device", "versions", "seconds")},
                tensors=tuple(ClassErrors(**_with_nan(row)) for row in raw["tensors"]),
                text=TextComparison(**_with_nan(raw["text"])),
                drafting=drafting,
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"this is no report of a conversion ({error}); expected what the converter wrote: "
                                  "convert again with --verify") from error

    def _derived(self) -> dict[str, Any]:
        derived: dict[str, Any] = {"bits": {f"{row.part}: {row.name}": row.bits for row in self.tensors}}
        if self.drafting is not None:
            for name, acceptance in (("before", self.drafting.before), ("after", self.drafting.after)):
                derived[f"mean_acceptance_length_{name}"] = None if acceptance is None else acceptance.mean_length
            derived["mean_acceptance_length_kept"] = self.drafting.kept
        return derived


def versions() -> dict[str, str]:
    """The packages that a conversion depends on, and their versions."""
    return {"mlx_mtp": mlx_mtp.__version__, "mlx": version("mlx"), "mlx-lm": version("mlx-lm")}


def table(report: Report) -> str:
    """The report as lines of plain text, at most 120 columns; ends without a newline."""
    header = ("part", "class", "modules", "MB", "bits", "mean error", "worst", "where the worst is")
    rows = [
        (row.part, row.name, str(row.modules), _megabytes(row.stored_bytes), f"{row.bits:.2f}",
         _percent(row.mean_error), _percent(row.worst_error), _short(row.worst) if row.worst_error else "")
        for row in report.tensors
    ]
    lines = [*columns([header, *rows]), "", *_text_lines(report.text)]
    if report.drafting is not None:
        lines += ["", *_drafting_lines(report.drafting)]
    return "\n".join([*lines, "", f"verified on {report.device} in {report.seconds:.0f} s"])


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells in columns: the first two and the last to the left, as words; the others to the right, as numbers."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    last = len(widths) - 1

    def line(row: Sequence[str]) -> str:
        cells = [cell.ljust(width) if i in (0, 1, last) else cell.rjust(width)
                 for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(cells).rstrip()

    return [line(rows[0]), "  ".join("-" * width for width in widths), *(line(row) for row in rows[1:])]


def _text_lines(text: TextComparison) -> list[str]:
    return [
        f"on {text.tokens} tokens ({text.text}; {text.dtype}), teacher-forced:",
        f"  perplexity        {text.source_perplexity:.4g} before, {text.output_perplexity:.4g} after",
        f"  KL divergence     {text.kl:.4g} nats a token",
        f"  same best token   {_percent(text.top1_agreement)} of {text.positions} positions",
    ]


def _drafting_lines(drafting: DraftingComparison) -> list[str]:
    lines = [f"on {drafting.prompts} prompts ({drafting.prompts_from}), greedy, at most {drafting.max_tokens} tokens, "
             f"K = {drafting.num_draft_tokens}:"]
    if drafting.after is not None:
        before = "not measured" if drafting.before is None else f"{drafting.before.mean_length:.2f} before"
        kept = "" if drafting.kept is None else f": {_percent(drafting.kept)} kept"
        lines.append(f"  mean acceptance length  {before}, {drafting.after.mean_length:.2f} after{kept}")
    if drafting.same_answers is not None and drafting.same_beginnings is not None:
        lines.append(f"  same text               {drafting.same_answers} of {drafting.prompts} answers; "
                     f"{_percent(drafting.same_beginnings)} of an answer before the first difference")
    return lines if drafting.note is None else [*lines, f"  note: {drafting.note}"]


def _megabytes(count: int) -> str:
    return f"{count / MB:,.0f}" if count >= 100 * MB else f"{count / MB:.2f}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%" if math.isfinite(share) else "not finite"


def _short(name: str) -> str:
    return name.removeprefix("language_model.model.").removeprefix("model.")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null instead."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


def _with_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    """The other way: null in a row of figures becomes NaN."""
    return {key: math.nan if part is None else part for key, part in row.items()}

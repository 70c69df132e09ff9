"""A plan as text: what becomes of every class of tensors, what is left out and why, what goes where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mlx_mtp.convert.jobs import Job
from mlx_mtp.convert.plan import PartPlan
from mlx_mtp.convert.recipes import CLASSES

MB = 1e6
HEADINGS = ("class", "tensors", "stored as", "MB before", "MB after")


def described(plan: PartPlan, output: Path) -> list[str]:
    """The lines that `--dry-run` prints for one folder."""
    rows: list[tuple[str, ...]] = [HEADINGS]
    for name in CLASSES:
        jobs = [job for job in plan.jobs if job.module_class == name]
        if jobs:
            rows.append(_row(name, jobs))
    rows.append(_row("total", plan.jobs))
    lines = [f"{plan.part}: {plan.source} -> {output}", "", *_columns(rows), ""]
    reasons = Counter((job.module_class, _format(job), job.reason) for job in plan.jobs if job.reason is not None)
    lines += [f"{name}: {kept} for {count} of them: {reason}" for (name, kept, reason), count in reasons.items()]
    for reason in dict.fromkeys(tensor.reason for tensor in plan.dropped):
        sizes = [tensor.nbytes for tensor in plan.dropped if tensor.reason == reason]
        lines.append(f"left out: {len(sizes)} tensors, {sum(sizes) / MB:,.2f} MB: {reason}")
    for shard in plan.shards:
        count = sum(len(job.outputs) for job in shard.jobs)
        lines.append(f"{output / shard.name}: {count} tensors, {shard.nbytes / MB:,.2f} MB")
    return [*lines, *plan.notes]


def bits_per_weight(plan: PartPlan) -> float:
    return 8 * sum(job.nbytes for job in plan.jobs) / sum(job.parameters for job in plan.jobs)


def _row(name: str, jobs: Sequence[Job]) -> tuple[str, ...]:
    formats = Counter(_format(job) for job in jobs)
    stored = ", ".join(f"{count} x {kept}" if len(formats) > 1 else kept for kept, count in formats.most_common())
    before, after = sum(job.bytes_read for job in jobs), sum(job.nbytes for job in jobs)
    return name, str(len(jobs)), stored if name != "total" else "", f"{before / MB:,.2f}", f"{after / MB:,.2f}"


def _format(job: Job) -> str:
    if job.quantization is None or not job.is_quantized:
        return str(job.outputs[0].dtype).removeprefix("mlx.core.")
    settings = job.quantization
    return f"{settings.bits} bits in groups of {settings.group_size}" + (
        "" if settings.mode == "affine" else f" ({settings.mode})")


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) if i in (0, 2) else cell.rjust(width)
                      for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]

"""A conversion from beginning to end: fetch, plan, write, verify, put into place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import mlx_mtp
from mlx_mtp.checkpoint.loader import check_pair, weight_files
from mlx_mtp.config import DrafterConfig, TargetConfig
from mlx_mtp.convert import dry_run, workplace
from mlx_mtp.convert.model_card import Card, model_card, source_metadata
from mlx_mtp.convert.plan import INDEX, PartPlan, is_drafter, plan_part
from mlx_mtp.convert.progress import bytes_bar, steps_bar
from mlx_mtp.convert.recipes import VISION_AND_AUDIO
from mlx_mtp.convert.report import Report, table
from mlx_mtp.convert.settings import ConvertConfig
from mlx_mtp.convert.source import Source, fetch, fetch_drafter
from mlx_mtp.convert.stream import write_shards
from mlx_mtp.convert.upload import check_upload, upload
from mlx_mtp.convert.verify import verify
from mlx_mtp.convert.workplace import OutputError, Workplace
from mlx_mtp.errors import CheckpointError, MtpError

CONFIG, REPORT, CARD = "config.json", "conversion.json", "README.md"
COPIED = ("*.json", "*.jinja", "tokenizer.model")  # tokenizer, chat template, processor, generation settings
NOT_COPIED = (CONFIG, INDEX, REPORT, "hf_quant_config.json")
ROOM = 2**20  # bytes beside the weights that are sure to be needed: config, card, report

Notify = Callable[[str], None]


@dataclass(frozen=True)
class Conversion:
    """What a run did, or would do: plans and folders by "target" and "assistant", the drafter's.

    report: what verifying found; None if it was not asked for, or not possible.
    """

    plans: Mapping[str, PartPlan]
    outputs: Mapping[str, Path]
    report: Report | None = None

    def described(self) -> str:
        """What is or was done with every class of tensors, in lines."""
        return "\n\n".join("\n".join(dry_run.described(plan, self.outputs[part])) for part, plan in self.plans.items())

    def summary(self) -> str:
        """One line for each folder, then the report's table."""
        lines = [f"{self.outputs[part]}: {plan.nbytes / 1e6:,.1f} MB, {dry_run.bits_per_weight(plan):.2f} bits a weight"
                 for part, plan in self.plans.items()]
        return "\n".join([*lines, *([] if self.report is None else ["", table(self.report)])])


@dataclass(frozen=True)
class _Pair:
    """What is converted: sources and plans by the name of their folder in the workplace, the target first."""

    sources: Mapping[str, Source]
    plans: Mapping[str, PartPlan]
    outputs: Mapping[str, Path]

    def loaded_as(self, part: str, upload_repo: str | None) -> str:
        """What a part is loaded by afterwards: its repository on the Hub if it is uploaded, else its folder's name."""
        if upload_repo is None:
            return self.outputs[part].name
        return upload_repo + ("-assistant" if part == "assistant" and len(self.outputs) > 1 else "")

    @property
    def fingerprint_parts(self) -> list[object]:
        parts: list[object] = []
        for part, plan in self.plans.items():
            files = [*weight_files(plan.source), *copied_files(plan.source), plan.source / CONFIG]
            facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
            written = [(shard.name, hashlib.sha256(shard.header).hexdigest()) for shard in plan.shards]
            parts += [part, str(plan.source.resolve()), facts, written, plan.config]
        return parts


def run(settings: ConvertConfig, notify: Notify) -> Conversion:
    """Converts as `settings` say; `notify` is told what a user should know, line by line.

    Raises MtpError for whatever is wrong with the source, the settings or the output; then nothing is left behind.
    Only if verifying fails, or if there is no room to go on from an earlier run's shards, these stay for the next run.
    """
    try:
        return _run(settings, notify)
    except OSError as error:  # of a file or folder that may not be looked at, or has a name that cannot be
        raise OutputError(f"the file system refuses ({workplace.said(error)}): check that file or folder") from error


def _run(settings: ConvertConfig, notify: Notify) -> Conversion:
    output = workplace.output_folder(settings.mlx_path)
    place = Workplace.of({"target": output})
    if not settings.dry_run and not place.is_committed:
        workplace.check_output(output, settings.force)  # before anything is downloaded
    if settings.upload_repo is not None:
        check_upload(settings.upload_repo)
    pair = _plan(settings, output, notify)
    for folder in (*pair.outputs.values(), place.folder):
        for source in pair.sources.values():
            workplace.check_apart(folder, source.folder)
    if settings.dry_run:
        return Conversion(pair.plans, pair.outputs)
    for source in pair.sources.values():
        source_metadata(source.folder)  # the card needs it in the end
    report = _written(settings, pair, notify)
    if settings.upload_repo is not None:
        for part, folder in pair.outputs.items():
            notify(f"uploaded to {upload(folder, pair.loaded_as(part, settings.upload_repo))}")
    return Conversion(pair.plans, pair.outputs, report)


def _plan(settings: ConvertConfig, output: Path, notify: Notify) -> _Pair:
    """Fetches the sources and plans both parts; nothing is written beside the Hub's cache."""
    source = fetch(settings.hf_path, settings.revision, True)
    if is_drafter(source.folder):
        plan = plan_part(source.folder, "drafter", settings)
        return _Pair({"assistant": source}, {"assistant": plan}, {"assistant": output})
    sources, outputs = {"target": source}, {"target": output}
    plans = {"target": plan_part(source.folder, "target", settings)}
    drafter, beside = _drafter(settings, source, notify), output.with_name(f"{output.name}-assistant")
    if drafter is None and beside.is_dir():
        notify(f"note: {beside} is there and stays: it will be taken for the drafter of what is written now")
    if drafter is not None:
        outputs["assistant"] = beside
        sources["assistant"] = drafter
        plans["assistant"] = plan_part(drafter.folder, "drafter", settings, is_companion=True)
        target_config, drafter_config = plans["target"].parsed, plans["assistant"].parsed
        assert isinstance(target_config, TargetConfig)
        assert isinstance(drafter_config, DrafterConfig)
        check_pair(target_config, drafter_config, source.name, drafter.name, without="--no-draft")
    for plan in plans.values():
        for note in plan.notes:
            notify(f"note: {note}")
    return _Pair(sources, plans, outputs)


def _drafter(settings: ConvertConfig, source: Source, notify: Notify) -> Source | None:
    if settings.draft is False:
        return None
    if isinstance(settings.draft, str):
        return fetch(settings.draft, None, True)
    found = fetch_drafter(source, True)
    if found is None and settings.draft:
        raise CheckpointError(f"no drafter of {settings.hf_path} was found: expected {source.name}-assistant; name it "
                              "with --draft NAME, or convert the target alone with --no-draft")
    if found is None:
        notify(f"note: no drafter of {settings.hf_path} was found: only the target is converted (--draft NAME gives "
               "one)")
    return found


def _written(settings: ConvertConfig, pair: _Pair, notify: Notify) -> Report | None:
    """Writes and verifies everything in the workplace, then puts it into place."""
    place, mark = Workplace.of(pair.outputs), fingerprint(settings, pair)
    not_there = [folder for folder in place.folder.parents if not folder.exists()]
    if place.is_committed:
        with place.locked():
            recovered = place.recover()
        if recovered is not None:
            notify("an earlier run was cut off when its files were whole: they are in their places now")
        if recovered == mark:
            found = next(iter(pair.outputs.values())) / REPORT
            return Report.from_json(found.read_text(encoding="utf-8")) if found.is_file() else None
    for folder in pair.outputs.values():
        workplace.check_output(folder, settings.force)
    with place.locked():
        if place.is_committed:  # another process was, a moment ago, where this one was just now
            raise OutputError(f"another conversion into {settings.mlx_path} was cut off: run the command again")
        with _discarding(place, not_there):
            place.resume(mark)
            _write(settings, pair, place)
            report = _verified(settings, pair, place, notify)
            for part in pair.plans:
                _describe(settings, pair, part, place.draft(part), report)
            if fingerprint(settings, pair) != mark:
                raise CheckpointError(f"{settings.hf_path} was changed while it was converted: convert it again")
        place.commit(mark, settings.force)  # from here on nothing is discarded, whatever happens
    return report


def _write(settings: ConvertConfig, pair: _Pair, place: Workplace) -> None:
    """Writes the shards that are not there yet, then the small files, config.json last."""
    pending = {part: [shard for shard in plan.shards if not place.holds(part, shard.name, shard.nbytes)]
               for part, plan in pair.plans.items()}
    files = {part: copied_files(plan.source) for part, plan in pair.plans.items()}
    needed = sum(shard.nbytes for shards in pending.values() for shard in shards) + ROOM
    try:
        workplace.check_space(place.folder, needed + sum(file.stat().st_size for part in files for file in files[part]))
    except OutputError as error:
        if any(len(pending[part]) < len(plan.shards) for part, plan in pair.plans.items()):
            raise _KeptError(f"{error}; what an earlier run has written is kept") from error
        raise
    total = sum(job.bytes_read for shards in pending.values() for shard in shards for job in shard.jobs)
    with bytes_bar(f"converting {settings.hf_path}", total) as bar:
        for part, shards in pending.items():
            write_shards(shards, place.draft(part), not settings.allow_nan, bar.advance)
    for part, plan in pair.plans.items():
        for file in files[part]:
            workplace.copy_durably(file, place.draft(part) / file.name)
        workplace.write_durably(place.draft(part) / INDEX, json.dumps(plan.index, indent=4))
        workplace.write_durably(place.draft(part) / CONFIG, json.dumps(plan.config, indent=4))  # now it loads


@contextmanager
def _discarding(place: Workplace, not_there: Sequence[Path]) -> Iterator[None]:
    """Leaves nothing behind if the source or the disk fails; what the user interrupts stays, to be gone on with.

    not_there: the folders around it that were made for it, the innermost first.
    """
    try:
        yield
    except _KeptError:
        raise
    except MtpError:
        place.discard(not_there)
        raise
    except OSError as error:
        place.discard(not_there)
        where = place.folder.parent
        if error.errno in workplace.NO_SPACE:
            raise OutputError(f"{where} has no space left: free some, or choose a --mlx-path on another disk; nothing "
                              "was kept") from error
        raise OutputError(f"writing into {where} failed ({workplace.said(error)}): check that disk or file") from error


class _KeptError(OutputError):
    """What was converted stays, for the next run."""


def _verified(settings: ConvertConfig, pair: _Pair, place: Workplace, notify: Notify) -> Report | None:
    if not settings.verify:
        return None
    if "target" not in pair.plans:
        notify("note: a drafter alone is not verified: that takes its target")
        return None
    sources = {part: source.folder for part, source in pair.sources.items()}
    drafts = {part: place.draft(part) for part in pair.plans}
    try:
        with steps_bar("verifying") as bar:
            report = verify(sources["target"], drafts["target"], sources.get("assistant"), drafts.get("assistant"),
                            progress=bar.show)
    except MtpError as error:
        raise _KeptError(f"verifying failed: {error}; what was converted is kept, the same command with --no-verify "
                         "puts it into place") from error
    return replace(report, source=settings.hf_path, output=pair.outputs["target"].name)


def _describe(settings: ConvertConfig, pair: _Pair, part: str, folder: Path, report: Report | None) -> None:
    """Writes the card, and the report if there is one."""
    source, has_drafter = pair.sources[part], part == "target" and "assistant" in pair.outputs
    card = Card(pair.loaded_as(part, settings.upload_repo), source.name, source.folder, settings.command,
                source.revision, drafter=pair.loaded_as("assistant", settings.upload_repo) if has_drafter else None,
                target=pair.loaded_as("target", settings.upload_repo) if "target" in pair.outputs else None,
                is_drafter=part == "assistant",
                has_towers=any(job.module_class == VISION_AND_AUDIO for job in pair.plans[part].jobs))
    workplace.write_durably(folder / CARD, model_card(card, report))
    if report is not None:
        workplace.write_durably(folder / REPORT, report.to_json())


def copied_files(folder: Path) -> list[Path]:
    """The files that go along unchanged."""
    found = {file for pattern in COPIED for file in folder.glob(pattern) if file.is_file()}
    return sorted(file for file in found if file.name not in NOT_COPIED)


def fingerprint(settings: ConvertConfig, pair: _Pair) -> str:
    """A hash of all that the written bytes depend on: sources, settings, versions, and what is written where."""
    facts = [pair.fingerprint_parts, settings.that_matter(), mlx_mtp.__version__, version("mlx")]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

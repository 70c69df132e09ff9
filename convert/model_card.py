"""The README.md of a converted checkpoint: where it came from, how it was made, how to run it, what it cost."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mtp.convert.report import Report, table, versions

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
PASSED_THROUGH = ("license", "license_name", "license_link", "language")
CARD = "README.md"


@dataclass(frozen=True)
class Card:
    """What a card is about.

    name: of the output, as one would load it (its folder's name, or owner/name); source: as the user named it;
    source_folder: where its files are; revision: the commit, if from the Hub. command: that made it. drafter, target:
    the names of what was converted with it, None without; is_drafter: this is the drafter's own card. has_towers:
    vision and audio were kept.
    """

    name: str
    source: str
    source_folder: Path
    command: str
    revision: str | None = None
    drafter: str | None = None
    target: str | None = None
    is_drafter: bool = False
    has_towers: bool = False


def model_card(card: Card, report: Report | None) -> str:
    """The README.md as text; `report` None says that nothing was verified."""
    known, complaint = source_metadata(card.source_folder)
    made_with = versions() if report is None else report.versions
    parts = [
        _front_matter(card, known), f"# {card.name.split('/')[-1]}\n", _origin(card, complaint), _usage(card),
        _quality(report), "Made with " + ", ".join(f"{name} {number}" for name, number in made_with.items()) + ".\n",
    ]
    return "\n".join(parts)


def source_metadata(folder: Path) -> tuple[dict[str, Any], str | None]:
    """The YAML at the beginning of a checkpoint's README.md, and what is wrong with it, None if nothing is.

    It is not worth an error: a conversion of an hour would end in it.
    """
    path = folder / CARD
    if not path.is_file():
        return {}, None
    from huggingface_hub.repocard import metadata_load  # here, since only a card needs it

    try:
        return dict(metadata_load(path) or {}), None
    except Exception as error:  # the YAML library's own, which this project does not depend on, and the disk's
        return {}, (f"The metadata of the source's {CARD} cannot be read, so its licence is not named above "
                    f"({_line(error)}).")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _front_matter(card: Card, known: dict[str, Any]) -> str:
    from huggingface_hub import ModelCardData

    is_on_hub = HUB_NAME.fullmatch(card.source) is not None and not Path(card.source).exists()
    base = card.source if is_on_hub else known.get("base_model")
    entries: dict[str, Any] = {
        "library_name": "mlx",
        "pipeline_tag": "image-text-to-text" if card.has_towers else "text-generation",
        "tags": ["mlx", "gemma4", *(["speculative-decoding"] if card.drafter or card.is_drafter else [])],
        **({"base_model": base} if base else {}),
        **{key: known[key] for key in PASSED_THROUGH if known.get(key)},
    }
    return f"---\n{ModelCardData(**entries).to_yaml()}\n---\n"


def _origin(card: Card, complaint: str | None) -> str:
    what = "MTP drafter" if card.is_drafter else "model"
    revision = f" (revision {card.revision})" if card.revision else ""
    lines = [f"This {what} was converted from `{card.source}`{revision} to MLX by", "", *_bash(card.command)]
    if card.drafter:
        lines += [f"Its drafter is `{card.drafter}`: it makes decoding faster and never changes the text.", ""]
    return "\n".join(lines if complaint is None else [*lines, complaint, ""])


def _usage(card: Card) -> str:
    run = "python -m mlx_mtp.generate --model"
    if card.is_drafter:
        target = card.target or "TARGET"
        return "\n".join(["## Use", "", "It drafts for its target and does nothing alone:", "",
                          *_bash(f'{run} {target} --draft-model {card.name} -p "Hello"')])
    draft = f" --draft-model {card.drafter}" if card.drafter else ""
    lines = ["## Use", "", "In mlx_mtp, with its drafter:" if card.drafter else "In mlx_mtp:", "",
             *_bash(f'{run} {card.name}{draft} -p "Hello"'),
             "In mlx-lm, text only and without a drafter:", "",
             *_bash(f'python -m mlx_lm generate --model {card.name} --prompt "Hello"')]
    if card.has_towers:
        lines += ["In mlx-vlm, with images (vision and audio were kept):", "",
                  *_bash(f'python -m mlx_vlm generate --model {card.name} --image picture.jpg --prompt "Describe it."')]
    return "\n".join(lines)


def _quality(report: Report | None) -> str:
    title = "## Compared with the source"
    if report is None:
        return f"{title}\n\nNothing was measured (`--no-verify`).\n"
    return "\n".join([
        title, "", "An error is |output - source| / |source| of a tensor; bits count scales too.", "",
        "```", table(report), "```", "",
    ])


def _bash(command: str) -> list[str]:
    return ["```bash", command, "```", ""]

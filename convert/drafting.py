"""What a conversion did to drafting: both pairs decode the same prompts, and their accepted drafts are counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_mtp import device
from mlx_mtp.checkpoint import memory
from mlx_mtp.checkpoint.loader import check_pair, default_dtype, load_drafter, load_target, materialize
from mlx_mtp.config import EngineConfig, SamplingParams
from mlx_mtp.convert.report import Acceptance, DraftingComparison
from mlx_mtp.convert.tensor_errors import Progress
from mlx_mtp.engine.engine import Engine
from mlx_mtp.engine.request import Request
from mlx_mtp.errors import MemoryBudgetError
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target

NUM_DRAFT_TOKENS = 3
MAX_TOKENS = 64  # short: small models run into loops later, and looping text flatters acceptance
ROWS = 8


@dataclass(frozen=True)
class Prompts:
    """Prompts as token ids, the ids that end an answer, and a name that says which prompts they are."""

    tokens: Sequence[Sequence[int]]
    stop_tokens: frozenset[int]
    name: str


@dataclass(frozen=True)
class _Answers:
    texts: list[list[int]]
    acceptance: Acceptance


def compare_drafting(
    source: tuple[Path, Path], output: tuple[Path, Path], prompts: Prompts, progress: Progress
) -> DraftingComparison:
    """Mean acceptance lengths and answers of two pairs of (target, drafter) folders, one in memory at a time.

    A pair that the device cannot hold is not measured, and the note says so. progress(what, done, total): of prompts.
    """
    answers: list[_Answers | None] = []
    notes = []
    for name, folders in (("before", source), ("after", output)):
        try:
            answers.append(_decode(*folders, prompts, progress))
        except MemoryBudgetError as error:
            answers.append(None)
            notes.append(f"not measured {name}: the pair {error}")
        mx.clear_cache()
    before, after = answers
    same = None if before is None or after is None else [
        same_beginning(one, other) for one, other in zip(before.texts, after.texts, strict=True)
    ]
    return DraftingComparison(
        num_draft_tokens=NUM_DRAFT_TOKENS,
        prompts=len(prompts.tokens),
        prompts_from=prompts.name,
        max_tokens=MAX_TOKENS,
        before=None if before is None else before.acceptance,
        after=None if after is None else after.acceptance,
        same_answers=None if same is None else sum(share == 1 for share in same),
        same_beginnings=None if same is None else sum(same) / len(same),
        note="; ".join(notes) or None,
    )


def load_pair(target_folder: Path, drafter_folder: Path, context: int) -> tuple[Target, Drafter]:
    """A pair as `api.load` makes it, without a tokenizer, which test checkpoints lack. Raises its errors.

    context: tokens of a row; ROWS of them are planned for.
    """
    target, _ = load_target(target_folder, default_dtype())
    drafter = load_drafter(drafter_folder, target.dtype)
    check_pair(target.config, drafter.config, f"{target_folder}", f"{drafter_folder}")
    weight_bytes = sum(array.nbytes for model in (target, drafter) for _, array in tree_flatten(model.parameters()))
    slack = EngineConfig().ring_slack
    needed = weight_bytes + ROWS * memory.cache_bytes(target.config.text, context, slack, target.dtype)
    usable = device.memory_bytes() * (1 - device.WORKING_SPACE)
    if needed > usable:
        raise MemoryBudgetError(f"needs {needed / memory.GB:.2f} GB, but the device has {usable / memory.GB:.2f} GB "
                                "for it")
    materialize(target, "target", target_folder)
    materialize(drafter, "drafter", drafter_folder)
    return target, drafter


def _decode(target_folder: Path, drafter_folder: Path, prompts: Prompts, progress: Progress) -> _Answers:
    longest = max(len(tokens) for tokens in prompts.tokens) + MAX_TOKENS
    target, drafter = load_pair(target_folder, drafter_folder, longest)
    sampling = SamplingParams(max_tokens=MAX_TOKENS)
    config = EngineConfig(num_draft_tokens=NUM_DRAFT_TOKENS)
    requests = [Request(tokens, sampling, prompts.stop_tokens, target.config.text.max_context)
                for tokens in prompts.tokens]
    for start in range(0, len(requests), ROWS):
        batch = requests[start : start + ROWS]
        for _ in Engine(target, drafter, config).run(batch):
            pass
        progress(f"drafting with {target_folder.name}", start + len(batch), len(requests))
    return _Answers([request.tokens for request in requests], Acceptance(
        rounds=sum(request.rounds for request in requests),
        accepted=sum(sum(request.accepted_counts) for request in requests),
        ended=sum(request.finish_reason == "stop" for request in requests),
    ))


def same_beginning(one: Sequence[int], other: Sequence[int]) -> float:
    """The share of the longer text before the first difference, 0 to 1."""
    longer = max(len(one), len(other))
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return same / longer if longer else 1.0

"""Compares drafted with plain decoding, token for token, and measures the margin of any difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
from support import decode, new_cache

from mlx_mtp.config import SamplingParams
from mlx_mtp.engine.request import Request
from mlx_mtp.models.target import Target
from mlx_mtp.spec_decode.loop import DraftModel
from mlx_mtp.spec_decode.sampler import Sampler

EXCUSABLE_GAP = 1e-4


@dataclass
class Tally:
    """What a sweep has seen. near_ties: (case, gap) of differences that plain decoding itself decides by so little."""

    tokens: int = 0
    rejected: int = 0
    accepted: int = 0
    near_ties: list[tuple[str, float]] = field(default_factory=list)
    wrong: list[tuple[str, float]] = field(default_factory=list)

    def check(self) -> None:
        assert not self.wrong, f"drafting changed the text: {self.wrong}"
        assert len(self.near_ties) <= 3, f"too many near-ties to be chance: {self.near_ties}"


def plain(target: Target, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]) -> list[list[int]]:
    """The oracle: every prompt alone, without drafts."""
    return [decode(target, None, [prompt], [one])[0].tokens for prompt, one in zip(prompts, sampling, strict=True)]


def compare(
    tally: Tally, case: str, target: Target, drafter: DraftModel, prompts: Sequence[list[int]],
    sampling: Sequence[SamplingParams], expected: Sequence[list[int]], num_draft_tokens: int,
) -> list[Request]:
    """Decodes the prompts as one batch with drafts and adds what it finds to the tally."""
    requests = decode(target, drafter, prompts, sampling, num_draft_tokens)
    for row, (request, text) in enumerate(zip(requests, expected, strict=True)):
        accepted = sum(request.accepted_counts)
        tally.tokens += len(text)
        tally.accepted += accepted
        tally.rejected += request.drafted - accepted
        if request.tokens != text:
            gap = margin(target, request, text)
            found = (f"{case}, row {row}, K {num_draft_tokens}", gap)
            (tally.near_ties if gap <= EXCUSABLE_GAP else tally.wrong).append(found)
    return requests


def margin(target: Target, request: Request, text: list[int]) -> float:
    """By how much plain decoding prefers its own token, noise included, where the texts first differ."""
    pairs = zip(request.tokens, text, strict=False)
    first = next((i for i, (got, wanted) in enumerate(pairs) if got != wanted), None)
    if first is None:
        return float("inf")  # one text ends before the other: not a matter of margins
    context = [*request.prompt, *text[:first]]
    hidden = target(mx.array([context]), new_cache(target).stage(len(context), mx.array([len(context)])))
    sampler = Sampler.of([request.sampling])
    logits = target.logits(hidden[:, -1:])
    noise = sampler.noise(mx.array([[len(context)]]), logits.shape[-1])
    scores = sampler.scores(logits, noise)[0, 0]
    return abs(scores[text[first]].item() - scores[request.tokens[first]].item())

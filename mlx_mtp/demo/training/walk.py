"""The exact greedy walk: speculative rounds on a text that the target wrote, counted without approximation."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import Gemma4AssistantForCausalLM, Gemma4ForCausalLM

from .drafting import draft_everywhere, read_with_target


@dataclass
class WalkStatistics:
    """Rounds, and in how many of them at least i drafts were accepted."""

    drafts: int
    rounds: int = 0
    at_least: list[int] = field(default_factory=list)

    def add(self, accepted: int) -> None:
        self.rounds += 1
        self.at_least = self.at_least or [0] * self.drafts
        for index in range(accepted):
            self.at_least[index] += 1

    @property
    def mean_acceptance_length(self) -> float:
        return 1.0 + sum(self.at_least) / max(1, self.rounds)

    def __str__(self) -> str:
        shares = " ".join(f"P(>={i + 1}) {count / max(1, self.rounds):.2f}" for i, count in enumerate(self.at_least))
        return f"{self.rounds} rounds, {shares}, mean acceptance length {self.mean_acceptance_length:.3f}"


@torch.no_grad()
def greedy_walk(
    target: Gemma4ForCausalLM,
    assistant: Gemma4AssistantForCausalLM,
    prompt: Sequence[int],
    answer: Sequence[int],
    statistics: WalkStatistics,
) -> None:
    """Add the rounds that a lossless engine would make to write ``answer`` (the target's greedy text) after ``prompt``.

    Prefill yields the first token of the answer; each round then emits its accepted drafts and one token of the
    target. Drafts beyond the end of the answer are not counted as accepted.
    """
    text = [*prompt, *answer]
    view = read_with_target(target, torch.tensor([text]))
    drafts = draft_everywhere(assistant, target, view, statistics.drafts)[0].tolist()
    newest = len(prompt)
    while newest < len(text) - 1:
        following = text[newest + 1 : newest + 1 + statistics.drafts]
        proposed = drafts[newest - 1]
        accepted = next((i for i, token in enumerate(following) if token != proposed[i]), len(following))
        # A text that ends with its last accepted draft leaves no token for the target to add.
        statistics.add(accepted)
        newest += accepted + 1

"""What target and drafter exchange, for all positions of a text at once: the same code trains, measures and checks.

Indices. Query ``t`` is the round whose newest token stands at position ``P = t + 1``: the target has committed the
keys ``0..t`` and its final-normed hidden state at ``t`` is known. Draft step ``k`` reads the token at ``t + 1 + k``
and predicts the one at ``t + 2 + k``. All steps of a round share the position ``P`` and the keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Gemma4AssistantForCausalLM, Gemma4ForCausalLM

SharedStates = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TargetView:
    """The target's reading of ``tokens [B, L]``."""

    tokens: Tensor  # [B, L]
    hidden: Tensor  # [B, L, D], after the final norm
    logits: Tensor  # [B, L, V], soft-capped
    shared: SharedStates  # per layer type, keys and values of the donor layer [B, H, L, W]


@torch.no_grad()
def read_with_target(target: Gemma4ForCausalLM, tokens: Tensor) -> TargetView:
    output = target.model(tokens, use_cache=False, return_shared_kv_states=True)
    logits = target.lm_head(output.last_hidden_state)
    cap = target.config.final_logit_softcapping
    logits = torch.tanh(logits / cap) * cap
    return TargetView(tokens, output.last_hidden_state, logits, dict(output.shared_kv_states))


def shifted(values: Tensor, shift: int, length: int) -> Tensor:
    """``values[:, shift : shift + length]``, padded at the end by repeating the last column."""
    index = torch.arange(shift, shift + length).clamp(max=values.shape[1] - 1)
    return values[:, index]


def drafter_masks(queries: int, keys: int, window: int) -> dict[str, Tensor]:
    """``[1, 1, T, S]`` masks, True where visible: keys up to ``t``; sliding layers at most ``window`` before ``P``.

    The window is inclusive, as in transformers' bidirectional sliding mask. With window = 2::

        t=0  x . . .
        t=1  x x . .
        t=2  . x x .
    """
    query = torch.arange(queries)[:, None]
    key = torch.arange(keys)[None, :]
    full = key <= query
    sliding = full & (query + 1 - key <= window)
    return {"full_attention": full[None, None], "sliding_attention": sliding[None, None]}


class RoundsInParallel:
    """The drafter at every position of a text; ``step`` advances all rounds by one draft."""

    def __init__(self, assistant: Gemma4AssistantForCausalLM, target: Gemma4ForCausalLM, view: TargetView) -> None:
        self.assistant = assistant
        self.embed = target.model.embed_tokens  # scales by sqrt(backbone_hidden) itself
        self.queries = view.tokens.shape[1] - 1
        self.shared = view.shared
        window = assistant.config.get_text_config().sliding_window
        self.masks = drafter_masks(self.queries, view.tokens.shape[1], window)
        self.positions = torch.arange(1, self.queries + 1)[None]
        self.hidden = view.hidden[:, : self.queries]

    def step(self, tokens: Tensor) -> Tensor:
        """Read ``tokens [B, T]`` (the newest of each round), return the drafter's final state ``[B, T, hidden]``."""
        embedded = self.embed(tokens).detach()
        inputs = self.assistant.pre_projection(torch.cat([embedded, self.hidden], dim=-1))
        state = self.assistant.model(
            inputs_embeds=inputs,
            attention_mask=self.masks,
            position_ids=self.positions,
            shared_kv_states=self.shared,
            use_cache=False,
        ).last_hidden_state
        self.hidden = self.assistant.post_projection(state)
        return state


def head_logits(assistant: Gemma4AssistantForCausalLM, state: Tensor) -> Tensor:
    """``[..., V]``; with a centroid head, tokens outside of the chosen clusters get -inf."""
    logits = assistant.lm_head(state)
    head = assistant.masked_embedding
    if head is None:
        return logits
    chosen = head.centroids(state).topk(head.centroid_intermediate_top_k, dim=-1).indices
    clusters = head.token_ordering.view(head.num_centroids, -1)
    allowed = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, clusters[chosen].flatten(-2), True)
    return logits.masked_fill(~allowed, -torch.inf)


@torch.no_grad()
def draft_everywhere(
    assistant: Gemma4AssistantForCausalLM, target: Gemma4ForCausalLM, view: TargetView, drafts: int
) -> Tensor:
    """Greedy drafts ``[B, L - 1, K]`` of the round at every position, each chained on its own drafts."""
    rounds = RoundsInParallel(assistant, target, view)
    tokens = view.tokens[:, 1:]
    steps = []
    for _ in range(drafts):
        tokens = head_logits(assistant, rounds.step(tokens)).argmax(-1)
        steps.append(tokens)
    return torch.stack(steps, dim=-1)

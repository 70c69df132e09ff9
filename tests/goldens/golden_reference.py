"""Golden outputs of one kind: transformers' own forward passes in float32 with eager attention.

Target: one forward over the whole prompt, no cache. Drafter: what transformers' candidate generator for these
assistants (`SinglePositionMultiTokenCandidateGenerator`) feeds to the assistant, but from a clean context, as described
in `draft_golden`. Shapes: L prompt tokens, P position of the newest token, D hidden, V vocabulary, G kv heads.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from golden_checkpoints import SEED, VOCABULARY, WINDOW, Kind, assistant_class, target_class
from transformers import PreTrainedModel

PROMPT_LENGTHS = (1, 5, WINDOW - 1, WINDOW, WINDOW + 1, 3 * WINDOW, 6 * WINDOW)
DRAFT_POSITIONS = (1, 5, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3, 5 * WINDOW)
GREEDY_PROMPT_LENGTHS = (7, WINDOW + 4)
GREEDY_STEPS = 24
GREEDY_VARIETY = 10  # different tokens in a continuation, so that it is not one loop
DRAFT_STEPS = 5
SAFE_GAP = 1e-2  # every greedy choice in the goldens wins by more, so float32 noise cannot flip it
LAYER_TYPES = {"sliding": "sliding_attention", "full": "full_attention"}

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Reference:
    """A kind's target and assistant as transformers loads them from the written folders."""

    kind: Kind
    target: PreTrainedModel
    assistant: PreTrainedModel


def load_reference(kind: Kind, folder: Path, **target_overrides: Any) -> Reference:
    """Load `folder`/target and `folder`/assistant in float32; overrides change the target's text config."""
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    config = target_class(kind).config_class.from_pretrained(folder / "target")
    for key, value in target_overrides.items():
        setattr(config.text_config, key, value)
    experts = {"experts_implementation": "eager"} if kind.overrides.get("enable_moe_block") else {}
    target = target_class(kind).from_pretrained(folder / "target", config=config, **options, **experts)
    assistant = assistant_class(kind).from_pretrained(folder / "assistant", **options)
    return Reference(kind, target.eval(), assistant.eval())


def random_prompt(kind: Kind, purpose: str, length: int, attempt: int = 0) -> list[int]:
    """`length` tokens: bos, then uniform over the ordinary ones; a new draw for every purpose, length and attempt."""
    digits = [ord(letter) for letter in f"{kind.name}/{purpose}"]
    generator = numpy.random.default_rng([SEED, length, attempt, *digits])
    return [2, *generator.integers(3, VOCABULARY, length - 1).tolist()]


def run_target(target: PreTrainedModel, tokens: list[int]) -> Any:
    """One forward over `tokens`, no cache; the output has logits, hidden_states and shared_kv_states."""
    with torch.no_grad():
        return target(
            input_ids=torch.tensor([tokens]),
            use_cache=False,
            output_hidden_states=True,
            return_shared_kv_states=True,
        )


def top_two_gap(logits: torch.Tensor) -> float:
    """The smallest distance between best and second best over the rows of logits [..., V]."""
    best = logits.topk(2, dim=-1).values
    return float((best[..., 0] - best[..., 1]).min())


def target_golden(reference: Reference, length: int) -> Tensors:
    """tokens [L], logits [L, V] after the soft-cap, hidden [L, D] after the final norm."""
    tokens = random_prompt(reference.kind, "target", length)
    output = run_target(reference.target, tokens)
    return {
        "tokens": torch.tensor(tokens, dtype=torch.int32),
        "logits": output.logits[0],
        "hidden": output.hidden_states[-1][0],  # transformers replaces the last entry by the normed state
    }


def greedy_golden(reference: Reference, length: int) -> Tensors:
    """prompt [L], tokens [24] and min_gap [1]: the argmax continuation, each token from a full forward of its own.

    Prompts are redrawn until every choice is safe from rounding and the text is varied. Stop tokens do not stop it.
    """
    for attempt in range(100):
        prompt = random_prompt(reference.kind, "greedy", length, attempt)
        tokens = list(prompt)
        gap = float("inf")
        for _ in range(GREEDY_STEPS):
            logits = run_target(reference.target, tokens).logits[0, -1]
            gap = min(gap, top_two_gap(logits))
            if gap < SAFE_GAP:
                break
            tokens.append(int(logits.argmax()))
        if len(tokens) == length + GREEDY_STEPS and len(set(tokens[length:])) >= GREEDY_VARIETY:
            return {
                "prompt": torch.tensor(prompt, dtype=torch.int32),
                "tokens": torch.tensor(tokens[length:], dtype=torch.int32),
                "min_gap": torch.tensor([gap]),
            }
    raise RuntimeError(f"{reference.kind.name}: no prompt of {length} tokens gives a varied and safe greedy text")


def run_drafter(
    reference: Reference,
    token: int,
    hidden: torch.Tensor,
    shared: dict[str, tuple[torch.Tensor, torch.Tensor]],
    position: int,
    steps: int = DRAFT_STEPS,
) -> Tensors:
    """Chain `steps` drafts from `token` and `hidden` [D] at one constant `position`.

    The assistant's own forward builds the masks from `shared`: {layer type: (keys, values) [1, G, P, head_dim]}.
    Returns tokens [steps], logits [steps, V] and projected [steps, D], the state that feeds the next step.
    """
    embed = reference.target.get_input_embeddings()  # scales by sqrt(D), as in the target's own forward
    state = hidden.view(1, 1, -1)
    attention_mask = torch.ones(1, shared["full_attention"][0].shape[2] + 1, dtype=torch.long)
    tokens, logits, projected = [], [], []
    for _ in range(steps):
        with torch.no_grad():
            output = reference.assistant(
                inputs_embeds=torch.cat([embed(torch.tensor([[token]])), state], dim=-1),
                attention_mask=attention_mask,
                position_ids=torch.tensor([[position]]),
                shared_kv_states=shared,
                use_cache=False,
            )
        state = output.last_hidden_state
        token = int(output.logits.argmax())
        tokens.append(token)
        logits.append(output.logits[0, 0])
        projected.append(state[0, 0])
    return {
        "tokens": torch.tensor(tokens, dtype=torch.int32),
        "logits": torch.stack(logits),
        "projected": torch.stack(projected),
    }


def mark_impossible(kind: Kind, logits: torch.Tensor) -> torch.Tensor:
    """Centroid head: -inf outside the chosen clusters, where transformers fills in (smallest chosen logit - 1)."""
    if not kind.centroid_head:
        return logits
    fill = logits.min(dim=-1, keepdim=True).values
    return torch.where(logits == fill, float("-inf"), logits)


def draft_golden(reference: Reference, newest: int) -> Tensors:
    """Five chained drafts whose newest committed token stands at position P = `newest`.

    The context is clean: keys and values of positions 0..P-1 from a fresh forward over exactly these tokens, nothing
    provisional. (transformers' own loop also hands over rejected drafts, because it cuts the arrays at P + 1.) The
    position id is P = len(input_ids) - 1, as in the candidate generator. The assistant masks nothing on the full layer;
    on sliding layers it admits the newest WINDOW + 1 entries of the array, here positions max(0, P - 1 - WINDOW) to
    P - 1. The full history is handed over: a port that keeps only a window must keep two positions more than the
    WINDOW - 1 that the target needs.

    context [P + 1]; hidden [D] at P - 1 after the target's final norm; {sliding,full}.{keys,values} [G, P, head_dim]
    of the donor layers, keys rotated; tokens, logits, projected as in `run_drafter`; logits_previous_position [V]: the
    first step at position id P - 1 instead. Contexts are redrawn until every draft is safe from rounding.
    """
    for attempt in range(100):
        context = random_prompt(reference.kind, "drafter", newest + 1, attempt)
        output = run_target(reference.target, context[:newest])
        hidden = output.hidden_states[-1][0, -1]
        shared = dict(output.shared_kv_states)
        drafted = run_drafter(reference, context[-1], hidden, shared, newest)
        if top_two_gap(drafted["logits"]) >= SAFE_GAP:
            break
    else:
        raise RuntimeError(f"{reference.kind.name}: no context of {newest} keeps its draft gaps above {SAFE_GAP}")
    previous = run_drafter(reference, context[-1], hidden, shared, newest - 1, steps=1)
    golden = {
        "context": torch.tensor(context, dtype=torch.int32),
        "hidden": hidden,
        "tokens": drafted["tokens"],
        "logits": mark_impossible(reference.kind, drafted["logits"]),
        "projected": drafted["projected"],
        "logits_previous_position": mark_impossible(reference.kind, previous["logits"])[0],
    }
    for short, layer_type in LAYER_TYPES.items():
        keys, values = shared[layer_type]
        golden |= {f"{short}.keys": keys[0], f"{short}.values": values[0]}
    return golden


def all_goldens(reference: Reference) -> Tensors:
    """Every golden tensor of a kind under its name in golden.safetensors."""
    sections = [(f"target.{length}", target_golden(reference, length)) for length in PROMPT_LENGTHS]
    sections += [(f"greedy.{length}", greedy_golden(reference, length)) for length in GREEDY_PROMPT_LENGTHS]
    sections += [(f"drafter.{newest}", draft_golden(reference, newest)) for newest in DRAFT_POSITIONS]
    return {f"{section}.{name}": value.contiguous() for section, golden in sections for name, value in golden.items()}

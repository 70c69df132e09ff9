"""Proof that the goldens can fail: each likely porting mistake moves them by far more than any tolerance.

A golden that a wrong window passes is worth nothing, so every mistake below is made in transformers itself and the
largest change of a logit is required to exceed `MINIMUM_CHANGE`. Two opposite checks: a rounding error must not move
them far, and the drafts must be those of transformers' own assisted generation where its context is clean.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from golden_checkpoints import WINDOW, Kind
from golden_reference import (
    DRAFT_STEPS,
    Reference,
    draft_golden,
    load_reference,
    mark_impossible,
    random_prompt,
    run_drafter,
    run_target,
    target_golden,
)

MINIMUM_CHANGE = 1e-2
NOISE = 1e-7  # about one rounding of a float32
MAXIMUM_NOISE_CHANGE = 5e-4
LONG_PROMPT = 3 * WINDOW
LONG_POSITION = 2 * WINDOW + 3


def largest_change(first: torch.Tensor, second: torch.Tensor) -> float:
    """Largest absolute difference where both are finite; infinite if nothing is (no cluster in common)."""
    finite = first.isfinite() & second.isfinite()
    return float((first[finite] - second[finite]).abs().max()) if finite.any() else float("inf")


@contextmanager
def replaced(tensors: list[torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Overwrite `tensors` with `change` of themselves, and restore them on leaving."""
    kept = [tensor.clone() for tensor in tensors]
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(change(tensor))
        yield
        for tensor, original in zip(tensors, kept, strict=True):
            tensor.copy_(original)


def named(model: torch.nn.Module, *endings: str) -> list[torch.Tensor]:
    return [tensor for name, tensor in model.state_dict().items() if name.endswith(endings)]


def target_mistakes(reference: Reference, folder: Path) -> dict[str, float]:
    """Mistake -> largest change of a target logit on the prompt of 3 windows."""
    kind = reference.kind
    golden = target_golden(reference, LONG_PROMPT)["logits"]

    def change_with(**overrides: Any) -> float:
        return largest_change(golden, target_golden(load_reference(kind, folder, **overrides), LONG_PROMPT)["logits"])

    changes = {
        "target window one smaller": change_with(sliding_window=WINDOW - 1),
        "target window one larger": change_with(sliding_window=WINDOW + 1),
        "no soft-cap": change_with(final_logit_softcapping=None),
    }
    weight_mistakes = {
        "layer_scalar ignored": (("layer_scalar",), torch.ones_like),
        "norms with 1 + weight": (("norm.weight",), lambda weight: weight + 1.0),
        "per-expert scale ignored": (("per_expert_scale",), torch.ones_like),
        "router scale ignored": (("router.scale",), torch.ones_like),
        "token part of per-layer inputs ignored": (("embed_tokens_per_layer.weight",), torch.zeros_like),
        "context part of per-layer inputs ignored": (("per_layer_projection_norm.weight",), torch.zeros_like),
    }
    for mistake, (endings, change) in weight_mistakes.items():
        if tensors := named(reference.target, *endings):
            with replaced(tensors, change):
                changes[mistake] = largest_change(golden, target_golden(reference, LONG_PROMPT)["logits"])
    tokens = random_prompt(kind, "target", LONG_PROMPT)
    tokens[-WINDOW] = (tokens[-WINDOW] + 7) % 256
    changes["oldest key in the window, last position"] = largest_change(
        golden[-1], run_target(reference.target, tokens).logits[0, -1]
    )
    return changes


def drafter_mistakes(reference: Reference) -> dict[str, float]:
    """Mistake -> largest change of a draft logit (or, with the centroid head, a different cluster) at 2 windows + 3."""
    kind = reference.kind
    golden = draft_golden(reference, LONG_POSITION)
    context = golden["context"].tolist()
    shared = dict(run_target(reference.target, context[:-1]).shared_kv_states)
    assistant_config = reference.assistant.config.get_text_config()

    def change_with(hidden: torch.Tensor, position: int = LONG_POSITION, window: int = WINDOW) -> float:
        assistant_config.sliding_window = window
        drafted = run_drafter(reference, context[-1], hidden, shared, position, steps=1)
        assistant_config.sliding_window = WINDOW
        return largest_change(golden["logits"][0], mark_impossible(kind, drafted["logits"])[0])

    norm_weight = reference.target.state_dict()["model.language_model.norm.weight"]
    return {
        "drafter window one smaller": change_with(golden["hidden"], window=WINDOW - 1),
        "drafter window one larger": change_with(golden["hidden"], window=WINDOW + 1),
        "position id P - 1": change_with(golden["hidden"], position=LONG_POSITION - 1),
        "hidden state without the norm's weight": change_with(golden["hidden"] / norm_weight),
        "next draft from the old hidden state": largest_change(
            golden["logits"][1],
            mark_impossible(
                kind,
                run_drafter(reference, int(golden["tokens"][0]), golden["hidden"], shared, LONG_POSITION, 1)["logits"],
            )[0],
        ),
    }


def noise_change(reference: Reference) -> float:
    """Largest change of a target logit when every embedding weight moves by about one float32 rounding."""
    tokens = random_prompt(reference.kind, "target", LONG_PROMPT)
    golden = run_target(reference.target, tokens).logits
    generator = torch.Generator().manual_seed(0)
    with replaced(
        [reference.target.get_input_embeddings().weight],
        lambda weight: weight * (1 + NOISE * torch.randn(weight.shape, generator=generator)),
    ):
        return largest_change(golden, run_target(reference.target, tokens).logits)


def generate_difference(reference: Reference) -> float:
    """Largest difference between our drafts and the first round of transformers' own assisted `generate`.

    The first round is the one whose context is clean there. Position ids and drafted tokens must be equal.
    """
    prompt = draft_golden(reference, LONG_POSITION)["context"].tolist()[:-1]
    output = run_target(reference.target, prompt)
    newest = int(output.logits[0, -1].argmax())
    ours = run_drafter(reference, newest, output.hidden_states[-1][0, -1], dict(output.shared_kv_states), len(prompt))
    positions, logits = [], []

    def record(module: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], result: Any) -> None:
        positions.append(int(keywords["position_ids"]))
        logits.append(result.logits[0, 0])

    reference.assistant.generation_config.num_assistant_tokens = DRAFT_STEPS
    hook = reference.assistant.register_forward_hook(record, with_kwargs=True)
    reference.target.generate(
        torch.tensor([prompt]),
        assistant_model=reference.assistant,
        do_sample=False,
        max_new_tokens=DRAFT_STEPS + 3,
        eos_token_id=-1,
    )
    hook.remove()
    if positions[:DRAFT_STEPS] != [len(prompt)] * DRAFT_STEPS:
        return float("inf")
    return float((torch.stack(logits[:DRAFT_STEPS]) - ours["logits"]).abs().max())


def check_sensitivity(kind: Kind, folder: Path) -> list[str]:
    """One line per mistake that the goldens of `kind` would let pass, and one if rounding alone moves them too far."""
    reference = load_reference(kind, folder)
    changes = target_mistakes(reference, folder) | drafter_mistakes(reference)
    for mistake, change in changes.items():
        print(f"{kind.name:8} {mistake:45} changes a logit by {change:.3g}")
    small = {mistake: change for mistake, change in changes.items() if change < MINIMUM_CHANGE}
    problems = [f"{kind.name}: {mistake}: only {change:.3g}" for mistake, change in small.items()]
    noise = noise_change(reference)
    print(f"{kind.name:8} {'(noise of one float32 rounding)':45} changes a logit by {noise:.3g}")
    if noise > MAXIMUM_NOISE_CHANGE:
        problems.append(f"{kind.name}: noise moves a logit by {noise:.3g}")
    difference = generate_difference(reference)
    print(f"{kind.name:8} {'(first round of assisted generate)':45} differs by {difference:.3g}")
    if difference > MAXIMUM_NOISE_CHANGE:
        problems.append(f"{kind.name}: assisted generate drafts differently, by {difference:.3g}")
    return problems

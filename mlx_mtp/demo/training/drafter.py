"""Training of a drafter on a frozen target."""

import argparse
import json
import random
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import Gemma4AssistantForCausalLM, Gemma4ForCausalLM

from .batches import WindowSampler
from .centroids import train_centroids
from .corpus import load_corpus
from .drafting import RoundsInParallel, TargetView, read_with_target, shifted
from .families import FAMILIES, Family
from .fast_layers import ATTENTION, use_fast_norm
from .optimizer import apply_gradients, build_optimizers, set_learning_rate
from .own_text import choose_prompts, write_own_text
from .target import build_target
from .tokenizer import PAD_ID
from .warm_start import warm_start

DRAFT_STEPS = 4
STEP_DECAY = 0.8
UNREACHED_WEIGHT = 0.3  # of a step whose earlier drafts were wrong: such rounds would have ended before it
OWN_TEXT_SHARE = 0.7
OWN_TEXT_ROWS = 20


def load_target(family: Family, work: Path) -> Gemma4ForCausalLM:
    """The trained target, frozen and rounded to the bf16 values that will be shipped."""
    model = build_target(family, seed=0)
    model.load_state_dict(torch.load(work / f"{family.name}-target.pt")["model"])
    return model.to(torch.bfloat16).float().requires_grad_(False).eval()


def build_drafter(family: Family, seed: int) -> Gemma4AssistantForCausalLM:
    """Random weights; every layer's scalar is away from 1, as in the real checkpoints, and stays as it is."""
    torch.manual_seed(seed)
    config = family.drafter_config()
    config._attn_implementation = ATTENTION
    config.text_config._attn_implementation = ATTENTION
    drafter = Gemma4AssistantForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in drafter.named_parameters():
            if name.endswith("q_norm.weight"):
                parameter.fill_(parameter.shape[0] ** -0.25)
            elif parameter.ndim == 2 and "embed" not in name:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        layers = len(drafter.model.layers)
        for index, layer in enumerate(drafter.model.layers):
            layer.layer_scalar.fill_(round(64 * (0.85 + 0.10 * index / max(1, layers - 1))) / 64)
    return drafter


class DrafterBatches:
    """Alternates, by chance, between the corpus and the target's own answers."""

    def __init__(self, work: Path, own_text: Path, seed: int) -> None:
        self.windows = WindowSampler(work, "train", seed)
        self.own: list[tuple[list[int], list[int]]] = [(pair[0], pair[1]) for pair in json.loads(own_text.read_text())]
        self.own.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        self.random = random.Random(seed)

    def batch(self) -> tuple[Tensor, Tensor]:
        """``tokens [B, L]`` and, True where a draft would be needed, ``wanted [B, L]``."""
        if self.random.random() > OWN_TEXT_SHARE:
            tokens = self.windows.batch(6, 255)
            return tokens, torch.ones_like(tokens, dtype=torch.bool)
        start = self.random.randrange(len(self.own) - OWN_TEXT_ROWS)
        rows = self.own[start : start + OWN_TEXT_ROWS]
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        tokens = torch.full((len(rows), width), PAD_ID)
        wanted = torch.zeros_like(tokens, dtype=torch.bool)
        for row, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            tokens[row, :end] = torch.tensor(prompt + answer)
            wanted[row, len(prompt) : end] = True
        return tokens, wanted


def drafter_loss(
    drafter: Gemma4AssistantForCausalLM, target: Gemma4ForCausalLM, view: TargetView, wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss over four chained, teacher-forced steps, and the share of right drafts per step ``[4]``.

    Half is cross-entropy to the target's distribution, half to its most likely token.
    """
    rounds = RoundsInParallel(drafter, target, view)
    length = rounds.queries
    choice = view.logits.argmax(-1)
    # A padding column beyond the end repeats the last one; it must not be counted.
    beyond = torch.arange(length)[None]
    reached = torch.ones(view.tokens.shape[0], length)
    total, weights, right = torch.zeros(()), torch.zeros(()), []
    for step in range(DRAFT_STEPS):
        state = rounds.step(shifted(view.tokens, 1 + step, length))
        counted = shifted(wanted, 2 + step, length) & (beyond + 2 + step < view.tokens.shape[1])
        logits = drafter.lm_head(state[counted])
        teacher = shifted(view.logits, 1 + step, length)[counted]
        best = shifted(choice, 1 + step, length)
        log_probabilities = logits.float().log_softmax(-1)
        soft = -(teacher.softmax(-1) * log_probabilities).sum(-1)
        hard = -log_probabilities.gather(-1, best[counted][:, None])[:, 0]
        weight = reached[counted] * STEP_DECAY**step
        total = total + (weight * (0.5 * soft + 0.5 * hard)).sum()
        weights = weights + weight.sum()
        correct = (logits.argmax(-1) == best[counted]).float()
        right.append(correct.mean())
        reached = reached.masked_scatter(counted, torch.where(correct > 0, reached[counted], UNREACHED_WEIGHT))
    return total / weights, torch.stack(right)


def train_drafter(arguments: argparse.Namespace) -> None:
    use_fast_norm()
    family, work = FAMILIES[arguments.family], arguments.work
    target = load_target(family, work)
    own_text = work / f"{family.name}-own-text.json"
    if not own_text.exists():
        tokenizer = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
        prompts = choose_prompts(load_corpus(work / "corpus").pairs[0], arguments.own_answers, arguments.seed)
        write_own_text(target, tokenizer, prompts, 0.2, own_text)
    drafter = build_drafter(family, arguments.seed)
    warm_start(drafter, target, WindowSampler(work, "train", arguments.seed + 1))
    for name, parameter in drafter.named_parameters():
        parameter.requires_grad_("masked_embedding" not in name)
    print(f"{family.name} drafter: {sum(p.numel() for p in drafter.parameters()):,} parameters", flush=True)
    optimizers = build_optimizers(drafter, matrix_lr=0.003, other_lr=0.002)
    batches = DrafterBatches(work, own_text, arguments.seed)
    started, average, shares = time.process_time(), 0.0, torch.zeros(DRAFT_STEPS)
    for step in range(arguments.steps):
        set_learning_rate(optimizers, step, arguments.steps, warm_up=30)
        tokens, wanted = batches.batch()
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            view = read_with_target(target, tokens)
            loss, right = drafter_loss(drafter, target, view, wanted)
        loss.backward()
        apply_gradients(drafter, optimizers)
        keep = min(0.97, step / (step + 1))
        average, shares = keep * average + (1 - keep) * loss.item(), keep * shares + (1 - keep) * right
        if (step + 1) % 50 == 0:
            text = " ".join(f"{share:.3f}" for share in shares.tolist())
            seconds = time.process_time() - started
            print(f"step {step + 1} loss {average:.3f} right {text} cpu {seconds:.0f} s", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == arguments.steps:
            torch.save(drafter.state_dict(), work / f"{family.name}-drafter.pt")
    if drafter.masked_embedding is not None:
        train_centroids(drafter, target, batches.batch, arguments.centroid_steps)
        torch.save(drafter.state_dict(), work / f"{family.name}-drafter.pt")

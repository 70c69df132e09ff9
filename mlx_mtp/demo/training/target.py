"""Training of a target on chat and plain text."""

import argparse
import math
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import Gemma4ForCausalLM

from .batches import WindowSampler
from .families import FAMILIES, Family
from .fast_layers import ATTENTION, use_fast_norm
from .optimizer import apply_gradients, build_optimizers, set_learning_rate

WINDOW_LENGTHS = ((0.80, 8, 256), (0.93, 4, 512), (1.01, 2, 1024))  # until this share of the steps: rows, length
LOAD_BALANCE_WEIGHT = 0.01


def build_target(family: Family, seed: int) -> Gemma4ForCausalLM:
    """Random weights; every layer's scalar is away from 1, as in the real checkpoints, and stays as it is."""
    torch.manual_seed(seed)
    model = Gemma4ForCausalLM._from_config(family.target_config(), attn_implementation=ATTENTION, dtype=torch.float32)
    layers = len(model.model.layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                parameter.fill_(parameter.shape[0] ** -0.25)
            elif parameter.ndim == 2 and "embed" not in name:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            elif parameter.ndim == 3:
                nn.init.normal_(parameter, std=parameter.shape[2] ** -0.5)
        for index, layer in enumerate(model.model.layers):
            # Multiples of 1/64 between 0.80 and 0.95: exact in bf16, and different from layer to layer.
            layer.layer_scalar.fill_(round(64 * (0.80 + 0.15 * index / max(1, layers - 1))) / 64)
    return model


def token_loss(model: Gemma4ForCausalLM, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean nats per token of ``tokens [B, L + 1]``, and the experts' load-balance loss (0 without experts)."""
    output = model(tokens[:, :-1], use_cache=False, output_router_logits=model.config.enable_moe_block)
    loss = F.cross_entropy(output.logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
    if not model.config.enable_moe_block:
        return loss, torch.zeros(())
    balance = torch.zeros(())
    for probabilities in output.router_logits:
        probabilities = probabilities.flatten(0, -2)
        chosen = probabilities.topk(model.config.top_k_experts).indices
        share = F.one_hot(chosen, model.config.num_experts).float().sum(1).mean(0) / model.config.top_k_experts
        balance = balance + model.config.num_experts * (share * probabilities.mean(0)).sum()
    return loss, balance / len(output.router_logits)


@torch.no_grad()
def held_out_losses(model: Gemma4ForCausalLM, work: Path, windows: int = 24, length: int = 256) -> tuple[float, float]:
    """Nats per token on held-out (text, chat)."""
    model.eval()
    losses = []
    for chat_share in (0.0, 1.0):
        sampler = WindowSampler(work, "held_out", seed=1)
        batches = [sampler.batch(8, length, chat_share) for _ in range(windows // 8)]
        losses.append(sum(float(token_loss(model, batch)[0]) for batch in batches) / len(batches))
    model.train()
    return losses[0], losses[1]


def train_target(arguments: argparse.Namespace) -> None:
    use_fast_norm()
    family = FAMILIES[arguments.family]
    model = build_target(family, arguments.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{family.name}: {parameters:,} parameters", flush=True)
    optimizers = build_optimizers(model, matrix_lr=0.006, other_lr=0.004)
    sampler = WindowSampler(arguments.work, "train", arguments.seed)
    started, average = time.process_time(), math.nan
    for step in range(arguments.steps):
        rows, length = next((rows, length) for end, rows, length in WINDOW_LENGTHS if step < end * arguments.steps)
        set_learning_rate(optimizers, step, arguments.steps, warm_up=60)
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bf16):
            loss, balance = token_loss(model, sampler.batch(rows, length))
        (loss + LOAD_BALANCE_WEIGHT * balance).backward()
        apply_gradients(model, optimizers)
        average = float(loss) if math.isnan(average) else 0.98 * average + 0.02 * float(loss)
        if (step + 1) % 50 == 0:
            seconds = time.process_time() - started
            print(f"step {step + 1} loss {average:.3f} balance {float(balance):.2f} cpu {seconds:.0f} s", flush=True)
        if (step + 1) % arguments.save_every == 0 or step + 1 == arguments.steps:
            text, chat = held_out_losses(model, arguments.work)
            print(f"step {step + 1} held-out text {text:.3f} chat {chat:.3f}", flush=True)
            torch.save({"step": step + 1, "model": model.state_dict()}, arguments.work / f"{family.name}-target.pt")

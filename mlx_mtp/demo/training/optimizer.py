"""Muon for the matrices, AdamW for everything else, and their shared learning-rate schedule."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalize(gradient: Tensor, iterations: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix (Jordan et al., "Muon", 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = gradient / (gradient.norm() + 1e-7)
    transposed = x.shape[0] > x.shape[1]
    x = x.T if transposed else x
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if transposed else x


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalisation; the step is scaled so that one learning rate fits every matrix shape."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                buffer = state.setdefault("momentum", torch.zeros_like(parameter))
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalize(parameter.grad.lerp(buffer, group["momentum"]))
                scale = max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
                parameter.add_(update, alpha=-group["lr"] * scale)


def build_optimizers(model: nn.Module, matrix_lr: float, other_lr: float) -> list[torch.optim.Optimizer]:
    """Embeddings, norms, experts (three-dimensional), routers and centroids go to AdamW."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_table = any(part in name for part in ("embed", "router", "centroids", "lm_head"))
        (matrices if parameter.ndim == 2 and not is_table else others).append(parameter)
    adam = torch.optim.AdamW(others, lr=other_lr, betas=(0.9, 0.98), weight_decay=0.0)
    optimizers: list[torch.optim.Optimizer] = [Muon(matrices, lr=matrix_lr)] if matrices else []
    for optimizer in [*optimizers, adam]:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return [*optimizers, adam]


def set_learning_rate(optimizers: list[torch.optim.Optimizer], step: int, steps: int, warm_up: int) -> None:
    """Linear warm-up, constant up to half of the steps, then linear decay to 2%."""
    factor = min(1.0, (step + 1) / warm_up, max(0.02, 2.0 * (1.0 - step / steps)))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor


def apply_gradients(model: nn.Module, optimizers: list[torch.optim.Optimizer], max_norm: float = 1.0) -> None:
    nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], max_norm)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

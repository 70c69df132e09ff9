"""A drafter that starts as the target's own last two layers.

The drafter's queries read the keys and values of the target's donor layers, and so do the queries of the target's last
sliding and last full layer, in the same position. So these two layers are copied, the output embedding too, and the one
new thing, what replaces the layers below, starts as a linear regression: from the newest token's embedding and the
target's previous hidden state to the residual stream that enters the copied layers.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Gemma4AssistantForCausalLM, Gemma4ForCausalLM

from .batches import WindowSampler
from .drafting import read_with_target


@torch.no_grad()
def warm_start(drafter: Gemma4AssistantForCausalLM, target: Gemma4ForCausalLM, sampler: WindowSampler) -> None:
    """Overwrite the drafter's random weights; its hidden size must equal the target's."""
    width = target.config.hidden_size
    if drafter.hidden_size != width:
        raise ValueError(f"a warm start copies layers: drafter width {drafter.hidden_size}, target width {width}")
    layers, target_layers = list(drafter.model.layers), list(target.model.layers)
    drafter.model.embed_tokens.weight.copy_(target.model.embed_tokens.weight)
    drafter.model.norm.weight.copy_(target.model.norm.weight)
    drafter.post_projection.weight.copy_(torch.eye(width))
    for source, layer in zip(target_layers[-2:], layers[-2:], strict=True):
        _copy_layer(source, layer)
    shrinkage = 1.0
    for layer in layers[:-2]:  # what the target has no counterpart for starts by adding nothing
        layer.post_attention_layernorm.weight.fill_(0.02)
        layer.post_feedforward_layernorm.weight.fill_(0.02)
        shrinkage *= layer.layer_scalar.item()
    solution = _regress_residual(target, target_layers[-2], sampler)
    drafter.pre_projection.weight.copy_(solution / shrinkage)


def _copy_layer(source: nn.Module, layer: nn.Module) -> None:
    """Attention and norms as they are; of the MLP the strongest units, as many as fit."""
    state: dict[str, Tensor] = source.state_dict()
    own: dict[str, Tensor] = layer.state_dict()
    strength = torch.ones(state["mlp.up_proj.weight"].shape[0])
    for name, axis in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 0)):
        strength = strength * state[f"mlp.{name}.weight"].norm(dim=axis)
    units = strength.topk(own["mlp.up_proj.weight"].shape[0]).indices.sort().values
    for name, tensor in own.items():
        if name == "mlp.down_proj.weight":
            tensor.copy_(state[name][:, units])
        elif name.startswith("mlp."):
            tensor.copy_(state[name][units])
        else:
            tensor.copy_(state[name])


def _regress_residual(target: Gemma4ForCausalLM, layer: nn.Module, sampler: WindowSampler) -> Tensor:
    """``[D, 2 D]``: least squares from (embedding at P, hidden state at P - 1) to the input of ``layer`` at P."""
    captured: list[Tensor] = []

    def capture(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        captured.append(inputs[0])

    handle = layer.register_forward_pre_hook(capture)
    width = target.config.hidden_size
    gram, moment = 1e-3 * torch.eye(2 * width), torch.zeros(2 * width, width)
    for _ in range(12):
        tokens = sampler.batch(8, 255)
        view = read_with_target(target, tokens)
        embedded = target.model.embed_tokens(tokens[:, 1:])
        inputs = torch.cat([embedded, view.hidden[:, :-1]], dim=-1).flatten(0, 1)
        wished = captured.pop()[:, 1:].flatten(0, 1)
        gram += inputs.T @ inputs
        moment += inputs.T @ wished
    handle.remove()
    return torch.linalg.solve(gram, moment).T

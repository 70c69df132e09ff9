"""The one table of tensor names: Hugging Face's and mlx-lm's spellings on one side, our modules' on the other.

Inside, a tensor is called by its path in `models.target.Target` or `models.drafter.Drafter`. On disk we write mlx-lm's
spelling, which is ours with a prefix, and read all of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Part = Literal["target", "drafter"]

# Longest first: the first that fits is cut off. What fits none keeps its name.
PREFIXES: dict[Part, tuple[str, ...]] = {
    "target": ("model.language_model.", "language_model.model.", "language_model.", "model."),
    "drafter": ("model.",),
}
WRITTEN_PREFIX: dict[Part, str] = {"target": "language_model.model.", "drafter": "model."}
# The drafter's tensors outside its trunk have no prefix on disk.
UNPREFIXED = ("pre_projection.", "post_projection.", "masked_embedding.")

TIED = "tied to the embedding"
# Tensors that the text path does not use: a pattern on the name without prefix, and why it is left out.
DROPPED: tuple[tuple[str, str], ...] = (
    (r"(vision_tower|embed_vision|vision_embedder|multi_modal_projector)\.", "vision"),
    (r"(audio_tower|embed_audio)\.", "audio"),
    (r"lm_head\.", TIED),
    (r".*rotary_emb\.inv_freq$", "derived from the config"),
)
TOWERS = ("vision", "audio")  # the reasons above that `mlx_mtp.convert --keep-towers` overrules
# Written for KV-shared layers too by some tools; such layers read their donor's K/V.
SHARED_KV = re.compile(r"layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.")
SHARED_KV_REASON = "unused: the layer shares its donor's K/V"

# Fused in Hugging Face's files: one tensor [E, 2 * width, D] that holds gate, then up.
FUSED_GATE_UP = re.compile(r"(layers\.\d+\.experts\.)gate_up_proj$")
RENAMED: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"(layers\.\d+\.experts\.)down_proj$"), r"\1switch_glu.down_proj.weight"),
)


@dataclass(frozen=True)
class Use:
    """Where a tensor goes: its path inside; `half` 0 or 1 of axis -2 if it is part of a fused tensor."""

    path: str
    half: int | None = None


def strip_prefix(name: str, part: Part) -> str:
    """The name without its spelling's prefix; also right for module paths such as those in `quantization`."""
    for prefix in PREFIXES[part]:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def written_name(path: str, part: Part) -> str:
    """The name under which a tensor or module is written to disk."""
    return path if f"{path}.".startswith(UNPREFIXED) else WRITTEN_PREFIX[part] + path


def tower_name(name: str) -> str | None:
    """The name under which a vision or audio tensor is written, which is mlx-vlm's; None for any other tensor."""
    path = strip_prefix(name, "target")
    is_tower = any(re.match(pattern, path) for pattern, reason in DROPPED if reason in TOWERS)
    return path if is_tower else None


def uses(name: str, part: Part, shared_kv_layers: frozenset[int]) -> list[Use] | str:
    """What becomes of the tensor `name`: the uses it has, or the reason why it is left out."""
    path = strip_prefix(name, part)
    for pattern, reason in DROPPED:
        if re.match(pattern, path):
            return reason
    shared = SHARED_KV.match(path)
    if shared and int(shared[1]) in shared_kv_layers:
        return SHARED_KV_REASON
    fused = FUSED_GATE_UP.match(path)
    if fused:
        return [Use(f"{fused[1]}switch_glu.{half}_proj.weight", i) for i, half in enumerate(("gate", "up"))]
    for renamed, replacement in RENAMED:
        path = renamed.sub(replacement, path)
    return [Use(path)]

"""Small random checkpoints of the four Gemma 4 kinds, in the layout of the published ones.

Every weight is a function of (seed, kind, role, tensor name) alone, so adding a tensor never changes another one.
Values are rounded to bfloat16 before anything is computed from them: the float32 reference and a port that reads the
files see identical numbers. Names and shapes follow transformers 5.22.2 (`gemma4`, `gemma4_unified` and their
assistants). Widths are multiples of 32, so the checkpoints can be quantized in groups of 32.
"""

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import save_file
from transformers import (
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedAssistantConfig,
    Gemma4UnifiedAssistantForCausalLM,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
)

SEED = 20260402
WINDOW = 16
VOCABULARY = 256
HEAD_DIM = 16
GLOBAL_HEAD_DIM = 32
HIDDEN = 64
ASSISTANT_HIDDEN = 32
NUM_CENTROIDS = 32
CENTROID_TOP_K = 4
EOS_TOKEN_IDS = [1, 106, 50]

ROPE_PARAMETERS = {
    "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
}
LAYER_TYPES = {"S": "sliding_attention", "F": "full_attention"}


@dataclass(frozen=True)
class Kind:
    """One of the four model families in miniature.

    pattern: a letter per layer, S sliding and F full. kv_heads / global_kv_heads: of sliding / full layers; None means
    that full layers use kv_heads, as where K and V are separate. overrides: further keys of the target's text config.
    """

    name: str
    pattern: str
    heads: int
    kv_heads: int
    global_kv_heads: int | None
    unified: bool = False
    centroid_head: bool = False
    foreign_tensors: bool = False
    overrides: dict[str, Any] = field(default_factory=dict)


NO_PER_LAYER_INPUT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}

KINDS = (
    Kind(
        name="dense",
        pattern="SSSSSFSSF",
        heads=8,
        kv_heads=4,
        global_kv_heads=2,
        overrides={"attention_k_eq_v": True, "intermediate_size": 64, **NO_PER_LAYER_INPUT},
    ),
    Kind(
        name="mixture",
        pattern="SSFSSF",
        heads=4,
        kv_heads=2,
        global_kv_heads=1,
        overrides={
            "attention_k_eq_v": True,
            "intermediate_size": 64,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            **NO_PER_LAYER_INPUT,
        },
    ),
    Kind(
        name="edge",
        pattern="SSFSSFSSF",
        heads=4,
        kv_heads=1,
        global_kv_heads=None,
        centroid_head=True,
        foreign_tensors=True,
        overrides={
            "intermediate_size": 64,
            "num_kv_shared_layers": 3,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": VOCABULARY,
        },
    ),
    Kind(
        name="unified",
        pattern="SSSSSF",
        heads=4,
        kv_heads=2,
        global_kv_heads=1,
        unified=True,
        overrides={"attention_k_eq_v": True, "intermediate_size": 64},
    ),
)


def text_config(kind: Kind, role: str) -> dict[str, Any]:
    """The `text_config` of a kind's target or assistant, spelled as on the Hub (`global_head_dim`, ...)."""
    pattern = kind.pattern if role == "target" else "SSSF"
    config: dict[str, Any] = {
        "model_type": "gemma4_unified_text" if kind.unified else "gemma4_text",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": kind.overrides.get("attention_k_eq_v", False),
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "final_logit_softcapping": 30.0,
        "global_head_dim": GLOBAL_HEAD_DIM,
        "head_dim": HEAD_DIM,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": HIDDEN if role == "target" else ASSISTANT_HIDDEN,
        "intermediate_size": 64,
        "layer_types": [LAYER_TYPES[letter] for letter in pattern],
        "max_position_embeddings": 4096,
        "num_attention_heads": kind.heads,
        "num_global_key_value_heads": kind.global_kv_heads,
        "num_hidden_layers": len(pattern),
        "num_key_value_heads": kind.kv_heads,
        "num_kv_shared_layers": 0,
        "rms_norm_eps": 1e-6,
        "rope_parameters": ROPE_PARAMETERS,
        "sliding_window": WINDOW,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": "vision" if role == "target" and not kind.centroid_head else None,
        "vocab_size": VOCABULARY,
    }
    if role == "target":
        return config | kind.overrides
    config |= {"intermediate_size": 32, "num_kv_shared_layers": len(pattern)}
    return config if kind.unified else config | NO_PER_LAYER_INPUT


def hub_config(kind: Kind, role: str) -> dict[str, Any]:
    """config.json of a kind's target or assistant as the Hub's files spell it."""
    family = "gemma4_unified" if kind.unified else "gemma4"
    if role == "target":
        return {
            "architectures": [target_class(kind).__name__],
            "audio_config": None,
            "audio_token_id": 258881,
            "boa_token_id": 256000,
            "boi_token_id": 255999,
            "dtype": "bfloat16",
            "eoa_token_index": 258883,
            "eoi_token_id": 258882,
            "eos_token_id": EOS_TOKEN_IDS,
            "image_token_id": 258880,
            "model_type": family,
            "text_config": text_config(kind, role),
            "tie_word_embeddings": True,
            "video_token_id": 258884,
            "vision_config": None,
        }
    return {
        "architectures": [assistant_class(kind).__name__],
        "backbone_hidden_size": HIDDEN,
        "centroid_intermediate_top_k": CENTROID_TOP_K,
        "dtype": "bfloat16",
        "model_type": f"{family}_assistant",
        "num_centroids": NUM_CENTROIDS,
        "text_config": text_config(kind, role),
        "tie_word_embeddings": True,
        "use_ordered_embeddings": kind.centroid_head,
    }


def target_class(kind: Kind) -> type[PreTrainedModel]:
    return Gemma4UnifiedForConditionalGeneration if kind.unified else Gemma4ForConditionalGeneration


def assistant_class(kind: Kind) -> type[PreTrainedModel]:
    return Gemma4UnifiedAssistantForCausalLM if kind.unified else Gemma4AssistantForCausalLM


def config_class(kind: Kind, role: str) -> type[PreTrainedConfig]:
    if role == "target":
        return Gemma4UnifiedConfig if kind.unified else Gemma4Config
    return Gemma4UnifiedAssistantConfig if kind.unified else Gemma4AssistantConfig


def random_tensor(kind: Kind, role: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The bfloat16 weight called `name`; its scale keeps logits spread and every part of the model felt.

    numpy's generator is used because its stream does not depend on the vector width of the machine.
    """
    generator = numpy.random.default_rng([SEED, zlib.crc32(f"{kind.name}/{role}/{name}".encode())])
    if name.endswith("token_ordering"):
        return torch.from_numpy(generator.permutation(shape[0]).astype(numpy.int64))
    normal = generator.standard_normal(shape)
    if name.endswith("layer_scalar"):
        # Below 1 in the target, so that the tied embedding of the last token does not win every argmax.
        values = 0.4 + 0.3 * generator.random(shape) if role == "target" else 0.8 + 0.3 * generator.random(shape)
    elif name.endswith("q_norm.weight"):
        # Attention scale is 1: smaller queries keep every key of the window felt, and float32 rounding from growing.
        values = (0.25 if kind.unified else 0.2) * (1.0 + 0.24 * normal)
    elif "norm" in name or name.endswith(("router.scale", "per_expert_scale")):
        values = 1.0 + 0.25 * normal
    elif name.endswith("embed_tokens.weight"):
        values = 0.55 * normal
    elif name.endswith("embed_tokens_per_layer.weight"):
        values = 0.25 * normal
    elif name.endswith("router.proj.weight"):
        values = 2.0 * normal
    else:
        values = normal / (shape[-1] if shape else 1) ** 0.5
    return torch.from_numpy(numpy.asarray(values, dtype=numpy.float32)).to(torch.bfloat16)


def unused_tensors(kind: Kind) -> dict[str, tuple[int, ...]]:
    """Names and shapes that published files of E2B and E4B carry and a text decoder must leave out.

    k/v weights of KV-shared layers, and tensors of the vision and audio towers (here only a few tiny ones).
    """
    if not kind.foreign_tensors:
        return {}
    shapes: dict[str, tuple[int, ...]] = {
        "model.vision_tower.patch_embedder.input_proj.weight": (4, 6),
        "model.vision_tower.patch_embedder.position_embedding_table": (2, 5, 4),
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight": (4, 4),
        "model.vision_tower.encoder.layers.0.input_layernorm.weight": (4,),
        "model.embed_vision.embedding_projection.weight": (HIDDEN, 4),
        "model.audio_tower.layers.0.feed_forward1.ffw_layer_1.linear.weight": (8, 4),
        "model.audio_tower.layers.0.feed_forward1.ffw_layer_1.input_max": (),
        "model.audio_tower.output_proj.weight": (4, 4),
        "model.embed_audio.embedding_projection.weight": (HIDDEN, 4),
    }
    first_shared = len(kind.pattern) - kind.overrides["num_kv_shared_layers"]
    for layer in range(first_shared, len(kind.pattern)):
        head_dim = HEAD_DIM if kind.pattern[layer] == "S" else GLOBAL_HEAD_DIM
        prefix = f"model.language_model.layers.{layer}.self_attn."
        shapes[prefix + "k_norm.weight"] = (head_dim,)
        shapes[prefix + "k_proj.weight"] = (kind.kv_heads * head_dim, HIDDEN)
        shapes[prefix + "v_proj.weight"] = (kind.kv_heads * head_dim, HIDDEN)
    return shapes


def checkpoint_tensors(kind: Kind, role: str) -> dict[str, torch.Tensor]:
    """Every tensor of one model.safetensors, by its published name. The tied `lm_head.weight` is not stored."""
    config = config_class(kind, role).from_dict(hub_config(kind, role))
    model = (target_class(kind) if role == "target" else assistant_class(kind))._from_config(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    if role == "target":
        shapes |= unused_tensors(kind)
    return {name: random_tensor(kind, role, name, shape) for name, shape in sorted(shapes.items())}


def write_checkpoint(kind: Kind, role: str, folder: Path) -> None:
    """Write config.json, config.per_layer.json, generation_config.json and model.safetensors into `folder`.

    config.per_layer.json is the same model as transformers 5.22.2 saves it: `per_layer_config` instead of the two
    global keys.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = hub_config(kind, role)
    per_layer = config_class(kind, role).from_dict(config).to_dict()
    generation = {
        "bos_token_id": 2,
        "do_sample": True,
        "eos_token_id": EOS_TOKEN_IDS,
        "pad_token_id": 0,
        "temperature": 1.0,
        "top_k": 64,
        "top_p": 0.95,
    }
    for name, content in (
        ("config.json", config),
        ("config.per_layer.json", per_layer),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    save_file(checkpoint_tensors(kind, role), str(folder / "model.safetensors"), metadata={"format": "pt"})

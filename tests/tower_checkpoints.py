"""Small checkpoints with vision and audio towers, in Hugging Face's names and layouts, built without torch.

The text part is that of tests/goldens; the towers are random. Names, shapes and config keys are those that transformers
5.22.2 saves (`Gemma4ForConditionalGeneration(config).save_pretrained`), compared in test_towers.py where torch is
installed. A tokenizer and a processor config lie beside them, so that mlx-lm's and mlx-vlm's own `load` work.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from support import GOLDENS

from mlx_mtp import demo
from mlx_mtp.checkpoint.weights import tower_name

HIDDEN = 64  # of the golden targets
Shape = tuple[int, ...]

VISION: dict[str, Any] = {
    "model_type": "gemma4_vision",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "pooling_kernel_size": 3,
    "position_embedding_size": 16,
    "use_clipped_linears": False,
    "standardize": True,
}
AUDIO: dict[str, Any] = {
    "model_type": "gemma4_audio",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [128, 4],  # the first is also the number of frequencies: both stacks rely on 128
    "conv_kernel_size": 5,
    "use_clipped_linears": True,
    "output_proj_dims": 32,
}
UNIFIED_VISION: dict[str, Any] = {
    "model_type": "gemma4_unified_vision",
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "model_patch_size": 8,  # patch_size * pooling_kernel_size, which mlx-vlm does not multiply itself
    "mm_embed_dim": 32,
    "mm_posemb_size": 16,
    "output_proj_dims": 32,
}
UNIFIED_AUDIO: dict[str, Any] = {
    "model_type": "gemma4_unified_audio",
    "audio_embed_dim": 32,
    "output_proj_dims": 32,
    "audio_samples_per_token": 32,
}
TOWERS: dict[str, dict[str, Any]] = {
    "dense": {"vision_config": VISION},
    "mixture": {"vision_config": VISION},
    "edge": {"vision_config": VISION | {"use_clipped_linears": True, "standardize": False}, "audio_config": AUDIO},
    "unified": {"vision_config": UNIFIED_VISION, "audio_config": UNIFIED_AUDIO},
}


def clipped(name: str, rows: int, columns: int, has_bounds: bool) -> dict[str, Shape]:
    """A linear layer with four scalar bounds on what goes in and out, infinite where it does not clip."""
    bounds = [f"{name}.{side}_{end}" for side in ("input", "output") for end in ("min", "max")] if has_bounds else []
    return {f"{name}.linear.weight": (rows, columns)} | dict.fromkeys(bounds, ())


def vision_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    width, wide, bounds = config["hidden_size"], config["intermediate_size"], config["use_clipped_linears"]
    attention = config["num_attention_heads"] * config["head_dim"]
    tower = "model.vision_tower"
    shapes: dict[str, Shape] = {
        "model.embed_vision.embedding_projection.weight": (HIDDEN, width),
        f"{tower}.patch_embedder.input_proj.weight": (width, 3 * config["patch_size"] ** 2),
        f"{tower}.patch_embedder.position_embedding_table": (2, config["position_embedding_size"], width),
    }
    if config["standardize"]:
        shapes |= {f"{tower}.std_bias": (width,), f"{tower}.std_scale": (width,)}
    for i in range(config["num_hidden_layers"]):
        layer = f"{tower}.encoder.layers.{i}"
        for projection in ("q", "k", "v"):
            shapes |= clipped(f"{layer}.self_attn.{projection}_proj", attention, width, bounds)
        shapes |= clipped(f"{layer}.self_attn.o_proj", width, attention, bounds)
        shapes |= {f"{layer}.self_attn.{norm}_norm.weight": (config["head_dim"],) for norm in ("q", "k")}
        shapes |= clipped(f"{layer}.mlp.gate_proj", wide, width, bounds)
        shapes |= clipped(f"{layer}.mlp.up_proj", wide, width, bounds)
        shapes |= clipped(f"{layer}.mlp.down_proj", width, wide, bounds)
        for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            shapes[f"{layer}.{norm}_layernorm.weight"] = (width,)
    return shapes


def audio_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    width, (first, second) = config["hidden_size"], config["subsampling_conv_channels"]
    tower = "model.audio_tower"
    shapes: dict[str, Shape] = {
        "model.embed_audio.embedding_projection.weight": (HIDDEN, config["output_proj_dims"]),
        f"{tower}.output_proj.weight": (config["output_proj_dims"], width),
        f"{tower}.output_proj.bias": (config["output_proj_dims"],),
        f"{tower}.subsample_conv_projection.layer0.conv.weight": (first, 1, 3, 3),
        f"{tower}.subsample_conv_projection.layer0.norm.weight": (first,),
        f"{tower}.subsample_conv_projection.layer1.conv.weight": (second, first, 3, 3),
        f"{tower}.subsample_conv_projection.layer1.norm.weight": (second,),
        f"{tower}.subsample_conv_projection.input_proj_linear.weight": (width, first // 4 * second),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"{tower}.layers.{i}"
        for part in ("feed_forward1", "feed_forward2"):
            shapes |= clipped(f"{layer}.{part}.ffw_layer_1", 4 * width, width, True)
            shapes |= clipped(f"{layer}.{part}.ffw_layer_2", width, 4 * width, True)
            shapes |= {f"{layer}.{part}.{side}_layer_norm.weight": (width,) for side in ("pre", "post")}
        for projection in ("q_proj", "k_proj", "v_proj", "post"):
            shapes |= clipped(f"{layer}.self_attn.{projection}", width, width, True)
        shapes[f"{layer}.self_attn.relative_k_proj.weight"] = (width, width)
        shapes[f"{layer}.self_attn.per_dim_scale"] = (width // config["num_attention_heads"],)
        shapes |= clipped(f"{layer}.lconv1d.linear_start", 2 * width, width, True)
        shapes |= clipped(f"{layer}.lconv1d.linear_end", width, width, True)
        shapes[f"{layer}.lconv1d.depthwise_conv1d.weight"] = (width, 1, config["conv_kernel_size"])
        norms = ("lconv1d.pre_layer_norm", "lconv1d.conv_norm", "norm_pre_attn", "norm_post_attn", "norm_out")
        shapes |= {f"{layer}.{norm}.weight": (width,) for norm in norms}
    return shapes


def unified_shapes(vision: Mapping[str, Any], audio: Mapping[str, Any]) -> dict[str, Shape]:
    """Of the encoder-free kind: patches and frames are projected and normalised, and that is all."""
    width, pixels = vision["mm_embed_dim"], 3 * (vision["patch_size"] * vision["pooling_kernel_size"]) ** 2
    embedder = "model.vision_embedder"
    shapes: dict[str, Shape] = {
        f"{embedder}.patch_dense.weight": (width, pixels),
        f"{embedder}.patch_dense.bias": (width,),
        f"{embedder}.pos_embedding": (vision["mm_posemb_size"], 2, width),
        "model.embed_vision.embedding_projection.weight": (HIDDEN, vision["output_proj_dims"]),
        "model.embed_audio.embedding_projection.weight": (HIDDEN, audio["audio_embed_dim"]),
    }
    for norm, size in (("patch_ln1", pixels), ("patch_ln2", width), ("pos_norm", width)):
        shapes |= {f"{embedder}.{norm}.weight": (size,), f"{embedder}.{norm}.bias": (size,)}
    return shapes


def tower_shapes(kind: str) -> dict[str, Shape]:
    """Names and shapes of a kind's tower tensors, as Hugging Face's files have them."""
    configs = TOWERS[kind]
    if kind == "unified":
        return unified_shapes(configs["vision_config"], configs["audio_config"])
    shapes = vision_shapes(configs["vision_config"])
    return shapes | audio_shapes(configs["audio_config"]) if "audio_config" in configs else shapes


def random_tower(name: str, shape: Shape) -> mx.array:
    """A bfloat16 tensor that depends on its name alone. Some clip bounds are infinite, as in an uncalibrated layer."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith(("_min", "_max")):
        size = np.inf if "k_proj" in name else 4 + generator.random()
        return mx.array(size if name.endswith("_max") else -size, mx.bfloat16)
    values = generator.standard_normal(shape) / (shape[-1] if len(shape) > 1 else 4) ** 0.5
    return mx.array((values + ("norm" in name)).astype(np.float32)).astype(mx.bfloat16)


def golden_config(kind: str, part: str, name: str = "config.json") -> dict[str, Any]:
    """A golden config with what a published one says too, and the peers need.

    vocab_size at the top: mlx-lm takes no other. hidden_size_per_layer_input: where it is absent they take E2B's 256.
    """
    raw: dict[str, Any] = json.loads((GOLDENS / kind / part / name).read_text())
    raw["vocab_size"] = raw["text_config"]["vocab_size"]
    raw["text_config"].setdefault("hidden_size_per_layer_input", 0)
    return raw


def newest_config(kind: str, part: str) -> dict[str, Any]:
    """The same model as transformers 5.22.2 spells it: with `per_layer_config`, and without what the peers need."""
    raw: dict[str, Any] = json.loads((GOLDENS / kind / part / "config.per_layer.json").read_text())
    return raw


def write_target(kind: str, folder: Path, config: Mapping[str, Any] | None = None) -> Path:
    """Writes the target of a kind with its towers into `folder`, in Hugging Face's form, and returns the folder.

    config: without towers; by default the golden one.
    """
    tensors = mx.load(str(GOLDENS / kind / "target" / "model.safetensors"))
    assert isinstance(tensors, dict)
    text = {name: array for name, array in tensors.items() if tower_name(name) is None}
    towers = {name: random_tower(name, shape) for name, shape in tower_shapes(kind).items()}
    raw = dict(golden_config(kind, "target") if config is None else config) | TOWERS[kind]
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "model.safetensors"), text | towers, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "processor_config.json").write_text("{}")
    shutil.copy(GOLDENS / kind / "target" / "generation_config.json", folder)
    return with_tokenizer(folder)


def text_only(kind: str, folder: Path) -> Path:
    """Writes the text part alone, as transformers saves its `...ForCausalLM`: a flat config, shorter names."""
    tensors = mx.load(str(GOLDENS / kind / "target" / "model.safetensors"))
    assert isinstance(tensors, dict)
    text = {name.replace("model.language_model.", "model."): array
            for name, array in tensors.items() if tower_name(name) is None}
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "model.safetensors"), text, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(newest_config(kind, "target")["text_config"]))
    return with_tokenizer(folder)


def write_drafter(kind: str, folder: Path, config: Mapping[str, Any] | None = None) -> Path:
    """Writes the golden drafter of a kind into `folder` and returns it; config as in `write_target`."""
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "generation_config.json"):
        shutil.copy(GOLDENS / kind / "assistant" / name, folder)
    (folder / "config.json").write_text(json.dumps(golden_config(kind, "assistant") if config is None else config))
    return with_tokenizer(folder)


def with_tokenizer(folder: Path) -> Path:
    """Adds the built-in pair's tokenizer: larger than the golden vocabulary, but the peers load no folder without."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo.TARGET / name, folder)
    return folder

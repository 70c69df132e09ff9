"""Write the checkpoint folders: Hugging Face's tensor names in bf16, with configs that old and new readers accept."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Gemma4AssistantForCausalLM, Gemma4ForCausalLM

from .families import Family
from .tokenizer import BOS_ID, EOS_ID, PAD_ID, STOP_IDS, save_tokenizer

# What transformers adds to every config and no reader of these folders looks at.
_UNWANTED_KEYS = {"_name_or_path", "dtype", "architectures", "transformers_version", "_attn_implementation"}
_UNWANTED_KEYS |= {"chunk_size_feed_forward", "id2label", "label2id", "is_encoder_decoder", "problem_type"}
_UNWANTED_KEYS |= {"output_attentions", "output_hidden_states", "return_dict"}


def text_config(model_config: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The text config in both spellings: ``global_head_dim`` and friends, and transformers' ``per_layer_config``."""
    config = {key: value for key, value in model_config.to_dict().items() if key not in _UNWANTED_KEYS}
    config["global_head_dim"] = arguments["global_head_dim"]
    config["num_global_key_value_heads"] = arguments.get("num_global_key_value_heads")
    config["eos_token_id"] = EOS_ID
    config["dtype"] = "bfloat16"
    return dict(sorted(config.items()))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _generation_config(**more: Any) -> dict[str, Any]:
    return {"bos_token_id": BOS_ID, "eos_token_id": STOP_IDS, "pad_token_id": PAD_ID, "do_sample": False, **more}


def _save_weights(tensors: dict[str, Tensor], path: Path) -> None:
    rounded = {
        name: (tensor if tensor.dtype == torch.int64 else tensor.to(torch.bfloat16)).contiguous().clone()
        for name, tensor in tensors.items()
    }
    save_file(rounded, path, metadata={"format": "pt"})
    path.chmod(0o644)


def export_target(model: Gemma4ForCausalLM, family: Family, tokenizer: Tokenizer, folder: Path) -> None:
    """The target as the text part of a ``gemma4`` checkpoint, without vision and audio towers."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "model.language_model." + name.removeprefix("model."): tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith("lm_head")
    }
    _save_weights(tensors, folder / "model.safetensors")
    config = {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "dtype": "bfloat16",
        "text_config": text_config(model.config, family.target),
        "vision_config": None,
        "audio_config": None,
        "tie_word_embeddings": True,
        "vocab_size": family.target["vocab_size"],  # mlx-lm reads it here
        "bos_token_id": BOS_ID,
        "eos_token_id": STOP_IDS,
        "pad_token_id": PAD_ID,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _generation_config())
    save_tokenizer(tokenizer, folder)


def export_drafter(model: Gemma4AssistantForCausalLM, family: Family, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("lm_head")}
    _save_weights(tensors, folder / "model.safetensors")
    config = {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "model_type": "gemma4_assistant",
        "dtype": "bfloat16",
        "backbone_hidden_size": model.config.backbone_hidden_size,
        "text_config": text_config(model.config.text_config, family.drafter),
        "tie_word_embeddings": True,
        **family.assistant,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _generation_config(num_assistant_tokens=3))

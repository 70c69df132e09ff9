"""Random pairs of medium size, in Hugging Face's format: large enough that weights, not Python, take the time.

    python -m bench.medium_pair FOLDER               FOLDER/target and FOLDER/target-assistant
    python -m bench.medium_pair FOLDER --experts 32  the same with experts

Their texts mean nothing; acceptance is replayed (see `bench.replay`). Weights are the seed's, so every run and every
machine gets the same pair.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_mtp import demo
from mlx_mtp.checkpoint.weights import Part, written_name
from mlx_mtp.config import DrafterConfig, TargetConfig
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target

ROTARY = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


def text_config(layers: int, pattern: int, **changes: Any) -> dict[str, Any]:
    kinds = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
    return {
        "model_type": "gemma4_text", "vocab_size": 16_384, "hidden_size": 512, "intermediate_size": 2048,
        "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
        "global_head_dim": 128, "num_global_key_value_heads": 2, "attention_k_eq_v": True, "layer_types": kinds,
        "sliding_window": 128, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "rope_parameters": ROTARY,
        "final_logit_softcapping": 30.0, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
        "use_double_wide_mlp": False, "enable_moe_block": False, "tie_word_embeddings": True, **changes,
    }


def target_config(experts: int) -> dict[str, Any]:
    """Many experts are small ones, and a token goes to more of them."""
    top_k, width = (8, 128) if experts >= 128 else (4, 256)
    mixture = {"enable_moe_block": True, "num_experts": experts, "top_k_experts": top_k,
               "moe_intermediate_size": width, "intermediate_size": 1024} if experts else {}
    return {"model_type": "gemma4", "vocab_size": 16_384, "text_config": text_config(10, 5, **mixture)}


def drafter_config() -> dict[str, Any]:
    trunk = text_config(4, 4, hidden_size=128, intermediate_size=512, num_attention_heads=4, num_kv_shared_layers=4,
                        final_logit_softcapping=None)
    return {"model_type": "gemma4_assistant", "backbone_hidden_size": 512, "use_ordered_embeddings": False,
            "text_config": trunk}


def write(folder: Path, part: Part, config: dict[str, Any], model: nn.Module, seed: int) -> None:
    """Fills a model with small random numbers and writes it, in float32."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(demo.TARGET / name, folder)
    weights = {}
    for i, (path, array) in enumerate(tree_flatten(model.parameters())):
        key = mx.random.key(seed * 100_000 + i)
        if array.ndim < 2:
            weights[written_name(path, part)] = mx.ones(array.shape)
        else:
            weights[written_name(path, part)] = mx.random.normal(array.shape, key=key) * array.shape[-1] ** -0.5
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})


def main() -> None:
    cli = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    cli.add_argument("folder", type=Path)
    cli.add_argument("--experts", type=int, default=0, help="of a mixture, such as 32 or 128; 0 is dense (default)")
    args = cli.parse_args()
    config, drafting = target_config(args.experts), drafter_config()
    write(args.folder / "target", "target", config, Target(TargetConfig.from_json(config)), 1)
    write(args.folder / "target-assistant", "drafter", drafting, Drafter(DrafterConfig.from_json(drafting)), 2)


if __name__ == "__main__":
    main()

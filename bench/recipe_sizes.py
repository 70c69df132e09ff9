"""What each recipe costs in size, computed from the published architectures: no weight is needed.

    python -m bench.recipe_sizes
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_mtp.checkpoint.loader import QUANTIZABLE
from mlx_mtp.config import TargetConfig
from mlx_mtp.convert import recipes
from mlx_mtp.models.target import Target

BFLOAT16 = mx.bfloat16.size
COMMON = {
    "head_dim": 256, "global_head_dim": 512, "vocab_size": 262_144, "rms_norm_eps": 1e-6,
    "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False, "enable_moe_block": False, "sliding_window": 1024,
}


def model(
    kind: str, hidden: int, layers: int, pattern: int, mlp: int, heads: tuple[int, int, int], **more: Any
) -> TargetConfig:
    """heads: query heads, kv heads, kv heads of full layers."""
    kinds = ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(layers)]
    text = COMMON | {
        "model_type": f"{kind}_text", "hidden_size": hidden, "num_hidden_layers": layers, "layer_types": kinds,
        "intermediate_size": mlp, "num_attention_heads": heads[0], "num_key_value_heads": heads[1],
        "num_global_key_value_heads": heads[2], **more,
    }
    return TargetConfig.from_json({"model_type": kind, "text_config": text})


FAMILY = {
    "E2B": lambda: model("gemma4", 1536, 35, 5, 6144, (8, 1, 1), num_kv_shared_layers=20, use_double_wide_mlp=True,
                         hidden_size_per_layer_input=256, sliding_window=512),
    "E4B": lambda: model("gemma4", 2560, 42, 6, 10_240, (8, 2, 2), num_kv_shared_layers=18,
                         hidden_size_per_layer_input=256, sliding_window=512),
    "12B": lambda: model("gemma4_unified", 3840, 48, 6, 15_360, (16, 8, 1), attention_k_eq_v=True),
    "26B-A4B": lambda: model("gemma4", 2816, 30, 6, 2112, (16, 8, 2), attention_k_eq_v=True, enable_moe_block=True,
                             num_experts=128, top_k_experts=8, moe_intermediate_size=704),
    "31B": lambda: model("gemma4", 5376, 60, 6, 21_504, (32, 16, 4), attention_k_eq_v=True),
}


def gigabytes(config: TargetConfig, recipe: recipes.Recipe | None, bits: int = 4) -> float:
    """Size of the text part, as planned; recipe None: bfloat16."""
    target = Target(config)
    rules = () if recipe is None else recipes.RULES[recipe][recipes.family(config)]
    total = sum(array.size for _, array in tree_flatten(target.parameters())) * BFLOAT16
    for path, module in target.named_modules():
        if recipe is None or not isinstance(module, QUANTIZABLE):
            continue
        chosen = recipes.choose(path, module.weight.shape[-1], recipes.asked(bits, None, "affine"), rules).quantization
        if chosen is not None:
            per_weight = chosen.bits / 8 + 2 * BFLOAT16 / chosen.group_size
            total += round(module.weight.size * (per_weight - BFLOAT16))
    return total / 1e9


def main() -> None:
    print("| | bfloat16 | -q, recommended | -q --recipe uniform | -q --q-bits 8 |\n|---|---|---|---|---|")
    for name, make in FAMILY.items():
        config = make()
        sizes = [gigabytes(config, None), gigabytes(config, "recommended"), gigabytes(config, "uniform"),
                 gigabytes(config, "uniform", 8)]
        print(f"| {name} | " + " | ".join(f"{size:.2f}" for size in sizes) + " |")


if __name__ == "__main__":
    main()

"""The four models' shapes: two targets in the form of Gemma 4's families, and a drafter for each."""

from dataclasses import dataclass
from typing import Any

from transformers import Gemma4AssistantConfig, Gemma4TextConfig

from .tokenizer import BOS_ID, PAD_ID, STOP_IDS, VOCABULARY_SIZE

SLIDING_WINDOW = 64
MAX_POSITIONS = 4096

_SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY_SIZE,
    "num_attention_heads": 4,
    "head_dim": 32,
    "global_head_dim": 64,
    "sliding_window": SLIDING_WINDOW,
    "max_position_embeddings": MAX_POSITIONS,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": STOP_IDS,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
}


def _layer_types(pattern: str) -> list[str]:
    return [{"s": "sliding_attention", "f": "full_attention"}[letter] for letter in pattern]


@dataclass(frozen=True)
class Family:
    """One pair: keyword arguments of the target's text config, of the drafter's, and of the drafter's wrapper."""

    name: str
    target: dict[str, Any]
    drafter: dict[str, Any]
    assistant: dict[str, Any]

    def target_config(self) -> Gemma4TextConfig:
        return Gemma4TextConfig(**self.target)

    def drafter_config(self) -> Gemma4AssistantConfig:
        text_config = Gemma4TextConfig(**self.drafter)
        return Gemma4AssistantConfig(
            text_config=text_config, backbone_hidden_size=self.target["hidden_size"], **self.assistant
        )


_DRAFTER: dict[str, Any] = {
    **_SHARED,
    "hidden_size": 128,
    "intermediate_size": 384,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
}

# As E2B and E4B: per-layer embeddings, the upper half reads the lower half's keys and values, twice as wide there.
EDGE = Family(
    name="edge",
    target={
        **_SHARED,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "layer_types": _layer_types("sssfsssf"),
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 4,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCABULARY_SIZE,
        "final_logit_softcapping": 30.0,
    },
    drafter={
        **_DRAFTER,
        "num_hidden_layers": 2,
        "num_kv_shared_layers": 2,
        "layer_types": _layer_types("sf"),
        "num_key_value_heads": 1,
    },
    assistant={"use_ordered_embeddings": True, "num_centroids": 64, "centroid_intermediate_top_k": 8},
)

# As 26B-A4B: experts beside a dense MLP, one projection for K and V on full layers, no per-layer embeddings.
MIXTURE = Family(
    name="mixture",
    target={
        **_SHARED,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 6,
        "layer_types": _layer_types("ssfssf"),
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCABULARY_SIZE,
        "final_logit_softcapping": 30.0,
        "enable_moe_block": True,
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
    },
    drafter={
        **_DRAFTER,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 4,
        "layer_types": _layer_types("sssf"),
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
    },
    assistant={"use_ordered_embeddings": False},
)

FAMILIES = {family.name: family for family in (EDGE, MIXTURE)}

"""The config.json that is written: the source's, with what other readers get wrong stated outright.

mlx-lm and mlx-vlm fill absent keys with E2B's values, know the Hub's spelling only, and take `vocab_size` from the top
level. So every question that our own config answers is answered in that spelling; keys that we do not know stay.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mlx_mtp.checkpoint.weights import Part
from mlx_mtp.config import (
    FULL,
    SLIDING,
    TEXT_MODEL_TYPES,
    DrafterConfig,
    QuantizationConfig,
    RotaryConfig,
    TargetConfig,
    TextConfig,
)

WRAPPED = {"gemma4_text": "gemma4", "gemma4_unified_text": "gemma4_unified"}
TOWER_CONFIGS = ("vision_config", "audio_config")
AT_THE_TOP = ("eos_token_id", "bos_token_id", "pad_token_id", "dtype", "torch_dtype", "tie_word_embeddings")
ALIGNED = 64  # mlx-vlm skips a quantized matrix of another size unless it is listed


def written_config(
    raw: Mapping[str, Any], config: TargetConfig | DrafterConfig, dtype: str | None, keep_towers: bool
) -> dict[str, Any]:
    """The source's config.json `raw` as it is written, without quantization; `config` is what we understood of it."""
    written = copy.deepcopy(dict(raw))
    if config.model_type in WRAPPED:  # a text model alone: our tensor names are those of the whole
        text = written
        written = {key: text[key] for key in AT_THE_TOP if key in text}
        written |= {"model_type": WRAPPED[config.model_type], "text_config": text}
    elif "text_config" not in written:
        written["text_config"] = {}
    part: Part = "drafter" if isinstance(config, DrafterConfig) else "target"
    spelled = {**written["text_config"]}
    spelled |= _spelled_out(spelled, config.text, TEXT_MODEL_TYPES[config.model_type], part)
    if _per_kind(config.text):
        spelled.pop("per_layer_config", None)
    written["text_config"] = spelled
    written["vocab_size"] = config.text.vocab_size
    for section in (written, spelled):
        for key in ("quantization", "quantization_config", "_name_or_path"):
            section.pop(key, None)
        if dtype is not None:
            section.pop("torch_dtype", None)
            section["dtype"] = dtype
    for key in TOWER_CONFIGS:
        if not keep_towers or written.get(key) is None:
            written.pop(key, None)
    parser = DrafterConfig.from_json if part == "drafter" else TargetConfig.from_json
    assert parser(written).text == config.text, "the written config.json describes another model"
    return dict(sorted(written.items()))


def _per_kind(text: TextConfig) -> bool:
    """Whether layers of one kind have one shape: what the Hub's spelling can say."""
    shapes = {(layer.kind, layer.head_dim, layer.num_kv_heads) for layer in text.layers}
    kv_heads = {kind: heads for kind, _, heads in shapes}
    k_equals_v = any(layer.k_equals_v for layer in text.layers)
    return len(shapes) == len(kv_heads) and (k_equals_v or len(set(kv_heads.values())) == 1)


def _spelled_out(raw: Mapping[str, Any], text: TextConfig, model_type: str, part: Part) -> dict[str, Any]:
    """Every answer of `text` in the Hub's spelling; `raw` is the source's text_config."""
    of_kind = {layer.kind: layer for layer in text.layers}
    full = of_kind[FULL]
    sliding = of_kind.get(SLIDING, full)
    shared = sum(layer.kv_source != i for i, layer in enumerate(text.layers))
    k_equals_v = any(layer.k_equals_v for layer in text.layers)
    given = raw.get("rope_parameters") or {}
    spelled: dict[str, Any] = {
        "model_type": model_type,
        "vocab_size": text.vocab_size,
        "hidden_size": text.hidden_size,
        "num_hidden_layers": len(text.layers),
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": sliding.num_kv_heads,
        "num_global_key_value_heads": full.num_kv_heads if k_equals_v else None,
        "head_dim": sliding.head_dim,
        "global_head_dim": full.head_dim,
        "layer_types": [layer.kind for layer in text.layers],
        "sliding_window": text.window,
        "max_position_embeddings": text.max_context,
        "rms_norm_eps": text.rms_norm_eps,
        "final_logit_softcapping": text.softcap,
        "attention_k_eq_v": k_equals_v,
        "num_kv_shared_layers": len(text.layers) if part == "drafter" else shared,
        "use_double_wide_mlp": raw.get("use_double_wide_mlp", False),
        "hidden_size_per_layer_input": text.per_layer_input.width if text.per_layer_input else 0,
        "enable_moe_block": text.experts is not None,
        "tie_word_embeddings": True,
        "rope_parameters": {kind: {**_rope(rotary), **given.get(kind, {})} for kind, rotary in text.rotary.items()},
    }
    if text.per_layer_input is not None:
        spelled["vocab_size_per_layer_input"] = text.per_layer_input.vocab_size
    if text.experts is not None:
        spelled |= {"num_experts": text.experts.num_experts, "top_k_experts": text.experts.top_k,
                    "moe_intermediate_size": text.experts.intermediate_size}
    return spelled


def _rope(rotary: RotaryConfig) -> dict[str, Any]:
    is_plain = rotary.rotated_dims == rotary.head_dim and rotary.factor == 1
    settings = {"rope_type": "default" if is_plain else "proportional", "rope_theta": rotary.theta,
                "partial_rotary_factor": rotary.rotated_dims / rotary.head_dim}
    return settings if rotary.factor == 1 else {**settings, "factor": rotary.factor}


def written_quantization(
    modules: Sequence[tuple[str, QuantizationConfig, int]], top: QuantizationConfig | None
) -> dict[str, Any]:
    """config.json's `quantization` of modules (written name, settings, numbers in the weight).

    `top` is what the others share; None takes the commonest. Nothing is written if no module is quantized.
    """
    if not modules:
        return {}
    top = top or Counter(settings for _, settings, _ in modules).most_common(1)[0][0]
    quantization: dict[str, Any] = _as_json(top)
    quantization |= {name: _as_json(settings) for name, settings, size in modules
                     if settings != top or size % ALIGNED}
    return {"quantization": quantization, "quantization_config": quantization}


def _as_json(settings: QuantizationConfig) -> dict[str, Any]:
    return {"group_size": settings.group_size, "bits": settings.bits, "mode": settings.mode}

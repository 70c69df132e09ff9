"""What a checkpoint's config.json says, and what a user may ask for: frozen dataclasses, parsed strictly.

Only this module knows how Gemma 4 configs are spelled. The rest of the package sees `LayerConfig`s in which every
per-layer question (window or full, head size, kv heads, whose K/V, MLP width) is already answered.
Defaults of absent keys follow transformers 5.22's config class of the same `model_type`, except for the sizes that
belong to no published model: those must be present.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mlx_mtp.errors import ConfigError, RequestError

AttentionKind = Literal["sliding_attention", "full_attention"]
SLIDING: AttentionKind = "sliding_attention"
FULL: AttentionKind = "full_attention"
ATTENTION_KINDS: tuple[AttentionKind, AttentionKind] = (SLIDING, FULL)

TEXT_MODEL_TYPES = {
    "gemma4": "gemma4_text",
    "gemma4_text": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "gemma4_unified_text": "gemma4_unified_text",
    "gemma4_assistant": "gemma4_text",
    "gemma4_unified_assistant": "gemma4_unified_text",
}
TARGET_MODEL_TYPES = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
DRAFTER_MODEL_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")

Json = Mapping[str, Any]


@dataclass(frozen=True)
class RotaryConfig:
    """Rotary embedding of one attention kind.

    `rotated_dims` of the `head_dim` dimensions turn; the exponents are always taken over `head_dim`
    ("proportional" in transformers: the unrotated dimensions have frequency zero).
    """

    head_dim: int
    theta: float
    rotated_dims: int
    factor: float = 1.0


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer, with every per-layer question answered.

    `kv_source` is the index of the layer whose K/V this layer attends to: its own, or its donor's when K/V are shared.
    """

    kind: AttentionKind
    head_dim: int
    num_kv_heads: int
    k_equals_v: bool
    kv_source: int
    intermediate_size: int


@dataclass(frozen=True)
class ExpertsConfig:
    num_experts: int
    top_k: int
    intermediate_size: int


@dataclass(frozen=True)
class PerLayerInputConfig:
    """Per-layer embeddings (PLE): a second embedding table that feeds `width` numbers into every layer."""

    vocab_size: int
    width: int


@dataclass(frozen=True)
class TextConfig:
    """The decoder trunk that target and drafter have in common."""

    vocab_size: int
    hidden_size: int
    num_heads: int
    rms_norm_eps: float
    window: int
    max_context: int
    layers: tuple[LayerConfig, ...]
    rotary: Mapping[AttentionKind, RotaryConfig]
    softcap: float | None
    experts: ExpertsConfig | None
    per_layer_input: PerLayerInputConfig | None

    @property
    def donors(self) -> dict[AttentionKind, int]:
        """The last layer of each kind that owns its K/V: what KV-shared layers and the drafter read."""
        return {layer.kind: i for i, layer in enumerate(self.layers) if layer.kv_source == i}


@dataclass(frozen=True)
class TargetConfig:
    model_type: str
    text: TextConfig

    @classmethod
    def from_json(cls, raw: Json) -> TargetConfig:
        """Reads a target's config.json. Raises ConfigError naming the key that is missing or unsupported."""
        model_type = raw.get("model_type")
        if model_type not in TARGET_MODEL_TYPES:
            hint = " (this is a drafter: pass it as draft model)" if model_type in DRAFTER_MODEL_TYPES else ""
            raise ConfigError(f"model_type {model_type!r} is not supported as a target{hint}; "
                              f"expected one of {', '.join(TARGET_MODEL_TYPES)}")
        return cls(model_type, _text_config(_text_section(raw), TEXT_MODEL_TYPES[model_type]))


@dataclass(frozen=True)
class CentroidConfig:
    """Head of the edge drafters: the best `top_k` of `num_centroids` equal clusters are scored exactly."""

    num_centroids: int
    top_k: int


@dataclass(frozen=True)
class DrafterConfig:
    model_type: str
    text: TextConfig
    backbone_hidden_size: int
    centroids: CentroidConfig | None

    @classmethod
    def from_json(cls, raw: Json) -> DrafterConfig:
        """Reads an assistant's config.json. Raises ConfigError naming the key that is missing or unsupported."""
        model_type = raw.get("model_type")
        if model_type not in DRAFTER_MODEL_TYPES:
            raise ConfigError(f"model_type {model_type!r} is not an MTP drafter; "
                              f"expected one of {', '.join(DRAFTER_MODEL_TYPES)}")
        section = dict(_text_section(raw))
        section.setdefault("hidden_size_per_layer_input", 0)
        section["num_kv_shared_layers"] = 0  # all of its layers read the target's K/V: there is nothing to share
        text = _text_config(section, TEXT_MODEL_TYPES[model_type])
        if text.per_layer_input or text.experts:
            raise ConfigError("a drafter with per-layer embeddings or experts is not supported; "
                              "expected hidden_size_per_layer_input 0 and enable_moe_block false")
        centroids = None
        if raw.get("use_ordered_embeddings", False):
            centroids = CentroidConfig(raw.get("num_centroids", 2048), raw.get("centroid_intermediate_top_k", 32))
            if text.vocab_size % centroids.num_centroids or not 0 < centroids.top_k <= centroids.num_centroids:
                raise ConfigError(f"num_centroids {centroids.num_centroids} must divide vocab_size {text.vocab_size} "
                                  f"and be at least centroid_intermediate_top_k {centroids.top_k}")
        return cls(model_type, text, _require(raw, "backbone_hidden_size", int), centroids)


@dataclass(frozen=True)
class QuantizationConfig:
    """One module's quantization, in the words of mlx's `quantize`."""

    group_size: int
    bits: int
    mode: str = "affine"


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. A default exists here and nowhere else.

    temperature: 0 is greedy; otherwise logits are divided by it before the filters.
    top_k: keep the k best tokens; 0 keeps all. top_p: keep the smallest set with that much probability (after top_k).
    min_p: drop tokens below that share of the best one's probability.
    seed: the text is a function of prompt, settings and seed; 0 <= seed < 2**32.
    stop: strings that end the text; they are not part of it.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        _check("temperature", self.temperature, 0.0 <= self.temperature < float("inf"), "a number of at least 0")
        _check("top_k", self.top_k, self.top_k >= 0, "at least 0 (0 keeps all tokens)")
        _check("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0 and at most 1")
        _check("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "between 0 and 1")
        _check("seed", self.seed, 0 <= self.seed < 2**32, "between 0 and 4294967295")
        _check("stop", self.stop, all(self.stop), "non-empty strings")


@dataclass(frozen=True)
class EngineConfig:
    """How requests are run, none of which changes their text.

    num_draft_tokens: drafts per round (K); 0 is plain decoding.
    max_draft_tokens: the largest K the cache leaves room for.
    prefill_chunk: prompt tokens per target pass.
    """

    num_draft_tokens: int = 3
    max_draft_tokens: int = 7
    prefill_chunk: int = 512

    def __post_init__(self) -> None:
        _check("max_draft_tokens", self.max_draft_tokens, self.max_draft_tokens >= 0, "at least 0")
        _check("num_draft_tokens", self.num_draft_tokens, 0 <= self.num_draft_tokens <= self.max_draft_tokens,
               f"between 0 and {self.max_draft_tokens}")
        _check("prefill_chunk", self.prefill_chunk, self.prefill_chunk >= 1, "at least 1")


def _check(name: str, got: object, fine: bool, expected: str) -> None:
    if not fine:
        raise RequestError(f"{name} is {got!r}; expected {expected}")


def _require(raw: Json, key: str, kind: type) -> Any:
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, kind):
        raise ConfigError(f"config key {key!r} is {value!r}; expected {kind.__name__}")
    if isinstance(value, int) and value <= 0:
        raise ConfigError(f"config key {key!r} is {value}; expected a positive number")
    return value


def _text_section(raw: Json) -> Json:
    section = raw.get("text_config", raw)
    if not isinstance(section, Mapping):
        raise ConfigError(f"config key 'text_config' is {type(section).__name__}; expected an object")
    return section


def _text_config(raw: Json, model_type: str) -> TextConfig:
    unified = model_type == "gemma4_unified_text"
    found = raw.get("model_type", model_type)
    if found != model_type:
        raise ConfigError(f"text_config.model_type is {found!r}; expected {model_type!r}")
    _reject_unsupported(raw)
    for key in SIZES:
        _require(raw, key, int)
    kinds = _layer_kinds(raw)
    layers = _layers(raw, kinds)
    per_layer_width = 0 if unified else raw.get("hidden_size_per_layer_input", 256)
    per_layer_vocab = raw.get("vocab_size_per_layer_input", 262_144)
    vocab_size = raw.get("vocab_size", 262_144)
    return TextConfig(
        vocab_size=vocab_size,
        hidden_size=raw["hidden_size"],
        num_heads=raw["num_attention_heads"],
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        window=raw.get("sliding_window", 1024 if unified else 512),
        max_context=raw.get("max_position_embeddings", 262_144 if unified else 131_072),
        layers=layers,
        rotary=_rotary(raw, {layer.kind: layer.head_dim for layer in layers}),
        softcap=raw.get("final_logit_softcapping"),
        experts=_experts(raw),
        per_layer_input=PerLayerInputConfig(per_layer_vocab, per_layer_width) if per_layer_width else None,
    )


def _reject_unsupported(raw: Json) -> None:
    supported: dict[str, tuple[object, ...]] = {
        "attention_bias": (False, None),
        "tie_word_embeddings": (True, None),
        "hidden_activation": ("gelu_pytorch_tanh", None),
        "use_bidirectional_attention": ("vision", None),  # "vision" concerns image spans only; text stays causal
    }
    for key, values in supported.items():
        if raw.get(key) not in values:
            raise ConfigError(f"config key {key!r} is {raw[key]!r}, which is not supported; expected {values[0]!r}")


def _layer_kinds(raw: Json) -> tuple[AttentionKind, ...]:
    count = raw["num_hidden_layers"]
    kinds = raw.get("layer_types")
    if kinds is None:
        kinds = [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(count - 1)] + [FULL]
    if len(kinds) != count:
        raise ConfigError(f"layer_types has {len(kinds)} entries; expected num_hidden_layers = {count}")
    for kind in kinds:
        if kind not in ATTENTION_KINDS:
            raise ConfigError(f"layer_types contains {kind!r}; expected {SLIDING!r} or {FULL!r}")
    if kinds[-1] != FULL:
        raise ConfigError(f"the last of layer_types is {kinds[-1]!r}; expected {FULL!r}")
    return tuple(kinds)


def _layers(raw: Json, kinds: Sequence[AttentionKind]) -> tuple[LayerConfig, ...]:
    first_shared = len(kinds) - raw.get("num_kv_shared_layers", 0)
    if not 0 <= first_shared <= len(kinds):
        raise ConfigError(f"num_kv_shared_layers is {raw['num_kv_shared_layers']}; expected at most {len(kinds)}")
    donors = {kind: i for i, kind in enumerate(kinds[:first_shared])}
    layers = []
    for i, kind in enumerate(kinds):
        if i >= first_shared and kind not in donors:
            raise ConfigError(f"layer {i} shares K/V, but no layer before {first_shared} is a {kind} layer")
        head_dim, num_kv_heads = _head_shape(raw, i, kind)
        if raw["num_attention_heads"] % num_kv_heads:
            raise ConfigError(f"num_attention_heads {raw['num_attention_heads']} is not a multiple of "
                              f"the {num_kv_heads} kv heads of layer {i}")
        double = raw.get("use_double_wide_mlp", False) and i >= first_shared
        layers.append(LayerConfig(
            kind=kind,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            k_equals_v=kind == FULL and raw.get("attention_k_eq_v", False),
            kv_source=i if i < first_shared else donors[kind],
            intermediate_size=raw["intermediate_size"] * (2 if double else 1),
        ))
    return tuple(layers)


def _head_shape(raw: Json, index: int, kind: AttentionKind) -> tuple[int, int]:
    """(head_dim, kv heads) of one layer, from either spelling.

    Hub files say `global_head_dim` and `num_global_key_value_heads` (the latter counts only where K = V);
    newer transformers writes `per_layer_config` with zero-padded layer numbers, holding only what differs.
    """
    head_dim, num_kv_heads = raw.get("head_dim", 256), raw["num_key_value_heads"]
    per_layer = raw.get("per_layer_config")
    if per_layer is not None:
        override = {int(key): value for key, value in per_layer.items()}.get(index, {})
        unknown = sorted(set(override) - {"head_dim", "num_key_value_heads"})
        if unknown:
            raise ConfigError(f"per_layer_config of layer {index} sets {unknown[0]!r}, which is not supported; "
                              "expected head_dim or num_key_value_heads")
        return override.get("head_dim", head_dim), override.get("num_key_value_heads", num_kv_heads)
    if kind == SLIDING:
        return head_dim, num_kv_heads
    full_kv_heads = raw.get("num_global_key_value_heads") if raw.get("attention_k_eq_v", False) else None
    return raw.get("global_head_dim") or 512, full_kv_heads or num_kv_heads


def _rotary(raw: Json, head_dims: Mapping[AttentionKind, int]) -> dict[AttentionKind, RotaryConfig]:
    defaults: dict[AttentionKind, Json] = {
        SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    }
    given = raw.get("rope_parameters") or defaults
    rotary = {}
    for kind, head_dim in head_dims.items():
        parameters = given.get(kind) or defaults[kind]
        rope_type = parameters.get("rope_type", "default")
        if rope_type not in ("default", "proportional"):
            raise ConfigError(f"rope_type {rope_type!r} of {kind} is not supported; expected default or proportional")
        partial = parameters.get("partial_rotary_factor", 1.0) if rope_type == "proportional" else 1.0
        rotary[kind] = RotaryConfig(
            head_dim=head_dim,
            theta=float(parameters.get("rope_theta", 10_000.0)),
            rotated_dims=2 * int(partial * head_dim // 2),
            factor=float(parameters.get("factor", 1.0)),
        )
    return rotary


def _experts(raw: Json) -> ExpertsConfig | None:
    if not raw.get("enable_moe_block", False):
        return None
    num_experts, top_k = _require(raw, "num_experts", int), _require(raw, "top_k_experts", int)
    if top_k > num_experts:
        raise ConfigError(f"top_k_experts is {top_k}; expected at most num_experts = {num_experts}")
    return ExpertsConfig(num_experts, top_k, _require(raw, "moe_intermediate_size", int))

"""What a checkpoint's config.json says, and what a user may ask for: frozen dataclasses, parsed strictly.

Only this module knows how Gemma 4 configs are spelled. The rest of the package sees `LayerConfig`s in which every
per-layer question (window or full, head size, kv heads, whose K/V, MLP width) is already answered.
Defaults of absent keys follow transformers 5.22's config class of the same `model_type`, except for the sizes that
belong to no published model: those must be present.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from mlx_mtp.config_json import Section, shown
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
MOST_LAYERS = 1000
AUTO: Literal["auto"] = "auto"

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
            raise ConfigError(f"model_type {shown(model_type)} is not supported as a target{hint}; "
                              f"expected one of {', '.join(TARGET_MODEL_TYPES)}")
        return cls(model_type, _text_config(_text_section(Section(raw)), TEXT_MODEL_TYPES[model_type]))


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
            raise ConfigError(f"model_type {shown(model_type)} is not an MTP drafter; "
                              f"expected one of {', '.join(DRAFTER_MODEL_TYPES)}")
        root = Section(raw)
        section = _text_section(root)
        section.choice("hidden_size_per_layer_input", (0,), 0)
        section.choice("enable_moe_block", (False,), False)
        section.choice("use_double_wide_mlp", (False,), False)
        text = _text_config(section, TEXT_MODEL_TYPES[model_type], is_drafter=True)
        centroids = _centroids(root, text.vocab_size) if root.flag("use_ordered_embeddings") else None
        return cls(model_type, text, root.integer("backbone_hidden_size"), centroids)


@dataclass(frozen=True)
class QuantizationConfig:
    """One module's quantization, in the words of mlx's `quantize`."""

    group_size: int
    bits: int
    mode: str = "affine"


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. A default exists here and nowhere else.

    temperature: 0 is greedy; otherwise logits are divided by it before the filters, which come in this order, as in
    transformers.
    top_k: keep the k best tokens; 0 keeps all.
    top_p: keep the smallest set with that much of the probability that top_k keeps.
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
        _check(self, "max_tokens", int, lambda value: value >= 1, "a whole number of at least 1")
        _check(self, "temperature", float, lambda value: 0 <= value < math.inf, "a finite number of at least 0")
        _check(self, "top_k", int, lambda value: value >= 0, "a whole number of at least 0 (0 keeps all tokens)")
        _check(self, "top_p", float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")
        _check(self, "min_p", float, lambda value: 0 <= value <= 1, "a number between 0 and 1")
        _check(self, "seed", int, lambda value: 0 <= value < 2**32, "a whole number between 0 and 4294967295")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence | Set) or not all(isinstance(text, str) and text for text in stop):
            raise RequestError(f"stop is {self.stop!r}; expected non-empty strings")
        object.__setattr__(self, "stop", tuple(stop))


@dataclass(frozen=True)
class EngineConfig:
    """How requests are run, none of which changes their text.

    num_draft_tokens: drafts per round (K); 0 is plain decoding, "auto" takes what is measured to be fastest.
    max_draft_tokens: the largest K the cache leaves room for.
    prefill_chunk: prompt tokens per target pass.
    max_rows: requests decoded together. max_waiting: requests that may wait for a row; more are refused.
    planned_answer: tokens of an answer that memory is set aside for when a request is admitted; longer ones may come.
    prefix_tokens: tokens whose K/V are kept after their request, for others that begin alike; 0 keeps none.
    """

    num_draft_tokens: int | Literal["auto"] = AUTO
    max_draft_tokens: int = 7
    prefill_chunk: int = 512
    max_rows: int = 8
    max_waiting: int = 10_000
    planned_answer: int = 2048
    prefix_tokens: int = 8192

    def __post_init__(self) -> None:
        _check(self, "max_draft_tokens", int, lambda value: value >= 0, "a whole number of at least 0")
        if self.num_draft_tokens != AUTO:
            _check(self, "num_draft_tokens", int, lambda value: 0 <= value <= self.max_draft_tokens,
                   f"a whole number between 0 and {self.max_draft_tokens}, or {AUTO!r}")
        for name in ("prefill_chunk", "max_rows", "max_waiting", "planned_answer"):
            _check(self, name, int, lambda value: value >= 1, "a whole number of at least 1")
        _check(self, "prefix_tokens", int, lambda value: value >= 0, "a whole number of at least 0")

    @property
    def ring_slack(self) -> int:
        """Slots of a sliding layer's ring beyond its window: two blocks of drafts.

        One is what drafting needs. With the other, the window of a row that ended is still whole although the round
        that was in flight then has written on.
        """
        return 2 * (self.max_draft_tokens + 1)


def _check(
    settings: object, name: str, kind: type[int] | type[float], is_fine: Callable[[Any], bool], expected: str
) -> None:
    """Makes a setting an int or a float in place, NumPy's too. Raises RequestError for anything else."""
    got, value = getattr(settings, name), None
    is_number = isinstance(got, Integral if kind is int else Real) and not isinstance(got, bool)
    if is_number:
        with suppress(OverflowError):  # a whole number beyond every float
            value = kind(got)
    if value is None or not is_fine(value):
        raise RequestError(f"{name} is {got!r}; expected {expected}")
    object.__setattr__(settings, name, value)


def _text_section(root: Section) -> Section:
    return root.section("text_config") if "text_config" in root else root


def _text_config(text: Section, model_type: str, is_drafter: bool = False) -> TextConfig:
    unified = model_type == "gemma4_unified_text"
    text.choice("model_type", (model_type,), model_type)
    text.choice("attention_bias", (False,), False)
    text.choice("tie_word_embeddings", (True,), True)
    text.choice("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
    text.choice("use_bidirectional_attention", ("vision", None), None)  # of image spans only; text stays causal
    layers = _layers(text, is_drafter)
    per_layer_width = 0 if unified or is_drafter else text.integer("hidden_size_per_layer_input", 256, minimum=0)
    per_layer_input = None
    if per_layer_width:
        per_layer_input = PerLayerInputConfig(text.integer("vocab_size_per_layer_input", 262_144), per_layer_width)
    return TextConfig(
        vocab_size=text.integer("vocab_size", 262_144),
        hidden_size=text.integer("hidden_size"),
        num_heads=text.integer("num_attention_heads"),
        rms_norm_eps=text.number("rms_norm_eps", 1e-6),
        window=text.integer("sliding_window", 1024 if unified else 512),
        max_context=text.integer("max_position_embeddings", 262_144 if unified else 131_072),
        layers=layers,
        rotary=_rotary(text, {layer.kind: layer.head_dim for layer in layers}),
        softcap=text.number("final_logit_softcapping") if text.has("final_logit_softcapping") else None,
        experts=_experts(text) if text.flag("enable_moe_block") else None,
        per_layer_input=per_layer_input,
    )


def _layer_kinds(text: Section) -> tuple[AttentionKind, ...]:
    count = text.integer("num_hidden_layers", maximum=MOST_LAYERS)
    if not text.has("layer_types"):
        return (*(FULL if (i + 1) % 6 == 0 else SLIDING for i in range(count - 1)), FULL)
    kinds = tuple(text.items("layer_types"))
    if len(kinds) != count:
        raise text.error("layer_types", f"num_hidden_layers = {count}", f"has {len(kinds)} entries")
    for kind in kinds:
        if kind not in ATTENTION_KINDS:
            raise text.error("layer_types", f"{SLIDING!r} or {FULL!r}", f"contains {shown(kind)}")
    if kinds[-1] != FULL:
        raise text.error("layer_types", repr(FULL), f"ends with {shown(kinds[-1])}")
    return kinds


def _layers(text: Section, is_drafter: bool) -> tuple[LayerConfig, ...]:
    kinds = _layer_kinds(text)
    shapes = _head_shapes(text, kinds)
    num_shared = text.integer("num_kv_shared_layers", 0, minimum=0, maximum=len(kinds))
    first_shared = len(kinds) - (0 if is_drafter else num_shared)  # a drafter reads the target's K/V, not its own
    num_heads, mlp_width = text.integer("num_attention_heads"), text.integer("intermediate_size")
    is_double, k_equals_v = text.flag("use_double_wide_mlp"), text.flag("attention_k_eq_v")
    donors = {kind: i for i, kind in enumerate(kinds[:first_shared])}
    layers = []
    for i, (kind, (head_dim, num_kv_heads)) in enumerate(zip(kinds, shapes, strict=True)):
        if i >= first_shared and kind not in donors:
            raise text.error("num_kv_shared_layers", f"a {kind} layer before layer {first_shared}",
                             f"is {num_shared}: layer {i} shares K/V")
        source = i if i < first_shared else donors[kind]
        if num_kv_heads != shapes[source][1]:
            raise text.error("per_layer_config", f"the {shapes[source][1]} of layer {source}, whose K/V it shares",
                             f"gives layer {i} {num_kv_heads} kv heads")
        if head_dim != (other := shapes[kinds.index(kind)][0]):
            raise text.error("per_layer_config", "one size, for they share a rotary embedding",
                             f"gives {kind} layers the head sizes {other} and {head_dim}")
        if num_heads % num_kv_heads:
            raise text.error("num_attention_heads", f"a multiple of the {num_kv_heads} kv heads of layer {i}")
        layers.append(LayerConfig(
            kind=kind,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            k_equals_v=kind == FULL and k_equals_v,
            kv_source=source,
            intermediate_size=mlp_width * (2 if is_double and i >= first_shared else 1),
        ))
    return tuple(layers)


def _head_shapes(text: Section, kinds: Sequence[AttentionKind]) -> list[tuple[int, int]]:
    """(head_dim, kv heads) of every layer, from either spelling.

    Hub files say `global_head_dim` and `num_global_key_value_heads` (the latter counts only where K = V);
    newer transformers writes `per_layer_config` with zero-padded layer numbers, holding only what differs.
    """
    head_dim, num_kv_heads = _head_dim(text, "head_dim", 256), text.integer("num_key_value_heads")
    if text.has("per_layer_config"):
        shapes = [(head_dim, num_kv_heads)] * len(kinds)
        for i, layer in _overrides(text.section("per_layer_config"), len(kinds)):
            shapes[i] = _head_dim(layer, "head_dim", head_dim), layer.integer("num_key_value_heads", num_kv_heads)
        return shapes
    full_head_dim, full_kv_heads = _head_dim(text, "global_head_dim", 512), num_kv_heads
    if text.flag("attention_k_eq_v") and text.has("num_global_key_value_heads"):
        full_kv_heads = text.integer("num_global_key_value_heads")
    return [(full_head_dim, full_kv_heads) if kind == FULL else (head_dim, num_kv_heads) for kind in kinds]


def _head_dim(section: Section, key: str, default: int) -> int:
    head_dim = section.integer(key, default)
    if head_dim % 2:
        raise section.error(key, "an even number: a rotary embedding turns pairs")
    return head_dim


def _overrides(per_layer: Section, count: int) -> Iterator[tuple[int, Section]]:
    """Layer number and what `per_layer_config` says of that layer."""
    for key in per_layer:
        if not re.fullmatch(r"[0-9]{1,4}", key) or int(key) >= count:
            raise per_layer.error(key, f"a layer from 0 to {count - 1}", "is no layer")
        layer = per_layer.section(key)
        for name in layer:
            if name not in ("head_dim", "num_key_value_heads"):
                raise layer.error(name, "only head_dim and num_key_value_heads to differ", "is there")
        yield int(key), layer


def _rotary(text: Section, head_dims: Mapping[AttentionKind, int]) -> dict[AttentionKind, RotaryConfig]:
    given = text.section("rope_parameters") if text.has("rope_parameters") else Section({})
    for key in given:
        if key not in ATTENTION_KINDS:
            raise given.error(key, f"{SLIDING} and {FULL}, each with its own settings", "is there")
    defaults: dict[AttentionKind, Json] = {
        SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
    }
    rotary = {}
    for kind, head_dim in head_dims.items():
        parameters = given.section(kind) if kind in given else Section(defaults[kind])
        partial, factor = 1.0, 1.0
        if parameters.choice("rope_type", ("default", "proportional"), "default") == "proportional":
            partial = parameters.number("partial_rotary_factor", 1.0, maximum=1.0)
            factor = parameters.number("factor", 1.0)
        theta = parameters.number("rope_theta")
        rotary[kind] = RotaryConfig(head_dim, theta, rotated_dims=2 * int(partial * head_dim // 2), factor=factor)
    return rotary


def _experts(text: Section) -> ExpertsConfig:
    num_experts = text.integer("num_experts")
    return ExpertsConfig(num_experts, text.integer("top_k_experts", maximum=num_experts),
                         text.integer("moe_intermediate_size"))


def _centroids(root: Section, vocab_size: int) -> CentroidConfig:
    num_centroids = root.integer("num_centroids", 2048)
    if vocab_size % num_centroids:
        raise root.error("num_centroids", f"a divisor of vocab_size = {vocab_size}")
    return CentroidConfig(num_centroids, root.integer("centroid_intermediate_top_k", 32, maximum=num_centroids))

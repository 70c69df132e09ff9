"""What a pass of Gemma 4 moves and computes, from the published architectures and a recipe: no weight is needed.

A target pass over N tokens reads every weight once but for two kinds: of the per-layer embedding only the tokens' own
rows, which are left out here (some KB a token), and of the experts only those that tokens are routed to. How often an
expert is read is the difference between ways of dispatch:

    per route    once for every (token, expert) pair: MLX's gather below the limit of `sorted`
    sorted       once each as soon as there are 4 routes an expert: MLX's gather of sorted routes
    once         every distinct expert once: E * (1 - (1 - k/E)^N) are expected if routing is uniform
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal, get_args

import mlx.nn as nn
from mlx.utils import tree_flatten

from bench.recipe_sizes import BFLOAT16, COMMON, FAMILY
from mlx_mtp.checkpoint.loader import QUANTIZABLE, TOKEN_ORDERING
from mlx_mtp.config import FULL, SLIDING, DrafterConfig, LayerConfig, QuantizationConfig, TargetConfig, TextConfig
from mlx_mtp.convert import recipes
from mlx_mtp.convert.recipes import Rule
from mlx_mtp.errors import RequestError
from mlx_mtp.kv_cache import layer_shapes
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target

Dispatch = Literal["per route", "sorted", "once"]
DISPATCHES: tuple[Dispatch, ...] = get_args(Dispatch)
SORTED_FROM_ROUTES_PER_EXPERT = 4  # MLX's gather_qmm; 64 tokens for 128 experts, top 8

SIXTEEN_BITS = 16
BITS = (*recipes.AFFINE_BITS, SIXTEEN_BITS)

# Query heads of the drafters are not published as text; with these the totals are the published ones.
DRAFTER_SHAPES = {  # hidden size, MLP width, query heads, whether it has a centroid head
    "E2B": (256, 2048, 4, True), "E4B": (256, 2048, 4, True), "12B": (1024, 8192, 16, False),
    "26B-A4B": (1024, 8192, 16, False), "31B": (1024, 8192, 32, False),
}


@dataclass(frozen=True)
class Size:
    """Of a class of tensors."""

    weights: int = 0
    bytes: float = 0.0

    def __add__(self, other: Size) -> Size:
        return Size(self.weights + other.weights, self.bytes + other.bytes)

    def __mul__(self, share: float) -> Size:
        return Size(round(self.weights * share), self.bytes * share)


def bytes_per_weight(quantization: QuantizationConfig | None) -> float:
    """None: bfloat16. Affine groups carry a scale and a bias of 16 bits, the others a scale of 8."""
    if quantization is None:
        return float(BFLOAT16)
    of_group = 2 * BFLOAT16 if quantization.mode == "affine" else 1
    return quantization.bits / 8 + of_group / quantization.group_size


@dataclass(frozen=True)
class Module:
    """One module's own tensors. columns: of its matrix, where that can be quantized."""

    weights: int
    columns: int | None = None

    def size(self, quantization: QuantizationConfig | None) -> Size:
        return Size(self.weights, self.weights * bytes_per_weight(quantization))


def modules(model: nn.Module) -> dict[str, Module]:
    """Path -> module, for all that own tensors. A centroid head's `token_ordering` holds ids and is left out."""
    found: dict[str, Module] = {}
    for name, array in tree_flatten(model.parameters()):
        if name != TOKEN_ORDERING:
            path = name.rpartition(".")[0]
            found[path] = Module(found.get(path, Module(0)).weights + array.size)
    for path, module in model.named_modules():
        if isinstance(module, QUANTIZABLE):
            found[path] = Module(module.weight.size, module.weight.shape[-1])
    return found


def distinct_experts(num_experts: int, top_k: int, tokens: float) -> float:
    """How many experts of a layer `tokens` tokens are expected to touch, each choosing `top_k` at random."""
    return num_experts * (1 - (1 - top_k / num_experts) ** tokens)


def seen(text: TextConfig, layer: LayerConfig, context: int) -> int:
    """How many positions a layer looks back at."""
    return min(context, text.window) if layer.kind == SLIDING else context


def attention_flop(text: TextConfig, context: int) -> float:
    """Of one token: its queries' products with keys, and the weighted sums of values."""
    return float(sum(4 * text.num_heads * layer.head_dim * seen(text, layer, context) for layer in text.layers))


@dataclass(frozen=True)
class TargetModel:
    """A target at the sizes of the family's `name`; settings None: bfloat16."""

    name: str
    config: TargetConfig
    modules: Mapping[str, Module]
    settings: QuantizationConfig | None
    rules: tuple[Rule, ...] = ()

    @cached_property
    def sizes(self) -> dict[str, Size]:
        """By class of tensor (`recipes.CLASSES`)."""
        total: dict[str, Size] = {}
        for path, module in self.modules.items():
            chosen = None
            if self.settings is not None and module.columns is not None:
                chosen = recipes.choose(path, module.columns, self.settings, self.rules).quantization
            name = recipes.tensor_class(path, "target")
            total[name] = total.get(name, Size()) + module.size(chosen)
        return total

    @property
    def is_affine(self) -> bool:
        return self.settings is not None and self.settings.mode == "affine"

    @property
    def total(self) -> Size:
        return sum(self.sizes.values(), Size())

    @cached_property
    def dense(self) -> Size:
        """What every pass reads once: all but the experts and the per-layer embedding."""
        apart = (recipes.EXPERTS, recipes.PER_LAYER_EMBEDDING)
        return sum((size for name, size in self.sizes.items() if name not in apart), Size())

    @property
    def expert(self) -> Size:
        """One expert, its share of every layer."""
        experts = self.config.text.experts
        return Size() if experts is None else self.sizes[recipes.EXPERTS] * (1 / experts.num_experts)

    def experts_read(self, tokens: float, dispatch: Dispatch) -> float:
        """How many experts' weights each layer reads in a pass over so many tokens."""
        experts = self.config.text.experts
        if experts is None:
            return 0.0
        routes = tokens * experts.top_k
        is_once = dispatch == "once" or (
            dispatch == "sorted" and routes >= SORTED_FROM_ROUTES_PER_EXPERT * experts.num_experts
        )
        return distinct_experts(experts.num_experts, experts.top_k, tokens) if is_once else routes

    def expert_bytes(self, tokens: float, dispatch: Dispatch) -> float:
        return self.expert.bytes * self.experts_read(tokens, dispatch)

    def weight_bytes(self, tokens: float, dispatch: Dispatch) -> float:
        """Of one pass with its head."""
        return self.dense.bytes + self.expert_bytes(tokens, dispatch)

    def kv_bytes(self, context: int) -> float:
        """K/V in bfloat16 that a pass reads for one row; a KV-shared layer reads its donor's again."""
        text, shapes = self.config.text, layer_shapes(self.config.text)
        return float(sum(
            shapes[layer.kv_source].numbers_per_position * seen(text, layer, context) * BFLOAT16
            for layer in text.layers
        ))

    def flop(self, context: int) -> float:
        """Of one token: two a weight it meets, and the products with keys and values."""
        experts = self.config.text.experts
        routed = 0 if experts is None else experts.top_k * self.expert.weights
        return 2.0 * (self.dense.weights + routed) + attention_flop(self.config.text, context)


@dataclass(frozen=True)
class DrafterModel:
    """The drafter of `target`; settings None: bfloat16."""

    target: TargetModel
    config: DrafterConfig
    modules: Mapping[str, Module]
    settings: QuantizationConfig | None

    @cached_property
    def sizes(self) -> dict[str, Size]:
        """By path of module."""
        found, has_centroids = {}, self.config.centroids is not None
        for path, module in self.modules.items():
            chosen = None
            if self.settings is not None and module.columns is not None:
                chosen = recipes.choose_for_drafter(path, module.columns, self.settings, has_centroids).quantization
            found[path] = module.size(chosen)
        return found

    @property
    def total(self) -> Size:
        return sum(self.sizes.values(), Size())

    def step(self, rows: int) -> Size:
        """What a step of `rows` rows reads: a centroid head scores its clusters' tokens only, and rows choose apart."""
        centroids, embedding = self.config.centroids, self.sizes["embed_tokens"]
        rest = sum((size for path, size in self.sizes.items() if path != "embed_tokens"), Size())
        return rest + (embedding if centroids is None
                       else embedding * min(1.0, rows * centroids.top_k / centroids.num_centroids))

    def kv_bytes(self, context: int) -> float:
        """The donors' K/V that a step reads for one row."""
        text, shapes = self.target.config.text, layer_shapes(self.target.config.text)
        return float(sum(
            shapes[text.donors[layer.kind]].numbers_per_position * seen(text, layer, context) * BFLOAT16
            for layer in self.config.text.layers
        ))

    def flop(self, context: int) -> float:
        """Of one row's step."""
        return 2.0 * self.step(1).weights + attention_flop(self.config.text, context)


@cache
def _family_target(name: str) -> tuple[TargetConfig, Mapping[str, Module]]:
    config = FAMILY[name]()
    return config, modules(Target(config))


@cache
def _family_drafter(name: str) -> tuple[DrafterConfig, Mapping[str, Module]]:
    target, _ = _family_target(name)
    hidden, mlp, heads, has_centroids = DRAFTER_SHAPES[name]
    text, is_unified = target.text, target.model_type.startswith("gemma4_unified")
    donors = {kind: text.layers[layer] for kind, layer in text.donors.items()}
    config = DrafterConfig.from_json({
        "model_type": "gemma4_unified_assistant" if is_unified else "gemma4_assistant",
        "backbone_hidden_size": text.hidden_size, "use_ordered_embeddings": has_centroids,
        "text_config": COMMON | {
            "hidden_size": hidden, "num_hidden_layers": 4, "intermediate_size": mlp, "num_attention_heads": heads,
            "layer_types": [SLIDING, SLIDING, SLIDING, FULL], "sliding_window": text.window,
            "num_key_value_heads": donors[SLIDING].num_kv_heads, "attention_k_eq_v": True,
            "num_global_key_value_heads": donors[FULL].num_kv_heads,
        },
    })
    return config, modules(Drafter(config))


def family_target(name: str, bits: int, recipe: recipes.Recipe = "recommended") -> TargetModel:
    """Raises RequestError for a name that is not in the family, or bits that MLX does not have."""
    if name not in FAMILY:
        raise RequestError(f"model is {name!r}; expected one of {', '.join(FAMILY)}")
    config, shapes = _family_target(name)
    return TargetModel(name, config, shapes, _settings(bits), recipes.RULES[recipe][recipes.family(config)])


def family_drafter(target: TargetModel, bits: int) -> DrafterModel:
    """The published drafter of a target of the family. Raises RequestError for bits that MLX does not have."""
    config, shapes = _family_drafter(target.name)
    return DrafterModel(target, config, shapes, _settings(bits))


def _settings(bits: int) -> QuantizationConfig | None:
    if bits not in BITS:
        raise RequestError(f"bits is {bits}; expected one of {', '.join(map(str, BITS))}")
    return None if bits == SIXTEEN_BITS else recipes.asked(bits, None, "affine")

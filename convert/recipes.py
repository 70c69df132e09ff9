"""How many bits each module gets: a small table for each family, with the reasons.

A recipe starts from what was asked for (`--q-bits`, `--q-group-size`, `--q-mode`) and only ever raises it: the parts
that suffer most from few bits are small, so 8 bits for them cost little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlx_mtp.checkpoint.weights import Part
from mlx_mtp.config import QuantizationConfig, TargetConfig
from mlx_mtp.errors import RequestError

Family = Literal["edge", "mixture", "unified", "dense"]
Recipe = Literal["recommended", "uniform"]
RECIPES: tuple[Recipe, ...] = ("recommended", "uniform")

# mlx's modes, as mlx-lm fills them in: (group size, bits). Only affine has others.
MODES = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
AFFINE_GROUPS = (128, 64, 32)
DRAFT_BITS = 4

EMBEDDING, ATTENTION, MLP, EXPERTS, ROUTER = "embedding", "attention", "mlp", "experts", "router"
PER_LAYER_EMBEDDING, PROJECTIONS, CENTROIDS = "per-layer embedding", "projections", "centroids"
NORMS = "norms and scalars"
VISION_AND_AUDIO = "vision and audio"
CLASSES = (EMBEDDING, PER_LAYER_EMBEDDING, ATTENTION, MLP, EXPERTS, ROUTER, PROJECTIONS, CENTROIDS, NORMS,
           VISION_AND_AUDIO)


@dataclass(frozen=True)
class Rule:
    """Modules of one class get 8 bits where `up_to` bits or fewer were asked for."""

    module_class: str
    up_to: int
    reason: str


EIGHT_BITS = 8
PER_LAYER_TABLE = Rule(PER_LAYER_EMBEDDING, 7, "below 8 bits the per-layer embedding gives garbage")
SMALL_ROUTER = Rule(ROUTER, 7, "a wrong expert costs more than the router's few bytes")
RULES: dict[Recipe, dict[Family, tuple[Rule, ...]]] = {
    "recommended": {
        "edge": (
            PER_LAYER_TABLE,
            Rule(PROJECTIONS, 7, "small, and they carry the per-layer embedding into the layers"),
        ),
        # Perplexity of the 26B: 208 in bfloat16, 274 with 4 bits throughout, 220 with this, for 0.3 GB more.
        "mixture": (SMALL_ROUTER, Rule(MLP, 4, "the dense MLP sees every token: perplexity 220 instead of 274 (26B)")),
        "unified": (),  # 4 bits throughout were both better and faster than a mixture of widths
        "dense": (),
    },
    # Every module at the bits asked for, but for what would break the model.
    "uniform": {"edge": (PER_LAYER_TABLE,), "mixture": (SMALL_ROUTER,), "unified": (), "dense": ()},
}
E4B_HIDDEN_SIZE, E4B_LEAST_BITS = 2560, 5


@dataclass(frozen=True)
class Choice:
    """What becomes of one module: its quantization, or None to leave it, and why if it is not what was asked for."""

    quantization: QuantizationConfig | None
    reason: str | None = None


def tensor_class(path: str, part: Part) -> str:
    """The class of a tensor or module, by its path inside (`mlx_mtp.checkpoint.weights`): one of CLASSES."""
    words = path.split(".")
    for word, name in (
        ("embed_tokens", EMBEDDING), ("embed_tokens_per_layer", PER_LAYER_EMBEDDING), ("masked_embedding", CENTROIDS),
    ):
        if words[0] == word:
            return name
    is_norm = any(word.endswith(("norm", "norm_1", "norm_2")) or word in ("layer_scalar", "scale", "per_expert_scale")
                  for word in words)
    if is_norm:
        return NORMS
    for word, name in (("self_attn", ATTENTION), ("mlp", MLP), ("experts", EXPERTS), ("router", ROUTER)):
        if word in words:
            return name
    return PROJECTIONS


def family(config: TargetConfig) -> Family:
    """Which of the published kinds a target is of: E2B and E4B, 26B-A4B, 12B, or 31B."""
    if config.model_type.startswith("gemma4_unified"):
        return "unified"
    if config.text.experts is not None:
        return "mixture"
    return "dense" if config.text.per_layer_input is None else "edge"


def asked(bits: int | None, group_size: int | None, mode: str) -> QuantizationConfig:
    """What was asked for, with mlx-lm's defaults filled in. Raises RequestError for what mlx does not have."""
    if mode not in MODES:
        raise RequestError(f"q_mode is {mode!r}; expected one of {', '.join(MODES)}")
    own_group, own_bits = MODES[mode]
    bits, group_size = own_bits if bits is None else bits, own_group if group_size is None else group_size
    for name, got, choices in (
        ("q_bits", bits, AFFINE_BITS if mode == "affine" else (own_bits,)),
        ("q_group_size", group_size, AFFINE_GROUPS if mode == "affine" else (own_group,)),
    ):
        if got not in choices:
            raise RequestError(f"{name} is {got!r}; mode {mode} has {' or '.join(map(str, sorted(choices)))}")
    return QuantizationConfig(group_size, bits, mode)


def asked_of_drafter(bits: int | None, group_size: int | None, mode: str) -> QuantizationConfig:
    """A drafter's settings: `mode` if it has those bits, else affine. Raises RequestError as `asked` does."""
    if bits is not None and bits not in AFFINE_BITS:
        raise RequestError(f"draft_bits is {bits!r}; expected one of {', '.join(map(str, AFFINE_BITS))}")
    if mode in MODES and mode != "affine" and MODES[mode][1] == (DRAFT_BITS if bits is None else bits):
        return asked(None, None, mode)
    return asked(DRAFT_BITS if bits is None else bits, group_size if mode == "affine" else None, "affine")


def choose(path: str, width: int, settings: QuantizationConfig, rules: tuple[Rule, ...]) -> Choice:
    """The quantization of a target's module with `width` columns: the rules of its class, then a group that fits."""
    module_class = tensor_class(path, "target")
    for rule in rules:
        if rule.module_class == module_class and settings.bits <= rule.up_to:
            group_size = settings.group_size if settings.mode == "affine" else MODES["affine"][0]
            return fitting(width, QuantizationConfig(group_size, EIGHT_BITS), rule.reason)
    return fitting(width, settings)


def choose_for_drafter(path: str, width: int, settings: QuantizationConfig, has_centroids: bool) -> Choice:
    """The same for a drafter's module.

    A centroid head scores few rows of the embedding, picked one by one: fewer bits would save next to no time there,
    and mlx-vlm can only pick from plain numbers.
    """
    module_class = tensor_class(path, "drafter")
    if module_class == CENTROIDS or (has_centroids and module_class == EMBEDDING):
        return Choice(None, "part of the centroid head, which picks single rows")
    return fitting(width, settings)


def fitting(width: int, settings: QuantizationConfig, reason: str | None = None) -> Choice:
    """`settings` with the largest group size that divides `width` and is not above the one asked for."""
    groups = AFFINE_GROUPS if settings.mode == "affine" else (settings.group_size,)
    for group_size in groups:
        if group_size <= settings.group_size and width % group_size == 0:
            if group_size != settings.group_size:
                reason = f"groups of {settings.group_size} do not divide its {width} columns"
            return Choice(QuantizationConfig(group_size, settings.bits, settings.mode), reason)
    return Choice(None, f"no group size divides its {width} columns")


def warnings(config: TargetConfig, settings: QuantizationConfig) -> list[str]:
    """What the user should know before a target of this kind is quantized so."""
    is_e4b = family(config) == "edge" and config.text.hidden_size == E4B_HIDDEN_SIZE
    if is_e4b and settings.bits < E4B_LEAST_BITS:
        return [f"E4B is fragile below {E4B_LEAST_BITS} bits: consider --q-bits {E4B_LEAST_BITS} or more"]
    return []

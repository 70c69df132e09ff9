"""Configs of the whole family parse to the right answer for every layer, in both spellings, and nothing is guessed."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from mlx_mtp.config import (
    FULL,
    SLIDING,
    CentroidConfig,
    DrafterConfig,
    EngineConfig,
    ExpertsConfig,
    PerLayerInputConfig,
    SamplingParams,
    TargetConfig,
)
from mlx_mtp.errors import ConfigError, RequestError

Json = dict[str, Any]
NAN, INFINITY = float("nan"), float("inf")
ROPE = {
    FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0, "rope_type": "proportional"},
    SLIDING: {"rope_theta": 10_000.0, "rope_type": "default"},
}


@dataclass(frozen=True)
class Member:
    """One published model, as its card says it. period: every so many layers one is full."""

    name: str
    hidden: int
    layers: int
    period: int
    mlp: int
    heads: tuple[int, int, int]  # query heads, kv heads, kv heads of full layers
    window: int
    shared: int
    ple: int
    k_equals_v: bool
    donors: tuple[int, int]
    experts: bool = False

    @property
    def is_unified(self) -> bool:
        return self.name == "12B"

    def text(self) -> Json:
        kinds = [FULL if (i + 1) % self.period == 0 else SLIDING for i in range(self.layers)]
        experts = {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704} if self.experts else {}
        return {
            "model_type": "gemma4_unified_text" if self.is_unified else "gemma4_text",
            "hidden_size": self.hidden, "num_hidden_layers": self.layers, "layer_types": kinds,
            "intermediate_size": self.mlp, "use_double_wide_mlp": self.name == "E2B",
            "num_attention_heads": self.heads[0], "num_key_value_heads": self.heads[1],
            "num_global_key_value_heads": self.heads[2] if self.k_equals_v else None,
            "head_dim": 256, "global_head_dim": 512, "sliding_window": self.window,
            "num_kv_shared_layers": self.shared, "attention_k_eq_v": self.k_equals_v,
            "hidden_size_per_layer_input": self.ple, "vocab_size_per_layer_input": 262_144, "vocab_size": 262_144,
            "final_logit_softcapping": 30.0, "rms_norm_eps": 1e-6, "rope_parameters": ROPE,
            "use_bidirectional_attention": None if self.ple else "vision", "attention_bias": False,
            "enable_moe_block": self.experts, **experts,
        }

    def config(self) -> Json:
        outer = "gemma4_unified" if self.is_unified else "gemma4"
        return {"model_type": outer, "text_config": self.text(), "vision_config": {"hidden_size": 768}}


FAMILY = (
    Member("E2B", 1536, 35, 5, 6144, (8, 1, 1), 512, 20, 256, False, (13, 14)),
    Member("E4B", 2560, 42, 6, 10240, (8, 2, 2), 512, 18, 256, False, (22, 23)),
    Member("12B", 3840, 48, 6, 15360, (16, 8, 1), 1024, 0, 0, True, (46, 47)),
    Member("26B-A4B", 2816, 30, 6, 2112, (16, 8, 2), 1024, 0, 0, True, (28, 29), experts=True),
    Member("31B", 5376, 60, 6, 21504, (32, 16, 4), 1024, 0, 0, True, (58, 59)),
)
BY_NAME = {member.name: member for member in FAMILY}
each_member = pytest.mark.parametrize("member", FAMILY, ids=list(BY_NAME))


def small(**changes: Any) -> Json:
    """The text part of a six-layer model without anything optional; a change to `...` removes the key."""
    text: Json = {"model_type": "gemma4_text", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6,
                  "num_attention_heads": 4, "num_key_value_heads": 2} | changes
    return {key: value for key, value in text.items() if value is not ...}


def drafter(text: Json | None = None, **changes: Any) -> Json:
    kinds = [SLIDING, SLIDING, SLIDING, FULL]
    return {"model_type": "gemma4_assistant", "backbone_hidden_size": 64,
            "text_config": small(num_hidden_layers=4, layer_types=kinds, **(text or {}))} | changes


@each_member
def test_every_layer_of_a_published_model_gets_its_own_answers(member: Member) -> None:
    text = TargetConfig.from_json(member.config()).text
    _, kv_heads, full_kv_heads = member.heads
    first_shared = member.layers - member.shared
    assert len(text.layers) == member.layers
    for i, layer in enumerate(text.layers):
        is_full = (i + 1) % member.period == 0
        assert layer.kind == (FULL if is_full else SLIDING)
        assert layer.head_dim == (512 if is_full else 256)
        assert layer.num_kv_heads == (full_kv_heads if is_full else kv_heads)
        assert layer.k_equals_v == (is_full and member.k_equals_v)
        assert layer.kv_source == (i if i < first_shared else member.donors[is_full])
        double = member.name == "E2B" and i >= first_shared
        assert layer.intermediate_size == (12288 if double else member.mlp)


@each_member
def test_a_published_model_gets_its_sizes_donors_rotary_experts_and_ple(member: Member) -> None:
    text = TargetConfig.from_json(member.config()).text
    assert (text.donors[SLIDING], text.donors[FULL]) == member.donors
    assert (text.hidden_size, text.num_heads, text.window) == (member.hidden, member.heads[0], member.window)
    assert (text.vocab_size, text.softcap, text.rms_norm_eps) == (262_144, 30.0, 1e-6)
    assert (text.rotary[SLIDING].head_dim, text.rotary[SLIDING].rotated_dims) == (256, 256)
    assert (text.rotary[FULL].head_dim, text.rotary[FULL].rotated_dims) == (512, 128)
    assert (text.rotary[SLIDING].theta, text.rotary[FULL].theta) == (1e4, 1e6)
    assert text.experts == (ExpertsConfig(128, 8, 704) if member.experts else None)
    assert text.per_layer_input == (PerLayerInputConfig(262_144, 256) if member.ple else None)


@each_member
def test_both_spellings_of_per_layer_sizes_give_the_same_config(member: Member) -> None:
    old, new = member.config(), copy.deepcopy(member.config())
    text = new["text_config"]
    del text["global_head_dim"], text["num_global_key_value_heads"]
    differs = {"head_dim": 512} | ({"num_key_value_heads": member.heads[2]} if member.k_equals_v else {})
    text["per_layer_config"] = {f"{i:02d}": differs for i, kind in enumerate(text["layer_types"]) if kind == FULL}
    assert TargetConfig.from_json(new) == TargetConfig.from_json(old)
    text["per_layer_config"] = dict.fromkeys(text["per_layer_config"], differs | {"head_dim": 128})
    assert {layer.head_dim for layer in TargetConfig.from_json(new).text.layers} == {256, 128}


def test_a_text_config_alone_reads_like_the_whole_file() -> None:
    member = BY_NAME["26B-A4B"]
    assert TargetConfig.from_json(member.text()).text == TargetConfig.from_json(member.config()).text


def test_absent_keys_get_the_defaults_of_their_own_family() -> None:
    plain = TargetConfig.from_json(small()).text
    assert plain.per_layer_input == PerLayerInputConfig(262_144, 256)
    assert (plain.window, plain.max_context, plain.vocab_size) == (512, 131_072, 262_144)
    unified = TargetConfig.from_json(small(model_type="gemma4_unified_text")).text
    assert unified.per_layer_input is None
    assert (unified.window, unified.max_context, unified.vocab_size) == (1024, 262_144, 262_144)
    for text in (plain, unified):
        assert [layer.kind for layer in text.layers] == [SLIDING] * 5 + [FULL]
        assert [layer.head_dim for layer in text.layers] == [256] * 5 + [512]
        assert [layer.kv_source for layer in text.layers] == list(range(6))
        assert not any(layer.k_equals_v for layer in text.layers)
        assert (text.softcap, text.experts, text.rms_norm_eps) == (None, None, 1e-6)
        assert (text.rotary[SLIDING].theta, text.rotary[SLIDING].rotated_dims) == (1e4, 256)
        assert (text.rotary[FULL].theta, text.rotary[FULL].rotated_dims) == (1e6, 128)


def test_the_last_layer_is_full_where_layer_types_is_absent() -> None:
    kinds = [layer.kind for layer in TargetConfig.from_json(small(num_hidden_layers=8)).text.layers]
    assert kinds == [SLIDING] * 5 + [FULL, SLIDING, FULL]


@pytest.mark.parametrize(("k_equals_v", "kv_heads"), [(True, 1), (False, 2)])
def test_kv_heads_of_full_layers_count_only_where_keys_equal_values(k_equals_v: bool, kv_heads: int) -> None:
    raw = small(num_global_key_value_heads=1, attention_k_eq_v=k_equals_v)
    layers = TargetConfig.from_json(raw).text.layers
    assert (layers[0].num_kv_heads, layers[-1].num_kv_heads) == (2, kv_heads)


def test_donors_are_the_last_layers_of_each_kind_that_own_their_keys_and_values() -> None:
    kinds = [SLIDING, FULL, SLIDING, SLIDING, FULL]
    text = TargetConfig.from_json(small(num_hidden_layers=5, layer_types=kinds, num_kv_shared_layers=2)).text
    assert [layer.kv_source for layer in text.layers] == [0, 1, 2, 2, 1]
    assert text.donors == {SLIDING: 2, FULL: 1}


WRONG_TEXT: list[tuple[str, Json]] = [
    *((key, {key: value}) for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                      "num_key_value_heads") for value in (..., None, 0, -1, "64", True, 2.0)),
    ("attention_bias", {"attention_bias": True}),
    ("tie_word_embeddings", {"tie_word_embeddings": False}),
    ("hidden_activation", {"hidden_activation": "silu"}),
    ("use_bidirectional_attention", {"use_bidirectional_attention": "all"}),
    ("model_type", {"model_type": "gemma3_text"}),
    ("layer_types", {"layer_types": [SLIDING, FULL]}),
    ("layer_types", {"layer_types": [SLIDING] * 6}),
    ("layer_types", {"layer_types": ["chunked_attention"] * 5 + [FULL]}),
    ("num_kv_shared_layers", {"num_kv_shared_layers": 7}),
    ("num_kv_shared_layers", {"num_kv_shared_layers": -1}),
    ("shares K/V", {"num_kv_shared_layers": 1}),
    ("num_attention_heads", {"num_key_value_heads": 3}),
    ("num_attention_heads", {"num_global_key_value_heads": 3, "attention_k_eq_v": True}),
    ("num_attention_heads", {"per_layer_config": {"05": {"num_key_value_heads": 3}}}),
    ("per_layer_config", {"per_layer_config": {"00": {"sliding_window": 4}}}),
    ("rope_type", {"rope_parameters": {FULL: {"rope_type": "yarn"}}}),
    *((key, {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32, key: None})
      for key in ("num_experts", "top_k_experts", "moe_intermediate_size")),
    ("top_k_experts", {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 9, "moe_intermediate_size": 32}),
]


@pytest.mark.parametrize(("named", "changes"), WRONG_TEXT, ids=[str(changes) for _, changes in WRONG_TEXT])
def test_an_impossible_or_unsupported_text_setting_raises_and_is_named(named: str, changes: Json) -> None:
    with pytest.raises(ConfigError, match=named):
        TargetConfig.from_json({"model_type": "gemma4", "text_config": small(**changes)})


@pytest.mark.parametrize(("named", "raw"), [
    ("model_type", {}),
    ("model_type 'llama'", {"model_type": "llama"}),
    ("pass it as draft model", drafter()),
    ("text_config", {"model_type": "gemma4", "text_config": None}),
    ("text_config", {"model_type": "gemma4", "text_config": [1]}),
    ("text_config.model_type", {"model_type": "gemma4_unified", "text_config": small()}),
])
def test_a_file_that_is_no_target_raises_and_says_why(named: str, raw: Json) -> None:
    with pytest.raises(ConfigError, match=named):
        TargetConfig.from_json(raw)


def test_a_drafter_parses_with_and_without_centroids() -> None:
    plain = DrafterConfig.from_json(drafter(model_type="gemma4_unified_assistant",
                                            text={"model_type": "gemma4_unified_text"}))
    assert (plain.backbone_hidden_size, plain.centroids, plain.text.window) == (64, None, 1024)
    edge = DrafterConfig.from_json(drafter(use_ordered_embeddings=True))
    assert edge.centroids == CentroidConfig(2048, 32)
    chosen = DrafterConfig.from_json(drafter(use_ordered_embeddings=True, num_centroids=64,
                                             centroid_intermediate_top_k=4))
    assert chosen.centroids == CentroidConfig(64, 4)


def test_a_drafter_has_no_per_layer_input_unless_its_file_says_so_and_shares_nothing_with_itself() -> None:
    text = DrafterConfig.from_json(drafter(text={"num_kv_shared_layers": 4})).text
    assert text.per_layer_input is None
    assert [layer.kv_source for layer in text.layers] == [0, 1, 2, 3]


MOE = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8}


@pytest.mark.parametrize(("named", "raw"), [
    ("is not an MTP drafter", small()),
    ("backbone_hidden_size", drafter(backbone_hidden_size=None)),
    ("backbone_hidden_size", drafter(backbone_hidden_size=0)),
    ("hidden_size_per_layer_input", drafter(text={"hidden_size_per_layer_input": 32})),
    ("enable_moe_block", drafter(text=MOE)),
    ("use_double_wide_mlp", drafter(text={"use_double_wide_mlp": True})),
    ("num_kv_shared_layers", drafter(text={"num_kv_shared_layers": 5})),
    ("use_ordered_embeddings", drafter(use_ordered_embeddings=None)),
    ("num_centroids is 100", drafter(use_ordered_embeddings=True, num_centroids=100)),
    ("centroid_intermediate_top_k is 0", drafter(use_ordered_embeddings=True, centroid_intermediate_top_k=0)),
    ("centroid_intermediate_top_k is 2049", drafter(use_ordered_embeddings=True, centroid_intermediate_top_k=2049)),
])
def test_an_impossible_drafter_raises_and_names_the_key(named: str, raw: Json) -> None:
    with pytest.raises(ConfigError, match=named):
        DrafterConfig.from_json(raw)


MALFORMED: list[tuple[str, Json]] = [
    *((key, {key: value}) for key, values in {
        "sliding_window": (None, 0, -1, "512", 2**40), "vocab_size": (None, 0, "x"), "head_dim": (None, 0, 7),
        "global_head_dim": (None, -5, 7), "rms_norm_eps": (None, "x", 0, NAN, INFINITY),
        "max_position_embeddings": (None, 0), "hidden_size_per_layer_input": (None, -1, "x"),
        "vocab_size_per_layer_input": (None, 0), "final_logit_softcapping": (0, "x", True),
        "num_kv_shared_layers": (None, "2"), "num_hidden_layers": (2**20,), "attention_k_eq_v": (None, 1),
        "use_double_wide_mlp": (None, "x"), "enable_moe_block": (None, 0), "attention_bias": (None, 0),
        "tie_word_embeddings": (None,), "hidden_activation": (None,),
    }.items() for value in values),
    ("num_global_key_value_heads", {"num_global_key_value_heads": -1, "attention_k_eq_v": True}),
    *(("layer_types", {"layer_types": value}) for value in (7, "x", [], [[FULL]] * 6)),
    *(("per_layer_config", {"per_layer_config": value}) for value in (
        [1], {"a": {}}, {"-1": {}}, {"99": {"head_dim": 4}}, {"00": None}, {"00": {"num_key_value_heads": 0}},
        {"00": {"head_dim": None}}, {"03": {"head_dim": 7}},
        {"00": {"head_dim": 128}, "01": {"head_dim": 64}})),  # one kind, two sizes: the last one's rotary served both
    ("layer 3, whose K/V", {"num_kv_shared_layers": 2, "layer_types": [SLIDING, FULL, SLIDING, SLIDING, SLIDING, FULL],
                            "per_layer_config": {"4": {"num_key_value_heads": 1}}}),
    *(("rope_parameters", {"rope_parameters": value}) for value in ([1], ROPE[SLIDING], {FULL: None})),
    ("rope_theta", {"rope_parameters": {FULL: {"rope_type": "default"}}}),
    ("factor", {"rope_parameters": {FULL: ROPE[FULL] | {"factor": 0}}}),
    ("rope_theta", {"rope_parameters": {FULL: {"rope_theta": None}}}),
    ("partial_rotary_factor", {"rope_parameters": {FULL: {"rope_type": "proportional", "partial_rotary_factor": 2.0}}}),
]


@pytest.mark.parametrize(("named", "changes"), MALFORMED, ids=[str(changes) for _, changes in MALFORMED])
def test_a_malformed_text_setting_raises_and_is_named(named: str, changes: Json) -> None:
    with pytest.raises(ConfigError, match=named):
        TargetConfig.from_json(small(**changes))


def test_an_error_names_the_key_with_its_place_what_is_there_and_what_is_expected() -> None:
    overrides = {"model_type": "gemma4", "text_config": small(per_layer_config={"02": {"head_dim": "x\n"}})}
    with pytest.raises(ConfigError) as raised:
        TargetConfig.from_json(overrides)
    assert str(raised.value) == (r"text_config.per_layer_config.02.head_dim is 'x\n'; "
                                 "expected a whole number from 1 to 268435456")


@pytest.mark.parametrize("config", [BY_NAME["E2B"].config(), BY_NAME["26B-A4B"].config(), drafter()],
                         ids=["E2B", "26B-A4B", "drafter"])
def test_whatever_json_a_key_holds_the_file_is_read_or_refused(config: Json) -> None:
    parser = DrafterConfig if "backbone_hidden_size" in config else TargetConfig
    values: list[Any] = [None, True, 0, -1, 7, 2.5, NAN, 10**400, "", "2", [], [[1]] * 42, {}, {"0": []}, {FULL: {}}]
    keys = [*BY_NAME["E2B"].text(), "per_layer_config", *MOE]
    refused = []
    for key, value in [(key, value) for key in keys for value in values]:
        try:
            parser.from_json(config | {"text_config": config["text_config"] | {key: value}})
        except ConfigError as error:
            refused.append(str(error))
    assert len(refused) > len(keys) * len(values) / 2
    assert [text for text in refused if len(text) > 250 or "\n" in text] == []


def test_rotary_settings_that_belong_to_proportional_are_ignored_elsewhere() -> None:
    given = {"rope_type": "default", "rope_theta": 10_000, "factor": 8.0, "partial_rotary_factor": 0.5}
    for kind, factor in ((SLIDING, 1.0), (FULL, 8.0)):
        ours = given | {"rope_type": "proportional"} if kind == FULL else given
        rotary = TargetConfig.from_json(small(rope_parameters={kind: ours})).text.rotary[kind]
        assert (rotary.factor, rotary.rotated_dims) == (factor, 256)


@pytest.mark.parametrize("changes", [{"num_centroids": 0}, {"num_centroids": None},
                                     {"centroid_intermediate_top_k": "3"}])
def test_malformed_centroids_raise_and_are_named(changes: Json) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        DrafterConfig.from_json(drafter(use_ordered_embeddings=True, **changes))


@pytest.mark.parametrize(("name", "values"), [
    ("max_tokens", [0, -1, 2.5, "3", True, None]),
    ("temperature", [-0.1, NAN, INFINITY, 10**400, "a", True, None]),
    ("top_k", [-1, 2.5]),
    ("top_p", [0.0, -0.5, 1.001, NAN, "1"]),
    ("min_p", [-0.001, 1.001, NAN, 1j]),
    ("seed", [-1, 2**32, 1.5, True]),
    ("stop", ["", ("end", ""), (1,), None, 7, b"end", {"end": 1}]),
])
def test_a_sampling_setting_that_cannot_be_raises_and_is_named(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(RequestError, match=f"^{name} is "):
            SamplingParams(**{name: value})


def test_sampling_settings_at_their_bounds_are_fine() -> None:
    SamplingParams(max_tokens=1, temperature=0.0, top_k=0, top_p=1e-6, min_p=0.0, seed=0, stop=())
    SamplingParams(temperature=100.0, top_p=1.0, min_p=1.0, seed=2**32 - 1)
    assert SamplingParams(stop="end").stop == ("end",)  # type: ignore[arg-type]
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]


def test_numbers_of_numpy_are_as_good_as_pythons_own() -> None:
    ours = SamplingParams(max_tokens=np.int64(3), temperature=np.float32(0.5), top_p=1, seed=np.uint32(2**32 - 1))
    assert ours == SamplingParams(max_tokens=3, temperature=0.5, top_p=1.0, seed=2**32 - 1)
    assert [type(value) for value in (ours.max_tokens, ours.temperature, ours.top_p)] == [int, float, float]
    assert type(EngineConfig(num_draft_tokens=np.int32(2)).num_draft_tokens) is int


@pytest.mark.parametrize(("name", "settings"), [
    ("num_draft_tokens", {"num_draft_tokens": 1.5}),
    ("num_draft_tokens", {"num_draft_tokens": True}),
    ("prefill_chunk", {"prefill_chunk": "x"}),
    ("num_draft_tokens", {"num_draft_tokens": -1}),
    ("num_draft_tokens", {"num_draft_tokens": 5, "max_draft_tokens": 4}),
    ("max_draft_tokens", {"max_draft_tokens": -1}),
    ("prefill_chunk", {"prefill_chunk": 0}),
])
def test_an_engine_setting_that_cannot_be_raises_and_is_named(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=f"^{name} is "):
        EngineConfig(**settings)
    EngineConfig(num_draft_tokens=0, max_draft_tokens=0, prefill_chunk=1)

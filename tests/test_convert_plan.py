"""A plan knows every tensor before one is read: its class, its bits and why, or why it is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from convert_support import change_json, read_json, save, source_pair, tensors
from support import GOLDENS, KINDS

from mlx_mtp.checkpoint.loader import load_target
from mlx_mtp.checkpoint.weights import SHARED_KV_REASON, tower_name
from mlx_mtp.config import DrafterConfig, QuantizationConfig, TargetConfig
from mlx_mtp.convert import recipes
from mlx_mtp.convert.plan import PartPlan, plan_part, read_headers
from mlx_mtp.convert.settings import ConvertConfig
from mlx_mtp.convert.written_config import written_config
from mlx_mtp.errors import CheckpointError, RequestError

PARTS = {"target": "target", "assistant": "drafter"}


def plan(folder: Path, part: str = "target", **settings: Any) -> PartPlan:
    return plan_part(folder, part, ConvertConfig(str(folder), **settings))  # type: ignore[arg-type]


def kept(plan: PartPlan, module_class: str) -> set[tuple[int, str] | str]:
    """(bits, mode) of the modules of a class, or their plain type."""
    return {(job.quantization.bits, job.quantization.mode) if job.quantization else str(job.outputs[0].dtype)
            for job in plan.jobs if job.module_class == module_class}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("folder", PARTS)
@pytest.mark.parametrize("settings", [{}, {"quantize": True}], ids=["plain", "quantized"])
def test_every_source_tensor_is_used_or_left_out_with_a_reason(
    kind: str, folder: str, settings: dict[str, Any]
) -> None:
    source = GOLDENS / kind / folder
    planned = plan(source, PARTS[folder], **settings)
    used = [tensor.name for job in planned.jobs for tensor in job.sources]
    dropped = [tensor.name for tensor in planned.dropped]
    assert set(used) | set(dropped) == set(tensors(source))
    assert not set(used) & set(dropped)
    halves = {name for name in used if name.endswith("gate_up_proj")}
    assert len(used) == len(set(used)) + len(halves)
    read = sum(job.bytes_read for job in planned.jobs) + sum(tensor.nbytes for tensor in planned.dropped)
    assert read == sum(array.nbytes for array in tensors(source).values())
    assert {tensor.reason for tensor in planned.dropped} <= {"vision", "audio", SHARED_KV_REASON}


def test_a_recipe_gives_each_class_its_bits() -> None:
    four, eight = (4, "affine"), (8, "affine")
    mixture = plan(GOLDENS / "mixture" / "target", quantize=True)
    assert {name: kept(mixture, name) for name in ("embedding", "attention", "mlp", "experts", "router")} == {
        "embedding": {four}, "attention": {four}, "mlp": {eight}, "experts": {four}, "router": {eight}}
    assert kept(mixture, "norms and scalars") == {"mlx.core.bfloat16"}
    edge = plan(GOLDENS / "edge" / "target", quantize=True)
    assert {name: kept(edge, name) for name in ("embedding", "per-layer embedding", "projections", "mlp")} == {
        "embedding": {four}, "per-layer embedding": {eight}, "projections": {eight}, "mlp": {four}}
    for kind in ("dense", "unified"):
        planned = plan(GOLDENS / kind / "target", quantize=True)
        assert {job.quantization.bits for job in planned.jobs if job.quantization} == {4}


def test_the_uniform_recipe_keeps_only_what_would_break() -> None:
    uniform = plan(GOLDENS / "mixture" / "target", quantize=True, recipe="uniform")
    assert (kept(uniform, "mlp"), kept(uniform, "router")) == ({(4, "affine")}, {(8, "affine")})
    uniform = plan(GOLDENS / "edge" / "target", quantize=True, recipe="uniform")
    assert (kept(uniform, "projections"), kept(uniform, "per-layer embedding")) == ({(4, "affine")}, {(8, "affine")})


def test_more_bits_than_a_rule_asks_for_stay_and_other_modes_get_affine_exceptions() -> None:
    six = plan(GOLDENS / "mixture" / "target", quantize=True, q_bits=6)
    assert (kept(six, "mlp"), kept(six, "router")) == ({(6, "affine")}, {(8, "affine")})
    mx4 = plan(GOLDENS / "mixture" / "target", quantize=True, q_mode="mxfp4")
    assert (kept(mx4, "experts"), kept(mx4, "mlp")) == ({(4, "mxfp4")}, {(8, "affine")})
    quantization = mx4.config["quantization"]
    assert {key: quantization[key] for key in ("group_size", "bits", "mode")} == {
        "group_size": 32, "bits": 4, "mode": "mxfp4"}
    assert quantization["language_model.model.layers.0.router.proj"] == {
        "group_size": 64, "bits": 8, "mode": "affine"}
    assert "language_model.model.layers.0.self_attn.q_proj" not in quantization
    mx8 = plan(GOLDENS / "edge" / "target", quantize=True, q_mode="mxfp8")
    assert kept(mx8, "per-layer embedding") == {(8, "mxfp8")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_drafter_gets_four_bits_but_for_its_centroid_head(kind: str) -> None:
    planned = plan(GOLDENS / kind / "assistant", "drafter", quantize=True)
    assert kept(planned, "projections") == {(4, "affine")}
    has_centroids = kind == "edge"
    assert kept(planned, "embedding") == ({"mlx.core.bfloat16"} if has_centroids else {(4, "affine")})
    assert kept(planned, "centroids") == ({"mlx.core.bfloat16", "mlx.core.int32"} if has_centroids else set())
    eight = plan(GOLDENS / kind / "assistant", "drafter", quantize=True, draft_bits=8, q_mode="mxfp4")
    assert kept(eight, "mlp") == {(8, "affine")}


def test_what_a_drafter_alone_and_a_companion_are_asked_for() -> None:
    folder = GOLDENS / "dense" / "assistant"
    settings = ConvertConfig(str(folder), quantize=True, q_bits=8)
    alone = plan_part(folder, "drafter", settings)
    companion = plan_part(folder, "drafter", settings, is_companion=True)
    assert (kept(alone, "mlp"), kept(companion, "mlp")) == ({(8, "affine")}, {(4, "affine")})
    only_drafter = ConvertConfig(str(folder), draft_bits=4)
    assert kept(plan_part(folder, "drafter", only_drafter, is_companion=True), "mlp") == {(4, "affine")}
    assert kept(plan(GOLDENS / "dense" / "target", draft_bits=4), "mlp") == {"mlx.core.bfloat16"}


@pytest.mark.parametrize(("width", "asked", "expected"), [
    (128, (64, 4, "affine"), (64, None)), (96, (64, 4, "affine"), (32, "groups of 64 do not divide its 96 columns")),
    (192, (128, 4, "affine"), (64, "groups of 128 do not divide its 192 columns")),
    (128, (32, 4, "affine"), (32, None)), (48, (64, 4, "affine"), (None, "no group size divides its 48 columns")),
    (48, (16, 4, "nvfp4"), (16, None)), (40, (32, 4, "mxfp4"), (None, "no group size divides its 40 columns")),
])
def test_a_group_that_does_not_divide_the_width_gives_way_to_a_smaller_one(
    width: int, asked: tuple[int, int, str], expected: tuple[int | None, str | None]
) -> None:
    choice = recipes.fitting(width, QuantizationConfig(*asked))
    assert (choice.quantization.group_size if choice.quantization else None, choice.reason) == expected


@pytest.mark.parametrize(("bits", "warned"), [(4, True), (5, False)])
def test_e4b_below_five_bits_is_warned_about(bits: int, warned: bool) -> None:
    raw = read_json(GOLDENS / "edge" / "target" / "config.json")
    raw["text_config"] |= {"hidden_size": 2560}
    found = recipes.warnings(TargetConfig.from_json(raw), QuantizationConfig(64, bits))
    assert bool(found) == warned
    assert recipes.warnings(TargetConfig.from_json(read_json(GOLDENS / "edge" / "target" / "config.json")),
                            QuantizationConfig(64, bits)) == []


@pytest.mark.parametrize(("path", "part", "expected"), [
    ("embed_tokens.weight", "target", "embedding"), ("embed_tokens_per_layer", "target", "per-layer embedding"),
    ("layers.3.self_attn.q_proj", "target", "attention"),
    ("layers.3.self_attn.q_norm.weight", "target", "norms and scalars"),
    ("layers.3.mlp.up_proj.weight", "target", "mlp"), ("layers.3.experts.switch_glu.up_proj", "target", "experts"),
    ("layers.3.router.proj.weight", "target", "router"), ("layers.3.router.scale", "target", "norms and scalars"),
    ("layers.3.layer_scalar", "target", "norms and scalars"), ("norm.weight", "target", "norms and scalars"),
    ("per_layer_model_projection.weight", "target", "projections"),
    ("per_layer_projection_norm.weight", "target", "norms and scalars"),
    ("layers.3.per_layer_input_gate", "target", "projections"), ("pre_projection.weight", "drafter", "projections"),
    ("masked_embedding.centroids.weight", "drafter", "centroids"),
    ("masked_embedding.token_ordering", "drafter", "centroids"),
])
def test_every_tensor_has_a_class(path: str, part: Any, expected: str) -> None:
    assert recipes.tensor_class(path, part) == expected
    assert expected in recipes.CLASSES


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("folder", PARTS)
@pytest.mark.parametrize("spelling", ["config.json", "config.per_layer.json"])
def test_the_written_config_says_the_same_in_the_spelling_that_all_read(
    kind: str, folder: str, spelling: str
) -> None:
    raw = read_json(GOLDENS / kind / folder / spelling)
    parser = TargetConfig if folder == "target" else DrafterConfig
    written = written_config(raw, parser.from_json(raw), None, False)
    assert parser.from_json(written) == parser.from_json(raw)
    text = written["text_config"]
    assert "per_layer_config" not in text
    assert written["vocab_size"] == text["vocab_size"] == 256
    for key in ("hidden_size_per_layer_input", "num_kv_shared_layers", "use_double_wide_mlp", "global_head_dim",
                "num_global_key_value_heads", "layer_types", "rope_parameters", "sliding_window"):
        assert key in text, key
    assert "vision_config" not in written


def test_absent_keys_are_written_as_what_their_absence_means() -> None:
    raw = read_json(GOLDENS / "dense" / "target" / "config.json")
    for key in ("rope_parameters", "layer_types", "final_logit_softcapping", "global_head_dim", "rms_norm_eps",
                "num_kv_shared_layers"):
        del raw["text_config"][key]
    config = TargetConfig.from_json(raw)
    written = written_config(raw, config, "float16", False)
    assert TargetConfig.from_json(written) == config
    text = written["text_config"]
    assert (text["final_logit_softcapping"], text["global_head_dim"], text["num_kv_shared_layers"]) == (None, 512, 0)
    assert text["rope_parameters"]["full_attention"]["partial_rotary_factor"] == 0.25
    assert (written["dtype"], text["dtype"]) == ("float16", "float16")


def test_a_text_only_checkpoint_is_wrapped_for_the_names_that_are_written(tmp_path: Path) -> None:
    source = source_pair("dense", tmp_path)
    raw = read_json(source / "config.json")
    (source / "config.json").unlink()
    (source / "config.json").write_text("{}")
    change_json(source / "config.json", **raw["text_config"])
    weights = {name.replace("model.language_model.", "model."): array for name, array in tensors(source).items()}
    save(source, weights)
    planned = plan(source)
    assert planned.config["model_type"] == "gemma4"
    assert planned.config["text_config"]["model_type"] == "gemma4_text"
    assert TargetConfig.from_json(planned.config).text == load_target(source)[0].config.text


def test_towers_are_kept_only_when_asked_for() -> None:
    folder = GOLDENS / "edge" / "target"
    without, with_them = plan(folder, quantize=True), plan(folder, quantize=True, keep_towers=True)
    assert {"vision", "audio"} <= {tensor.reason for tensor in without.dropped}
    assert {tensor.reason for tensor in with_them.dropped} == {SHARED_KV_REASON}
    towers = [job for job in with_them.jobs if job.module_class == recipes.VISION_AND_AUDIO]
    assert len(towers) == len(without.dropped) - len(with_them.dropped)
    assert not [job for job in towers if job.quantization is not None]


def test_towers_that_the_config_promises_and_no_file_holds_cannot_be_kept(tmp_path: Path) -> None:
    source = source_pair("edge", tmp_path)
    save(source, {name: array for name, array in tensors(source).items() if tower_name(name) is None})
    plan(source, keep_towers=True)  # nothing is promised
    change_json(source / "config.json", vision_config={"hidden_size": 8})
    with pytest.raises(RequestError, match=r"config\.json has vision_config, but there are no vision or audio tensors"):
        plan(source, keep_towers=True)


def test_a_vision_tensor_under_two_names_or_without_its_weight_is_an_error(tmp_path: Path) -> None:
    source = source_pair("edge", tmp_path)
    tower = next(name for name in tensors(source) if name.startswith("model.vision_tower"))
    save(source, {tower.removeprefix("model."): tensors(source)[tower]}, "other.safetensors")
    with pytest.raises(CheckpointError, match=r"is there twice, also under another name"):
        plan(source, keep_towers=True)
    save(source, {"model.vision_tower.x.scales": mx.zeros((2, 2))}, "other.safetensors")
    with pytest.raises(CheckpointError, match=r"vision_tower\.x\.scales is there without its weight"):
        plan(source, keep_towers=True)


def test_settings_of_the_drafter_follow_the_mode_where_the_mode_has_those_bits() -> None:
    assert recipes.asked_of_drafter(None, None, "mxfp4") == QuantizationConfig(32, 4, "mxfp4")
    assert recipes.asked_of_drafter(4, 32, "affine") == QuantizationConfig(32, 4)
    assert recipes.asked_of_drafter(8, None, "mxfp8") == QuantizationConfig(32, 8, "mxfp8")
    assert recipes.asked_of_drafter(None, None, "mxfp8") == QuantizationConfig(64, 4)
    with pytest.raises(RequestError, match="q_mode is 'x'; expected one of affine"):
        ConvertConfig("x", quantize=True, q_mode="x")


def test_planning_evaluates_no_weight_of_the_model() -> None:
    """The 26B is planned on a laptop: 52 GB of random numbers must stay ideas."""
    folder = GOLDENS / "mixture" / "target"
    plan(folder, quantize=True)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    plan(folder, quantize=True)
    assert mx.get_peak_memory() - before < 20_000
    assert sum(tensor.nbytes for headers in read_headers(folder).values() for tensor in headers.values()) > 900_000

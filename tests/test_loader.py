"""Checkpoints load whoever wrote them, and what was left out, made up or guessed on the way is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from mlx_mtp import CheckpointError, MemoryBudgetError, RequestError, api, demo, device, load, score
from mlx_mtp.checkpoint import memory
from mlx_mtp.checkpoint.loader import load_drafter, load_target, materialize
from mlx_mtp.checkpoint.weights import SHARED_KV_REASON, written_name
from mlx_mtp.config import EngineConfig
from mlx_mtp.kv_cache import GROW_STEP, round_up
from mlx_mtp.models.drafter import Drafter
from mlx_mtp.models.target import Target

GOLDENS = Path(__file__).parent / "goldens"
KINDS = ("dense", "mixture", "edge", "unified")
TOKENS = [(7 * i * i + 3 * i) % 256 for i in range(40)]
MODES = [("affine", 32, 4), ("affine", 64, 8), ("mxfp4", 32, 4), ("mxfp8", 32, 8), ("nvfp4", 16, 4)]


def copy_of(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder))


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


def tensors(folder: Path) -> dict[str, mx.array]:
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    return weights


def write(folder: Path, weights: dict[str, mx.array], config: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def our_logits(folder: Path) -> mx.array:
    target, _ = load_target(folder, mx.float32)
    return score(api.Pair(target, None, None, 4096), TOKENS)  # type: ignore[arg-type]


def assert_same_model(one: nn.Module, other: nn.Module) -> None:
    left, right = dict(tree_flatten(one.parameters())), dict(tree_flatten(other.parameters()))
    assert left.keys() == right.keys()
    assert not [path for path, array in left.items() if not mx.array_equal(array, right[path]).item()]


def relative_difference(ours: mx.array, theirs: mx.array) -> float:
    return float((mx.abs(ours - theirs).max() / mx.abs(theirs).max()).item())


@pytest.fixture
def peer_model(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's model of a golden target. Its defaults for two keys are E2B's, so the config says them."""
    source = copy_of(GOLDENS / request.param / "target", tmp_path / "source")
    config = read(source / "config.json")
    config["vocab_size"] = config["text_config"]["vocab_size"]
    config["text_config"].setdefault("hidden_size_per_layer_input", 0)
    (source / "config.json").write_text(json.dumps(config))
    model, config = load_model(source)
    return model, config


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["target", "assistant"])
def test_both_config_spellings_describe_the_same_model(kind: str, part: str, tmp_path: Path) -> None:
    source = GOLDENS / kind / part
    folder = copy_of(source, tmp_path / part)
    shutil.copy(source / "config.per_layer.json", folder / "config.json")
    assert read(source / "config.json") != read(folder / "config.json")
    if part == "target":
        assert_same_model(load_target(source)[0], load_target(folder)[0])
    else:
        assert_same_model(load_drafter(source), load_drafter(folder))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.", "language_model.", ""])
@pytest.mark.parametrize("kind", ["mixture", "edge"])
def test_every_spelling_of_the_tensor_names_loads_the_same_weights(kind: str, prefix: str, tmp_path: Path) -> None:
    """mlx-lm's and mlx-vlm's, a text-only folder's, and bare names; experts are split as mlx-lm writes them."""
    original, _ = load_target(GOLDENS / kind / "target")
    config = read(GOLDENS / kind / "target/config.json")
    renamed = {prefix + path: array for path, array in tree_flatten(original.parameters())}
    assert kind != "mixture" or f"{prefix}layers.0.experts.switch_glu.up_proj.weight" in renamed
    loaded, left_out = load_target(write(tmp_path / "renamed", renamed, config))
    assert_same_model(original, loaded)
    assert not left_out


@pytest.mark.parametrize("kind", ["gemma4_text", "gemma4_unified_text"])
def test_a_text_only_folder_has_its_settings_at_the_top_of_the_config(kind: str, tmp_path: Path) -> None:
    source = GOLDENS / ("unified" if "unified" in kind else "dense") / "target"
    config = read(source / "config.json")["text_config"]
    assert config["model_type"] == kind
    renamed = {name.replace("model.language_model.", "model."): array for name, array in tensors(source).items()}
    assert_same_model(load_target(source)[0], load_target(write(tmp_path / "text", renamed, config))[0])


def test_towers_and_unused_keys_and_values_are_left_out_and_counted() -> None:
    _, left_out = load_target(GOLDENS / "edge/target")
    names = tensors(GOLDENS / "edge/target")
    assert left_out["vision"] == sum("vision" in name for name in names) > 0
    assert left_out["audio"] == sum("audio" in name for name in names) > 0
    assert left_out[SHARED_KV_REASON] == sum(
        f"layers.{layer}.self_attn.{part}." in name
        for name in names for layer in (6, 7, 8) for part in ("k_proj", "v_proj", "k_norm")
    )


def test_token_ordering_of_any_integer_type_becomes_int32(tmp_path: Path) -> None:
    source = GOLDENS / "edge/assistant"
    stored = tensors(source)
    assert stored["masked_embedding.token_ordering"].dtype == mx.int64
    ordering = load_drafter(source).masked_embedding.token_ordering
    assert ordering.dtype == mx.int32
    assert sorted(ordering.tolist()) == list(range(256))
    stored["masked_embedding.token_ordering"] = ordering.astype(mx.uint32)
    folder = write(tmp_path / "unsigned", stored, read(source / "config.json"))
    assert_same_model(load_drafter(source), load_drafter(folder))


def test_a_token_ordering_that_repeats_an_id_is_refused(tmp_path: Path) -> None:
    """An id outside the vocabulary would read whatever lies behind the embedding."""
    weights = tensors(GOLDENS / "edge/assistant")
    weights["masked_embedding.token_ordering"] = mx.array([70_000, *range(255)])
    folder = write(tmp_path / "edge", weights, read(GOLDENS / "edge/assistant/config.json"))
    with pytest.raises(CheckpointError, match="token_ordering does not hold every token id once"):
        materialize(load_drafter(folder), "drafter", folder)


def test_only_the_shards_that_the_index_names_are_read(tmp_path: Path) -> None:
    source = GOLDENS / "mixture/target"
    weights = tensors(source)
    folder = tmp_path / "sharded"
    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    weight_map = {name: f"model-{i % 3}.safetensors" for i, name in enumerate(sorted(weights))}
    for shard in set(weight_map.values()):
        mx.save_safetensors(str(folder / shard), {name: weights[name] for name in weights if weight_map[name] == shard})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "consolidated.safetensors").write_bytes(b"not named by the index")
    assert_same_model(load_target(source)[0], load_target(folder)[0])


def test_halves_of_a_fused_tensor_are_whole_arrays() -> None:
    # A view's matrices are further apart than its shape says, which not all of MLX's products look at.
    assert any("experts.gate_up_proj" in name for name in tensors(GOLDENS / "mixture/target"))
    experts = load_target(GOLDENS / "mixture/target")[0].layers[0].experts.switch_glu
    for matrix in experts.mlp:
        assert matrix.weight.dtype == mx.bfloat16
        assert memoryview(matrix.weight.view(mx.uint16)).c_contiguous


def test_weights_become_the_asked_dtype_and_else_stay_as_stored() -> None:
    assert load_target(GOLDENS / "dense/target")[0].dtype == mx.bfloat16
    target, _ = load_target(GOLDENS / "dense/target", mx.float32)
    assert {array.dtype for _, array in tree_flatten(target.parameters())} == {mx.float32}


@pytest.mark.parametrize("peer_model", KINDS, indirect=True)
def test_hugging_faces_own_files_give_mlx_lms_logits(
    peer_model: tuple[nn.Module, dict[str, Any]], tmp_path: Path
) -> None:
    """Fused experts among them: gate above up."""
    model, _ = peer_model
    model.set_dtype(mx.float32)
    assert relative_difference(our_logits(tmp_path / "source"), model(mx.array([TOKENS]))[0]) <= 1e-5


@pytest.mark.parametrize("peer_model", KINDS, indirect=True)
@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
def test_what_mlx_lm_quantizes_gives_mlx_lms_logits(
    peer_model: tuple[nn.Module, dict[str, Any]], mode: str, group_size: int, bits: int, tmp_path: Path
) -> None:
    """With its own override in the mixture: the router has 8 bits, affine, whatever the rest has."""
    model, config = quantize_model(*peer_model, group_size, bits, mode)
    folder = tmp_path / "quantized"
    save_model(folder, model)
    save_config(config, folder / "config.json")
    reloaded, _ = load_model(folder)
    reloaded.set_dtype(mx.float32)
    assert relative_difference(our_logits(folder), reloaded(mx.array([TOKENS]))[0]) <= 1e-5


@pytest.mark.parametrize("peer_model", ["mixture"], indirect=True)
@pytest.mark.parametrize("written_prefix", ["language_model.model.", "model.language_model.", ""])
def test_overrides_count_under_any_prefix_and_false_leaves_a_module_as_it_is(
    peer_model: tuple[nn.Module, dict[str, Any]], written_prefix: str, tmp_path: Path
) -> None:
    kept = "language_model.model.layers.1.mlp.down_proj"
    finer = "language_model.model.layers.0.self_attn.q_proj"

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        return path != kept and ({"group_size": 32, "bits": 8, "mode": "mxfp8"} if path == finer else True)

    model, config = quantize_model(*peer_model, 32, 4, "affine", quant_predicate=choose)
    folder = tmp_path / "quantized"
    save_model(folder, model)
    assert finer in config["quantization"]
    config["quantization"] = {
        path.replace("language_model.model.", written_prefix): value for path, value in config["quantization"].items()
    } | {kept.replace("language_model.model.", written_prefix): False}
    (folder / "config.json").write_text(json.dumps(config))
    target, _ = load_target(folder)
    assert isinstance(target.layers[1].mlp.down_proj, nn.Linear)
    assert (target.layers[0].self_attn.q_proj.mode, target.layers[0].self_attn.q_proj.bits) == ("mxfp8", 8)
    assert (target.layers[0].mlp.down_proj.mode, target.layers[0].mlp.down_proj.bits) == ("affine", 4)
    model.set_dtype(mx.float32)
    assert relative_difference(our_logits(folder), model(mx.array([TOKENS]))[0]) <= 1e-5


@pytest.mark.parametrize("peer_model", ["mixture"], indirect=True)
def test_global_scales_of_nvfp4_experts_are_refused_by_name(
    peer_model: tuple[nn.Module, dict[str, Any]], tmp_path: Path
) -> None:
    model, config = quantize_model(*peer_model, 16, 4, "nvfp4", global_scale=True)
    save_model(tmp_path / "scaled", model)
    save_config(config, tmp_path / "scaled/config.json")
    with pytest.raises(CheckpointError, match=r"switch_glu\.\w+_proj\.global_scale is there, but .* not supported"):
        load_target(tmp_path / "scaled")


@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
@pytest.mark.parametrize("kind", ["dense", "edge", "unified"])
def test_quantized_drafters_load_as_they_were_written(
    kind: str, mode: str, group_size: int, bits: int, tmp_path: Path
) -> None:
    """Named as mlx-vlm names them: `model.` before the trunk, nothing before projections and centroids."""
    drafter = load_drafter(GOLDENS / kind / "assistant")
    nn.quantize(drafter, group_size, bits, mode=mode, class_predicate=lambda _, module: (
        isinstance(module, nn.Linear | nn.Embedding) and module.weight.shape[-1] % group_size == 0))
    assert isinstance(drafter.pre_projection, nn.QuantizedLinear)
    config = read(GOLDENS / kind / "assistant/config.json")
    config["quantization"] = {"group_size": group_size, "bits": bits, "mode": mode}
    written = {written_name(path, "drafter"): array for path, array in tree_flatten(drafter.parameters())}
    assert "model.norm.weight" in written
    assert "pre_projection.scales" in written
    assert_same_model(drafter, load_drafter(write(tmp_path / "drafter", written, config)))


@pytest.mark.parametrize("kind", ["dense", "edge"])
def test_draft_bits_quantizes_the_drafter_but_not_its_centroids(kind: str) -> None:
    drafter = load_drafter(GOLDENS / kind / "assistant", mx.float32, bits=4)
    assert drafter.layers[0].mlp.up_proj.bits == 4
    assert isinstance(drafter.embed_tokens, nn.QuantizedEmbedding)
    if kind == "edge":
        assert isinstance(drafter.masked_embedding.centroids, nn.Linear)
    plain = load_drafter(GOLDENS / kind / "assistant", mx.float32)
    error = mx.abs(mx.dequantize(
        *(drafter.pre_projection[part] for part in ("weight", "scales", "biases")),
        drafter.pre_projection.group_size, 4) - plain.pre_projection.weight)
    assert 0 < float(error.max()) < 0.2 * float(mx.abs(plain.pre_projection.weight).max())


def test_draft_bits_leaves_a_quantized_drafter_as_it_is(tmp_path: Path) -> None:
    drafter = load_drafter(GOLDENS / "dense/assistant", bits=8)
    config = read(GOLDENS / "dense/assistant/config.json")
    config["quantization"] = {"group_size": 32, "bits": 8}
    config["quantization"] |= {
        written_name(path, "drafter"): {"group_size": module.group_size, "bits": 8}
        for path, module in drafter.named_modules() if isinstance(module, nn.QuantizedLinear)
    }
    written = {written_name(path, "drafter"): array for path, array in tree_flatten(drafter.parameters())}
    loaded = load_drafter(write(tmp_path / "drafter", written, config), bits=4)
    assert_same_model(drafter, loaded)


@pytest.mark.parametrize("bad", [0, 1, 7, 16])
def test_draft_bits_that_mlx_has_not_are_refused_before_anything_is_opened(bad: int) -> None:
    with pytest.raises(RequestError, match=f"draft_bits is {bad}; expected one of 2, 3, 4, 5, 6, 8"):
        load("/no/such/folder", draft_bits=bad)


def linked_pair(folder: Path, target_name: str, drafter_name: str) -> Path:
    """The built-in pair under other names."""
    (folder / target_name).symlink_to(demo.TARGET, target_is_directory=True)
    assistant = demo.TARGET.with_name(f"{demo.TARGET.name}-assistant")
    (folder / drafter_name).symlink_to(assistant, target_is_directory=True)
    return folder / target_name


@pytest.mark.parametrize(("target", "drafter"), [
    ("X", "X-assistant"), ("X-4bit", "X-assistant"), ("X-4bit", "X-4bit-assistant"), ("X-bf16", "X-assistant"),
    ("X-4bit", "X-assistant-4bit"), ("X-4bit", "X-assistant-bf16"),
])
def test_the_drafter_beside_the_target_is_found(target: str, drafter: str, tmp_path: Path) -> None:
    pair = load(linked_pair(tmp_path, target, drafter), draft_bits=4)
    assert isinstance(pair.drafter, Drafter)
    assert isinstance(pair.drafter.pre_projection, nn.QuantizedLinear)


@pytest.mark.parametrize("drafter", ["Y-assistant", "X-drafter", "X-assistantX"])
def test_no_other_folder_is_taken_for_the_drafter_and_a_note_says_that_there_is_none(
    drafter: str, tmp_path: Path
) -> None:
    pair = load(linked_pair(tmp_path, "X", drafter))
    assert pair.drafter is None
    assert any("no drafter found" in note for note in pair.notes)


def test_without_a_drafter_if_asked_so_and_then_without_a_note() -> None:
    pair = load(demo.TARGET, draft_model=None)
    assert isinstance(pair.target, Target)
    assert pair.drafter is None
    assert not any("drafter" in note for note in pair.notes)


def test_no_model_is_the_built_in_pair_and_a_note_says_so() -> None:
    pair = load()
    assert pair.drafter is not None
    assert "built-in" in pair.notes[0]


def needed_bytes(context: int) -> tuple[int, int]:
    """Weights and cache of the built-in target alone; the cache grows in steps."""
    target, _ = load_target(demo.TARGET, mx.float32)
    weights = sum(array.nbytes for _, array in tree_flatten(target.parameters()))
    slack = EngineConfig().ring_slack
    held = round_up(context + slack, GROW_STEP)
    return weights, memory.cache_bytes(target.config.text, held, slack, mx.float32)


def test_a_context_that_does_not_fit_is_refused_and_the_advised_one_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, cache = needed_bytes(2048)
    budget = int((weights + cache) / (1 - memory.WORKING_SPACE)) + 1
    monkeypatch.setattr(device, "memory_bytes", lambda: budget)
    with pytest.raises(MemoryBudgetError, match=r"a context of (\d+) tokens would fit \(--max-context\)") as refusal:
        load(demo.TARGET, draft_model=None)
    advised = int(str(refusal.value).split("a context of ")[1].split()[0])
    assert 2048 - memory.MIN_CONTEXT <= advised <= 2048
    pair = load(demo.TARGET, draft_model=None, max_context=advised)
    assert pair.max_context == advised
    api.check(pair, [2] * (advised - 1), max_tokens=1)  # the engine has room for it too
    with pytest.raises(MemoryBudgetError):
        load(demo.TARGET, draft_model=None, max_context=advised + memory.MIN_CONTEXT)


def test_weights_that_do_not_fit_are_refused_and_a_checkpoint_of_the_advised_size_loads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target, _ = load_target(demo.TARGET, mx.float32)
    nn.quantize(target, 32, 8, class_predicate=lambda _, module: (
        isinstance(module, nn.Linear | nn.Embedding) and module.weight.shape[-1] % 32 == 0))
    config = read(demo.TARGET / "config.json") | {"quantization": {"group_size": 32, "bits": 8}}
    folder = copy_of(demo.TARGET, tmp_path / "X")
    (folder / "model.safetensors").unlink()
    written = {written_name(path, "target"): array for path, array in tree_flatten(target.parameters())}
    write(folder, written, config)
    size = sum(array.nbytes for array in written.values())
    weights, cache = needed_bytes(memory.MIN_CONTEXT)
    share = -(-100 * size // weights)  # percent, rounded up
    monkeypatch.setattr(device, "memory_bytes", lambda: int((share / 100 * weights + cache) * 1.0001 / 0.95))
    with pytest.raises(MemoryBudgetError, match=rf"with at most {share}% of this one's bytes .* 256 tokens") as refusal:
        load(demo.TARGET, draft_model=None)
    assert "\n" not in str(refusal.value)
    assert load(folder, draft_model=None, max_context=memory.MIN_CONTEXT).drafter is None


def test_nothing_is_read_before_the_memory_is_known_to_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "memory_bytes", lambda: 1_000_000)
    monkeypatch.setattr(api, "materialize", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(MemoryBudgetError, match=r"needs \d+\.\d+ GB .* but the device has"):
        load()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_bad_number_is_found_and_its_tensor_named(value: float, tmp_path: Path) -> None:
    source = GOLDENS / "dense/target"
    weights = tensors(source)
    weights["model.language_model.layers.3.mlp.up_proj.weight"][5, 7] = value
    folder = write(tmp_path / "bad", weights, read(source / "config.json"))
    target, _ = load_target(folder)
    with pytest.raises(CheckpointError, match=r"layers\.3\.mlp\.up_proj\.weight holds NaN or infinity"):
        materialize(target, "target", folder)


def test_a_sum_that_overflows_is_no_bad_number(tmp_path: Path) -> None:
    source = GOLDENS / "dense/target"
    weights = tensors(source)
    weights["model.language_model.layers.3.mlp.up_proj.weight"] = mx.full((64, 64), 3e38, mx.bfloat16)
    target, _ = load_target(write(tmp_path / "large", weights, read(source / "config.json")))
    materialize(target, "target", tmp_path / "large")

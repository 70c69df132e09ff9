"""Vision and audio tensors: their names, their layouts, and the test checkpoints that hold them."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import mlx.core as mx
import pytest
from support import GOLDENS, KINDS, relative_error
from tower_checkpoints import TOWERS, golden_config, tower_shapes, write_target

from mlx_mtp.checkpoint.loader import load_target
from mlx_mtp.checkpoint.weights import strip_prefix, tower_name, written_name
from mlx_mtp.convert.towers import to_mlx_layout

CONV2D = "model.audio_tower.subsample_conv_projection.layer{}.conv.weight"
CONV1D = "model.audio_tower.layers.3.lconv1d.depthwise_conv1d.weight"


@pytest.mark.parametrize(("name", "expected"), [
    ("model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight",
     "vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight"),
    ("vision_tower.std_bias", "vision_tower.std_bias"),
    ("model.vision_embedder.patch_ln1.bias", "vision_embedder.patch_ln1.bias"),
    ("model.embed_vision.embedding_projection.weight", "embed_vision.embedding_projection.weight"),
    ("embed_audio.embedding_projection.scales", "embed_audio.embedding_projection.scales"),
    ("model.audio_tower.layers.0.lconv1d.linear_end.input_max", "audio_tower.layers.0.lconv1d.linear_end.input_max"),
    ("model.language_model.layers.0.mlp.up_proj.weight", None),
    ("language_model.model.embed_tokens.weight", None),
    ("lm_head.weight", None),
])
def test_a_tower_tensor_loses_its_leading_model_and_text_tensors_are_none(name: str, expected: str | None) -> None:
    assert tower_name(name) == expected


@pytest.mark.parametrize("module", ["pre_projection", "masked_embedding.centroids", "layers.0.mlp.up_proj"])
def test_a_module_is_called_what_its_tensors_are_called_up_to_the_last_dot(module: str) -> None:
    written = written_name(module, "drafter")
    assert written_name(f"{module}.scales", "drafter") == f"{written}.scales"
    assert strip_prefix(written, "drafter") == module


@pytest.mark.parametrize(("name", "hugging_face", "mlx_shape"), [
    (CONV2D.format(0), (128, 1, 3, 3), (128, 3, 3, 1)),
    (CONV2D.format(1), (32, 128, 3, 3), (32, 3, 3, 128)),
    (CONV1D, (64, 1, 5), (64, 5, 1)),
])
def test_convolutions_get_their_channels_last_once(
    name: str, hugging_face: tuple[int, ...], mlx_shape: tuple[int, ...]
) -> None:
    array = mx.random.normal(hugging_face)
    moved = to_mlx_layout(name, array)
    assert moved.shape == mlx_shape
    assert mx.array_equal(mx.moveaxis(moved, -1, 1), array)
    assert mx.array_equal(to_mlx_layout(name, moved), moved)


def test_all_other_tower_tensors_keep_their_layout() -> None:
    for name in ("vision_tower.patch_embedder.position_embedding_table", "vision_embedder.pos_embedding"):
        assert to_mlx_layout(name, mx.zeros((4, 2, 32))).shape == (4, 2, 32)
    assert to_mlx_layout("audio_tower.layers.0.feed_forward1.ffw_layer_1.input_max", mx.array(3.0)).shape == ()


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_part_of_a_checkpoint_with_towers_is_the_golden_one(kind: str, tmp_path: Path) -> None:
    target, left_out = load_target(write_target(kind, tmp_path / kind), mx.float32)
    plain, _ = load_target(GOLDENS / kind / "target", mx.float32)
    assert left_out["vision"] + left_out["audio"] == len(tower_shapes(kind))
    assert relative_error(target.embed(mx.array([7])), plain.embed(mx.array([7]))) == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_towers_are_named_and_shaped_as_transformers_saves_them(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed")
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(GOLDENS))
    checkpoints = pytest.importorskip("golden_checkpoints")
    golden_kind = next(each for each in checkpoints.KINDS if each.name == kind)
    config = checkpoints.config_class(golden_kind, "target").from_dict(golden_config(kind, "target") | TOWERS[kind])
    checkpoints.target_class(golden_kind)._from_config(config).save_pretrained(tmp_path)
    saved = mx.load(str(tmp_path / "model.safetensors"))
    assert isinstance(saved, dict)
    assert {name: array.shape for name, array in saved.items() if tower_name(name)} == tower_shapes(kind)

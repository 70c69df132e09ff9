"""What the converter writes is what was in the source: bit for bit where it copies, mx.quantize's where it does not.

Chunks are made tiny here, so that every tensor is written in many pieces.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from convert_support import TOKENS, convert, is_equal, our_logits, read_json, source_pair, tensors
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from support import GOLDENS, KINDS, relative_error

from mlx_mtp.checkpoint.loader import load_drafter, load_target
from mlx_mtp.checkpoint.weights import written_name
from mlx_mtp.convert import convert as convert_from_python
from mlx_mtp.convert import shards, stream
from mlx_mtp.convert.safetensors import HalfTensor, read_header
from mlx_mtp.errors import CheckpointError

MODES = {
    "4-bit": ["-q"], "8-bit": ["-q", "--q-bits=8", "--q-group-size=32"], "mxfp4": ["-q", "--q-mode=mxfp4"],
    "nvfp4": ["-q", "--q-mode=nvfp4"], "5-bit uniform": ["-q", "--q-bits=5", "--recipe=uniform"],
}


@pytest.fixture(autouse=True)
def tiny_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CHUNK_BYTES", 1500)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_conversion_has_the_sources_very_numbers(kind: str, tmp_path: Path) -> None:
    assert convert(source_pair(kind, tmp_path), tmp_path / "out") == 0
    for part, output in (("target", "out"), ("assistant", "out-assistant")):
        before = dict(tree_flatten((load_target(GOLDENS / kind / part)[0] if part == "target"
                                    else load_drafter(GOLDENS / kind / part)).parameters()))
        after = tensors(tmp_path / output)
        names = {written_name(path, "target" if part == "target" else "drafter"): path for path in before}
        assert after.keys() == names.keys()
        assert all(is_equal(array, before[names[name]]) for name, array in after.items())
    assert is_equal(our_logits(tmp_path / "out"), our_logits(GOLDENS / kind / "target"))


@pytest.mark.parametrize(("kind", "mode"), [
    ("dense", "8-bit"), ("unified", "4-bit"), ("edge", "mxfp4"), ("edge", "4-bit"),
    *(("mixture", mode) for mode in MODES),
])
def test_quantized_modules_are_bit_for_bit_what_mlx_makes_of_the_whole_tensors(
    kind: str, mode: str, tmp_path: Path
) -> None:
    assert convert(source_pair(kind, tmp_path), tmp_path / "out", *MODES[mode]) == 0
    checked = 0
    for part, output in (("target", "out"), ("assistant", "out-assistant")):
        folder = tmp_path / output
        source = dict(tree_flatten((load_target(GOLDENS / kind / part)[0] if part == "target"
                                    else load_drafter(GOLDENS / kind / part)).parameters()))
        whose = {written_name(path, "target" if part == "target" else "drafter"): array
                 for path, array in source.items()}
        after, quantization = tensors(folder), read_json(folder / "config.json")["quantization"]
        for name, array in after.items():
            module, _, leaf = name.rpartition(".")
            if f"{module}.scales" not in after:
                assert is_equal(array, whose[name]), name
            elif leaf == "weight":
                settings = quantization.get(module, quantization)
                made = mx.quantize(whose[name], settings["group_size"], settings["bits"], settings["mode"])
                leaves = ("weight", "scales", "biases")[: len(made)]
                assert all(is_equal(after[f"{module}.{leaf}"], one) for leaf, one in zip(leaves, made, strict=True))
                assert (f"{module}.biases" in after) == (len(made) == 3)
                checked += 1
    assert checked > 20


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", [[], MODES["4-bit"], MODES["8-bit"], MODES["mxfp4"]], ids=["bf16", "4", "8", "mx"])
def test_mlx_lm_loads_it_and_computes_the_same_logits(kind: str, flags: list[str], tmp_path: Path) -> None:
    source = source_pair(kind, tmp_path)
    assert convert(source, tmp_path / "out", "--no-draft", *flags) == 0
    model, _ = load_model(tmp_path / "out")
    model.set_dtype(mx.float32)
    assert relative_error(our_logits(tmp_path / "out"), model(mx.array([TOKENS]))[0]) <= 1e-5


@pytest.mark.parametrize("kind", ["mixture", "edge"])
def test_what_mlx_lm_quantized_is_copied_with_its_settings_and_can_be_dequantized(kind: str, tmp_path: Path) -> None:
    plain = source_pair(kind, tmp_path)
    assert convert(plain, tmp_path / "plain", "--no-draft") == 0
    model, config = quantize_model(*load_model(tmp_path / "plain"), 32, 4, "affine")
    theirs = tmp_path / "theirs"
    save_model(theirs, model)
    save_config(config, theirs / "config.json")
    assert convert(theirs, tmp_path / "copied") == 0
    assert all(is_equal(array, tensors(theirs)[name]) for name, array in tensors(tmp_path / "copied").items())
    assert is_equal(our_logits(tmp_path / "copied"), our_logits(theirs))

    assert convert(theirs, tmp_path / "full", "--dequantize", "--dtype=float32") == 0
    assert not [name for name in tensors(tmp_path / "full") if name.endswith(".scales")]
    assert "quantization" not in read_json(tmp_path / "full" / "config.json")
    # Both multiply the same numbers, in another order.
    assert relative_error(our_logits(tmp_path / "full"), our_logits(theirs)) <= 1e-5


@pytest.mark.parametrize("kind", ["dense", "mixture"])
def test_several_shards_hold_what_one_would_and_the_index_says_where(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_pair(kind, tmp_path)
    assert convert(source, tmp_path / "one", "-q") == 0
    monkeypatch.setattr(shards, "SHARD_BYTES", 60_000)
    assert convert(source, tmp_path / "many", "-q") == 0
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    assert [file.name for file in files] == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert all(sum(tensor.nbytes for tensor in read_header(file)) <= 60_000 for file in files)
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(is_equal(one[name], many[name]) for name in one)
    index = read_json(tmp_path / "many" / "model.safetensors.index.json")
    assert index["weight_map"] == {tensor.name: file.name for file in files for tensor in read_header(file)}
    single = read_json(tmp_path / "one" / "model.safetensors.index.json")
    assert set(single["weight_map"].values()) == {"model.safetensors"}
    assert index["metadata"] == single["metadata"]
    assert single["metadata"]["total_size"] == sum(array.nbytes for array in one.values())


@pytest.mark.parametrize("kind", ["mixture", "edge"])
def test_the_index_counts_the_models_parameters_whatever_they_are_packed_in(kind: str, tmp_path: Path) -> None:
    assert convert(source_pair(kind, tmp_path), tmp_path / "out", "-q", "--no-draft") == 0
    target, _ = load_target(GOLDENS / kind / "target")
    numbers = sum(array.size for _, array in tree_flatten(target.parameters()))
    metadata = read_json(tmp_path / "out" / "model.safetensors.index.json")["metadata"]
    assert metadata["total_parameters"] == numbers


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_another_dtype_is_that_of_all_numbers_and_of_what_is_quantized(dtype: str, tmp_path: Path) -> None:
    source = source_pair("dense", tmp_path)
    assert convert(source, tmp_path / "out", "-q", f"--dtype={dtype}") == 0
    after, wanted = tensors(tmp_path / "out"), {"float16": mx.float16, "float32": mx.float32}[dtype]
    assert {array.dtype for array in after.values()} == {wanted, mx.uint32}
    module = "language_model.model.layers.0.mlp.up_proj"
    weight = load_target(source)[0].layers[0].mlp.up_proj.weight.astype(wanted)
    assert is_equal(after[f"{module}.scales"], mx.quantize(weight, 64, 4)[1])
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == dtype


def test_the_conversion_from_python_is_the_commands(tmp_path: Path) -> None:
    source = source_pair("edge", tmp_path)
    assert convert(source, tmp_path / "one", "-q") == 0
    result = convert_from_python(source, mlx_path=str(tmp_path / "two"), quantize=True, verify=False)
    assert result.outputs == {"target": tmp_path / "two", "assistant": tmp_path / "two-assistant"}
    for end in ("", "-assistant"):
        one, two = tensors(tmp_path / f"one{end}"), tensors(tmp_path / f"two{end}")
        assert all(is_equal(one[name], two[name]) for name in one)


def test_token_ids_of_any_integer_type_become_int32(tmp_path: Path) -> None:
    source = source_pair("edge", tmp_path)
    drafter = tmp_path / "edge-assistant"
    weights = tensors(drafter)
    before = weights["masked_embedding.token_ordering"]
    mx.eval(weights)
    weights["masked_embedding.token_ordering"] = before.astype(mx.int64)
    mx.save_safetensors(str(drafter / "model.safetensors"), weights)
    assert convert(source, tmp_path / "out", "-q") == 0
    after = tensors(tmp_path / "out-assistant")["masked_embedding.token_ordering"]
    assert is_equal(after, before.astype(mx.int32))


def test_rows_of_a_half_are_those_of_the_split_tensor_wherever_they_are_cut(tmp_path: Path) -> None:
    whole = mx.random.normal((3, 10, 4)).astype(mx.bfloat16)
    mx.save_safetensors(str(tmp_path / "x.safetensors"), {"x": whole})
    (stored,) = read_header(tmp_path / "x.safetensors")
    for half in (0, 1):
        expected = mx.split(whole, 2, axis=-2)[half].reshape(-1, 4)
        tensor = HalfTensor(stored, half)
        assert (tensor.rows, tensor.shape, tensor.nbytes) == (15, (3, 5, 4), whole.nbytes // 2)
        for start in range(15):
            for stop in range(start, 16):
                assert is_equal(tensor.read(start, stop), expected[start:stop])


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32, mx.int64, mx.uint8, mx.bool_])
def test_every_type_is_read_as_mlx_reads_it(dtype: mx.Dtype, tmp_path: Path) -> None:
    arrays = {"matrix": mx.array(np.arange(60).reshape(3, 4, 5)).astype(dtype), "scalar": mx.array(1).astype(dtype),
              "vector": mx.arange(7).astype(dtype), "empty": mx.zeros((0, 4), dtype)}
    mx.save_safetensors(str(tmp_path / "x.safetensors"), arrays)
    for tensor in read_header(tmp_path / "x.safetensors"):
        assert is_equal(tensor.read().reshape(tensor.shape), arrays[tensor.name])


def test_headers_with_gaps_are_refused(tmp_path: Path) -> None:
    text = json.dumps({"x": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]}}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(CheckpointError, match="does not begin where the header ends"):
        read_header(path)
    path.write_bytes(struct.pack("<Q", len(text)) + text.replace(b"[4, 8]", b"[0, 4]") + bytes(8))
    with pytest.raises(CheckpointError, match="longer than its header says"):
        read_header(path)

"""Bad input, one by one: each ends in one true line and exit code 2, and nothing is written."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from convert_support import (
    change_json,
    complaint,
    convert,
    everything_in,
    read_json,
    save,
    source_pair,
    tensors,
)
from support import GOLDENS

from mlx_mtp.convert import workplace

Q_PROJ = "model.language_model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return source_pair("dense", tmp_path)


def truncate(source: Path) -> None:
    with (source / "model.safetensors").open("rb+") as file:
        file.truncate(400_000)


def rewrite_header(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(source: Path) -> None:
        path = source / "model.safetensors"
        content = path.read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return edit


def lie_about_shape(header: dict[str, Any]) -> None:
    header[Q_PROJ]["shape"][0] *= 2


def lie_about_place(header: dict[str, Any]) -> None:
    header[Q_PROJ]["data_offsets"] = [0, header[Q_PROJ]["data_offsets"][1] - header[Q_PROJ]["data_offsets"][0]]


def claim_more_than_there_is(header: dict[str, Any]) -> None:
    last = max(header, key=lambda name: header[name].get("data_offsets", [0, 0])[1])
    begin, end = header[last]["data_offsets"]
    header[last] = {"dtype": "U8", "shape": [end - begin + 100], "data_offsets": [begin, end + 100]}


def change_type(header: dict[str, Any]) -> None:
    header[Q_PROJ]["dtype"] = "F8_E4M3"


def twice_in_one_file(source: Path) -> None:
    path = source / "model.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    text = content[8 : 8 + length].rstrip()
    entry = json.dumps(json.loads(text)[Q_PROJ])
    text = text[:-1] + f', "{Q_PROJ}": {entry}}}'.encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def twice_in_two_files(source: Path) -> None:
    save(source, {Q_PROJ: tensors(source)[Q_PROJ]}, "other.safetensors")


def twice_though_left_out(source: Path) -> None:
    for name in ("other.safetensors", "another.safetensors"):
        save(source, {"lm_head.weight": mx.zeros((2, 2))}, name)


def twice_under_two_names(source: Path) -> None:
    save(source, {Q_PROJ.replace("model.language_model", "language_model.model"): tensors(source)[Q_PROJ]},
         "other.safetensors")


def index(file_name: str) -> Callable[[Path], None]:
    def edit(source: Path) -> None:
        names = dict.fromkeys(tensors(source), "model.safetensors") | {Q_PROJ: file_name}
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    return edit


def index_of_another(source: Path) -> None:
    save(source, {"lm_head.weight": mx.zeros((2, 2))}, "other.safetensors")
    index("other.safetensors")(source)


def change_tensor(name: str, change: Callable[[mx.array], mx.array | None]) -> Callable[[Path], None]:
    def edit(source: Path) -> None:
        weights = tensors(source)
        changed = change(weights.pop(name))
        mx.eval(weights)
        save(source, weights if changed is None else weights | {name: changed})

    return edit


def with_number(value: float) -> Callable[[mx.array], mx.array]:
    def change(array: mx.array) -> mx.array:
        numbers = np.array(array.astype(mx.float32))
        numbers[-1, -1] = value
        return mx.array(numbers).astype(array.dtype)

    return change


def only_pickles(source: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04.")


BAD_SOURCES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, r"model\.safetensors is truncated: it has 400000 bytes, its header speaks of"),
    "no header": (lambda source: (source / "model.safetensors").write_bytes(b"\xff" * 100), r"not a safetensors file"),
    "empty": (lambda source: (source / "model.safetensors").write_bytes(b""), r"truncated or not a safetensors file"),
    "shape that lies": (rewrite_header(lie_about_shape), rf"tensor {Q_PROJ} of BF16 \[.*\] has \d+ bytes, its"),
    "place that lies": (rewrite_header(lie_about_place), r"header is not right: .*(overlap|gap|does not begin)"),
    "more than there is": (rewrite_header(claim_more_than_there_is), r"is truncated: it has \d+ bytes"),
    "unknown type": (rewrite_header(change_type), r"holds F8_E4M3; expected one of BOOL, U8"),
    "twice in a file": (twice_in_one_file, rf"tensor {Q_PROJ} is there twice"),
    "twice in two files": (twice_in_two_files, rf"tensor {Q_PROJ} is there twice \(also in .*\): delete"),
    "twice though left out": (twice_though_left_out, r"tensor lm_head\.weight is there twice"),
    "under two names": (twice_under_two_names, r"tensor .*layers\.0\.self_attn\.q_proj\.weight is there twice"),
    "index without its shard": (index("gone.safetensors"), r"names gone\.safetensors, which is not there"),
    "index that leads out": (index("../x.safetensors"), r"names the file '\.\./x\.safetensors'; expected"),
    "index of another": (index_of_another, rf"says that tensor {Q_PROJ} is in other\.safetensors, where it is not"),
    "integers": (change_tensor(Q_PROJ, lambda array: array.astype(mx.int32)), r"q_proj\.weight holds int32; expected"),
    "missing": (change_tensor(Q_PROJ, lambda array: None), r"layers\.0\.self_attn\.q_proj\.weight is missing"),
    "misshapen": (change_tensor(Q_PROJ, lambda array: array[1:]), r"q_proj\.weight has shape \(\d+, 64\); expected \("),
    "unexpected": (lambda source: save(source, {"model.extra.weight": mx.zeros(3)}, "other.safetensors"),
                   r"extra\.weight is not part of the model"),
    "NaN": (change_tensor(Q_PROJ, with_number(float("nan"))), rf"tensor {Q_PROJ} holds NaN or infinity: .*--allow-nan"),
    "infinity": (change_tensor(Q_PROJ, with_number(float("inf"))), rf"tensor {Q_PROJ} holds NaN or infinity"),
    "minus infinity": (change_tensor(Q_PROJ, with_number(-float("inf"))), rf"tensor {Q_PROJ} holds NaN or infinity"),
    "architecture": (lambda source: change_json(source / "config.json", model_type="llama"),
                     r"model_type 'llama' is not supported as a target; expected one of gemma4"),
    "quantization of another kind": (lambda source: change_json(source / "config.json", quantization="4bit"),
                                     r"quantization is '4bit'; expected an object"),
    "foreign quantization": (lambda source: change_json(source / "config.json", quantization_config={
        "quant_method": "gptq"}), r"quant_method 'gptq' is not supported"),
    "pickles": (only_pickles, r"(pickle|pytorch_model\.bin)"),
    "no config": (lambda source: (source / "config.json").unlink(), r"has no config\.json"),
}


@pytest.mark.parametrize(("spoil", "pattern"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_a_bad_source_is_one_line_and_nothing_is_written(
    spoil: Callable[[Path], object], pattern: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(source)
    before = everything_in(tmp_path)
    assert re.search(pattern, complaint(capsys, source, tmp_path / "new" / "folder" / "out", "-q"))
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_pass_where_they_are_allowed(value: float, source: Path, tmp_path: Path) -> None:
    change_tensor(Q_PROJ, with_number(value))(source)
    assert convert(source, tmp_path / "out", "--allow-nan") == 0
    written = tensors(tmp_path / "out")["language_model.model.layers.0.self_attn.q_proj.weight"]
    assert mx.array_equal(written, tensors(source)[Q_PROJ], equal_nan=True).item()


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_the_largest_finite_numbers_are_no_infinity(dtype: mx.Dtype, source: Path, tmp_path: Path) -> None:
    largest = {mx.bfloat16: 3.38e38, mx.float16: 65504.0, mx.float32: 3.4e38}[dtype]
    save(source, {name: array.astype(dtype) for name, array in tensors(source).items()})
    change_tensor(Q_PROJ, with_number(-largest))(source)
    assert convert(source, tmp_path / "out") == 0


def test_numbers_beyond_float16_are_refused_there(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_tensor(Q_PROJ, with_number(-70_000.0))(source)
    assert "holds numbers beyond 65504" in complaint(capsys, source, tmp_path / "out", "--dtype=float16")
    assert convert(source, tmp_path / "out") == 0


@pytest.mark.parametrize(("mode", "scale", "flags", "pattern"), [
    ("mxfp4", 0xFF, [], r"q_proj\.scales holds NaN or infinity"),
    ("nvfp4", 0x7F, ["-d"], r"q_proj\.scales holds NaN or infinity"),
    ("affine", 60_000, ["-d", "--dtype=float16"], r"q_proj\.weight holds numbers beyond the largest float16 once"),
])
def test_quantized_numbers_that_are_not_finite_are_refused_too(
    mode: str, scale: int, flags: list[str], pattern: str, source: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    four = tmp_path / "four"
    assert convert(source, four, "-q", f"--q-mode={mode}", "--no-draft") == 0
    name = f"language_model.{Q_PROJ.removeprefix('model.language_').removesuffix('.weight')}.scales"
    change_tensor(name, lambda array: mx.full(array.shape, scale, array.dtype))(four)
    assert re.search(pattern, complaint(capsys, four, tmp_path / "out", *flags))
    assert convert(four, tmp_path / "out", "--allow-nan", *flags) == 0


def test_a_drafter_of_another_family_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(tmp_path / "dense-assistant")
    shutil.copytree(GOLDENS / "edge" / "assistant", tmp_path / "dense-assistant")
    before = everything_in(tmp_path)
    line = complaint(capsys, source, tmp_path / "out")
    assert re.search(r"the drafter .* does not fit the target .*--no-draft\)$", line)
    assert everything_in(tmp_path) == before
    assert convert(source, tmp_path / "out", "--no-draft") == 0


BAD_SETTINGS: dict[str, tuple[list[str], str]] = {
    "bits": (["-q", "--q-bits=7"], r"q_bits is 7; mode affine has 2 or 3 or 4 or 5 or 6 or 8"),
    "bits of a mode": (["-q", "--q-mode=mxfp4", "--q-bits=8"], r"q_bits is 8; mode mxfp4 has 4"),
    "group": (["-q", "--q-group-size=48"], r"q_group_size is 48; mode affine has 32 or 64 or 128"),
    "mode": (["-q", "--q-mode=int4"], r"q_mode is 'int4'; expected one of affine, mxfp4, nvfp4, mxfp8"),
    "draft bits": (["-q", "--draft-bits=1"], r"draft_bits is 1; expected one of 2, 3, 4, 5, 6, 8"),
    "bits without -q": (["--q-bits=4"], r"add -q"),
    "both ways": (["-q", "-d"], r"quantize and dequantize were both asked for"),
    "type": (["--dtype=int8"], r"dtype is 'int8'; expected one of float16, bfloat16, float32"),
    "nothing to dequantize": (["-d"], r"is not quantized; expected a checkpoint in mlx's own quantization"),
    "no such drafter": (["--draft=nowhere"], r"no folder nowhere"),
    "revision of a folder": (["--revision=main"], r"only the Hub's repositories have revisions"),
}


@pytest.mark.parametrize(("flags", "pattern"), BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_a_bad_setting_is_one_line_and_nothing_is_written(
    flags: list[str], pattern: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything_in(tmp_path)
    assert re.search(pattern, complaint(capsys, source, tmp_path / "out", *flags))
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("flag", ["--recipe=best", "--q-bits=four", "--nonsense"])
def test_a_flag_that_argparse_refuses_is_one_line_too(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        convert(tmp_path, tmp_path / "out", flag)
    assert stopped.value.code == 2
    assert re.fullmatch(r"error: .*; see --help\n", capsys.readouterr().err)


def test_quantizing_what_is_quantized_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source, tmp_path / "four", "-q", "--no-draft") == 0
    before = everything_in(tmp_path)
    assert "is quantized already" in complaint(capsys, tmp_path / "four", tmp_path / "out", "-q")
    assert everything_in(tmp_path) == before


def test_a_demanded_drafter_must_be_there(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(tmp_path / "dense-assistant")
    assert "no drafter of" in complaint(capsys, source, tmp_path / "out", "--draft")
    assert convert(source, tmp_path / "out") == 0
    assert "note: no drafter" in capsys.readouterr().err


def test_output_that_is_there_is_replaced_only_with_force(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert(source, tmp_path / "out") == 0
    before = everything_in(tmp_path)
    assert "out is there already" in complaint(capsys, source, tmp_path / "out", "-q")
    shutil.rmtree(tmp_path / "out")
    assert "out-assistant is there already" in complaint(capsys, source, tmp_path / "out", "-q")
    shutil.copytree(source, tmp_path / "out")
    assert convert(source, tmp_path / "out", "-q", "--force") == 0
    assert "quantization" in read_json(tmp_path / "out" / "config.json")
    assert "quantization" in read_json(tmp_path / "out-assistant" / "config.json")
    assert everything_in(tmp_path).keys() == before.keys()


def project_with_a_config(path: Path) -> None:
    path.mkdir()
    for name in ("config.json", "precious.py"):
        (path / name).write_text("{}")


@pytest.mark.parametrize("make", [
    lambda path: path.write_text("a file"), lambda path: (path / "photos").mkdir(parents=True),
    lambda path: path.symlink_to(path.parent), project_with_a_config,
])
def test_force_replaces_checkpoints_only(
    make: Callable[[Path], object], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "out")
    before = sorted(os.listdir(tmp_path))
    assert "--force replaces checkpoints only" in complaint(capsys, source, tmp_path / "out", "--force")
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("where", ["dense", "dense/out", "dense/../dense", "."])
def test_output_and_source_must_not_overlap(
    where: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_json(source / "config.json")
    for name in ("config.json", "model.safetensors"):  # so that --force takes the folder around it for a checkpoint
        (tmp_path / name).write_text("{}")
    before = everything_in(tmp_path)
    assert re.search(r"overlap", complaint(capsys, source, tmp_path / where, "--force"))
    assert everything_in(tmp_path) == before


def test_the_source_spelt_otherwise_is_the_source_where_case_does_not_count(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = source.with_name(source.name.upper())  # as a Mac's file system would find the source by this name too
    assert other.exists() or shutil.copytree(source, other)
    monkeypatch.setattr(Path, "samefile", lambda path, other: str(path).lower() == str(other).lower())
    before = everything_in(tmp_path)
    assert "overlap" in complaint(capsys, source, other, "--force")
    assert everything_in(tmp_path) == before


def test_a_place_that_cannot_be_written_is_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    before = everything_in(tmp_path)
    assert "cannot be written" in complaint(capsys, source, tmp_path / "file" / "out")
    assert "cannot be written" in complaint(capsys, source, Path("/proc/out"))
    assert everything_in(tmp_path) == before


def test_a_mounted_disk_is_not_replaced_and_that_is_known_before_anything_is_converted(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "disk").mkdir()
    before = everything_in(tmp_path)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "disk")
    assert "is where a disk is mounted" in complaint(capsys, source, tmp_path / "disk", "--force")
    assert everything_in(tmp_path) == before
    assert convert(source, tmp_path / "disk" / "out") == 0


LONG = "x" * 300


@pytest.mark.parametrize(("source_name", "output_name", "pattern"), [
    ("dense", LONG, r"the file system refuses \(File name too long: .*\): check"),
    (LONG, "out", r"no folder .*x, and it is not a Hub name"),
    ("~nobody-here/x/y", "out", r"no folder ~nobody-here/x/y, and it is not a Hub name"),
    ("dense", "~nobody-here/x", r"is in the home of a user whom this computer does not know"),
])
def test_a_name_that_the_system_does_not_take_is_one_line(
    source_name: str, output_name: str, pattern: str, source: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = everything_in(tmp_path)
    assert re.search(pattern, complaint(capsys, Path(source_name), Path(output_name)))
    assert everything_in(tmp_path) == before


def test_a_file_that_cannot_be_copied_is_named(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything_in(tmp_path)

    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(workplace.shutil, "copyfile", refuse)
    assert re.search(r"Permission denied: .*generation_config\.json\)", complaint(capsys, source, tmp_path / "out"))
    assert everything_in(tmp_path) == before


def test_too_little_free_space_is_known_before_anything_is_converted(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything_in(tmp_path)
    monkeypatch.setattr(workplace.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    assert re.search(r"has 0\.0 MB free, and 2\.0 MB will be written", complaint(capsys, source, tmp_path / "out"))
    assert everything_in(tmp_path) == before

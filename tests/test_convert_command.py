"""The command: what it writes beside the weights, what it says, and that its flags are ConvertConfig's fields."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from convert_support import complaint, convert, everything_in, read_json, source_pair, tensors
from rich.console import Console

from mlx_mtp.checkpoint.loader import load_drafter
from mlx_mtp.convert import convert as convert_from_python
from mlx_mtp.convert import progress, run
from mlx_mtp.convert.__main__ import parser
from mlx_mtp.convert.settings import ConvertConfig
from mlx_mtp.errors import RequestError


def test_every_setting_has_its_flag_and_every_flag_its_setting() -> None:
    parsed = vars(parser().parse_args(["--hf-path", "x"]))
    assert ConvertConfig(**parsed) == ConvertConfig("x")
    assert parsed.keys() == {field.name for field in fields(ConvertConfig)}


@pytest.mark.parametrize(("flags", "expected"), [
    (["-q", "--q-bits", "8", "--recipe=uniform"], {"quantize": True, "q_bits": 8, "recipe": "uniform"}),
    (["--model", "y", "-d"], {"hf_path": "y", "dequantize": True}),
    (["--no-draft", "--no-verify"], {"draft": False, "verify": False}), (["--draft"], {"draft": True}),
    (["--draft", "z", "--draft-bits=8", "--dtype=float16"], {"draft": "z", "draft_bits": 8, "dtype": "float16"}),
    (["--keep-towers", "--allow-nan", "--force", "--mlx-path=a b"],
     {"keep_towers": True, "allow_nan": True, "force": True, "mlx_path": "a b"}),
])
def test_the_command_in_the_card_asks_for_the_same_again(flags: list[str], expected: dict[str, object]) -> None:
    settings = ConvertConfig(**vars(parser().parse_args(["--hf-path", "x", *flags])))
    assert settings == ConvertConfig(**({"hf_path": "x"} | expected))  # type: ignore[arg-type]
    again = shlex.split(settings.command)
    assert again[:3] == ["python", "-m", "mlx_mtp.convert"]
    assert ConvertConfig(**vars(parser().parse_args(again[3:]))) == settings


def test_a_verified_pair_has_a_report_a_card_and_what_else_a_model_needs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = source_pair("edge", tmp_path)
    for name in ("processor_config.json", "chat_template.jinja", "conversion.json", "notes.txt"):
        (source / name).write_text("{}")
    (source / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": dict.fromkeys(tensors(source), "model.safetensors")}))
    assert convert(source, tmp_path / "out", "-q", verify=True) == 0
    said = capsys.readouterr()
    assert "per-layer embedding" in said.out
    assert "bits a weight" in said.out
    assert said.err == ""
    written = {"config.json", "model.safetensors", "model.safetensors.index.json", "conversion.json", "README.md",
               "generation_config.json"}
    assert everything_in(tmp_path / "out-assistant").keys() == written
    assert everything_in(tmp_path / "out").keys() == written | {"processor_config.json", "chat_template.jinja"}
    for folder in (tmp_path / "out", tmp_path / "out-assistant"):
        assert "python -m mlx_mtp.convert --hf-path" in (folder / "README.md").read_text()
        assert read_json(folder / "conversion.json")["output"] == "out"
    names = read_json(tmp_path / "out" / "model.safetensors.index.json")["weight_map"]
    assert names.keys() == tensors(tmp_path / "out").keys()


def test_a_dry_run_says_everything_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = source_pair("edge", tmp_path)
    before = everything_in(tmp_path)
    assert convert(source, tmp_path / "new" / "out", "-q", "--dry-run") == 0
    said = capsys.readouterr().out
    for words in ("target:", "drafter:", "attention", "4 bits in groups of 64", "8 bits in groups of 32",
                  "projections: 8 bits", "left out: 4 tensors", "audio", "total", "model.safetensors: "):
        assert words in said, words
    assert everything_in(tmp_path) == before


def test_an_assistant_is_converted_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source_pair("edge", tmp_path)
    assert convert(tmp_path / "edge-assistant", tmp_path / "out", "-q", "--draft-bits=8", verify=True) == 0
    assert "a drafter alone is not verified" in capsys.readouterr().err
    assert load_drafter(tmp_path / "out").layers[0].mlp.up_proj.bits == 8
    assert not (tmp_path / "out-assistant").exists()


def test_a_drafter_can_be_named(tmp_path: Path) -> None:
    source = source_pair("dense", tmp_path)
    (tmp_path / "dense-assistant").rename(tmp_path / "another")
    assert convert(source, tmp_path / "out", "-q", "--draft", str(tmp_path / "another")) == 0
    assert load_drafter(tmp_path / "out-assistant").config.backbone_hidden_size == 64


def test_a_quantized_drafter_that_comes_along_stays_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = source_pair("dense", tmp_path)
    assert convert(tmp_path / "dense-assistant", tmp_path / "small", "-q") == 0
    capsys.readouterr()
    assert convert(source, tmp_path / "out", "-q", "--draft", str(tmp_path / "small")) == 0
    assert "is quantized already: it stays as it is" in capsys.readouterr().err
    assert everything_in(tmp_path / "out-assistant")["model.safetensors"] == everything_in(
        tmp_path / "small")["model.safetensors"]
    line = complaint(capsys, source, tmp_path / "two", "-q", "--draft", str(tmp_path / "small"), "--draft-bits=8")
    assert "is quantized already" in line


def test_what_verifying_cannot_do_keeps_the_conversion_for_a_run_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_pair("unified", tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise RequestError("cannot")

    monkeypatch.setattr(run, "verify", fail)
    assert convert(source, tmp_path / "out", "-q", verify=True) == 2
    assert "verifying failed: cannot; what was converted is kept" in capsys.readouterr().err
    (shard,) = (tmp_path / ".out.partial" / "target").glob("*.safetensors")
    inode = shard.stat().st_ino
    assert convert(source, tmp_path / "out", "-q") == 0
    assert (tmp_path / "out" / shard.name).stat().st_ino == inode


def test_the_cards_of_an_uploaded_pair_name_its_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads: dict[str, Path] = {}
    monkeypatch.setattr(run, "check_upload", lambda name: None)
    monkeypatch.setattr(run, "upload", lambda folder, name: uploads.setdefault(name, folder))
    assert convert(source_pair("unified", tmp_path), tmp_path / "out", "-q", "--upload-repo=me/gem-4bit") == 0
    assert uploads == {"me/gem-4bit": tmp_path / "out", "me/gem-4bit-assistant": tmp_path / "out-assistant"}
    for folder in uploads.values():
        assert "--model me/gem-4bit --draft-model me/gem-4bit-assistant" in (folder / "README.md").read_text()


def test_a_card_speaks_of_images_only_if_there_were_towers_to_keep(tmp_path: Path) -> None:
    assert convert(source_pair("edge", tmp_path), tmp_path / "text", "--no-draft") == 0
    for source, is_kept in (("edge", True), ("text", False)):
        assert convert(tmp_path / source, tmp_path / f"{source}-out", "--no-draft", "--keep-towers") == 0
        assert ("mlx_vlm" in (tmp_path / f"{source}-out" / "README.md").read_text()) is is_kept


def test_a_drafter_that_an_earlier_conversion_left_is_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = source_pair("unified", tmp_path)
    assert convert(source, tmp_path / "out") == 0
    capsys.readouterr()
    assert convert(source, tmp_path / "out", "-q", "--no-draft", "--force") == 0
    assert "out-assistant is there and stays: it will be taken for the drafter" in capsys.readouterr().err


def test_a_bar_shows_a_name_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda stderr: Console(file=shown, force_terminal=True, width=100))
    with progress.bytes_bar("converting gem[old]/[/new]", 10) as bar:
        bar.advance(10)
    assert "gem[old]/[/new]" in shown.getvalue()


def test_an_unknown_setting_from_python_is_refused() -> None:
    with pytest.raises(RequestError, match="unknown setting 'bits'; expected one of hf_path, mlx_path"):
        convert_from_python("x", bits=4)


def test_help_needs_nothing_heavy_and_the_module_runs() -> None:
    code = ("import sys, mlx_mtp.convert.__main__ as m\n"
            "print([name for name in ('torch', 'transformers', 'mlx_lm', 'huggingface_hub', 'rich') "
            "if name in sys.modules])")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
    run = subprocess.run([sys.executable, "-m", "mlx_mtp.convert", "--hf-path", "/nowhere", "--mlx-path", "/nowhere2"],
                         capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("error: no folder /nowhere")
    assert len(run.stderr.splitlines()) == 1

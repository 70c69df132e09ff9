"""The report of a conversion is readable by people and by programs, and the model card says what a user must know."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from mlx_mtp.convert.model_card import Card, model_card
from mlx_mtp.convert.report import (
    Acceptance,
    ClassErrors,
    DraftingComparison,
    Report,
    TextComparison,
    table,
    versions,
)
from mlx_mtp.errors import CheckpointError

EXPERTS = "language_model.model.layers.29.experts.switch_glu.gate_proj"
REPORT = Report(
    source="gemma-4-26B-A4B-it",
    output="gemma-4-26b-4bit",
    tensors=(
        ClassErrors("target", "experts", 90, 22_837_985_280, 12_846_366_720, {"affine 4 bits, groups of 64": 90},
                    0.0912, 0.1312, EXPERTS),
        ClassErrors("target", "norms and scalars", 365, 700_000, 1_400_000, {"bfloat16": 365}, 0.0, 0.0,
                    "language_model.model.norm"),
        ClassErrors("drafter", "attention", 8, 2**20, 2**19, {"affine 4 bits, groups of 64": 8}, 0.09, 0.1,
                    "model.layers.1.self_attn.q_proj"),
    ),
    text=TextComparison("the bundled sample text", 731, 730, 8.123, 8.456, 0.03125, 0.953, "bfloat16"),
    drafting=DraftingComparison(3, 8, "bundled ones", 64, Acceptance(200, 420, 3), Acceptance(210, 420, 2), 2, 0.625),
    device="Apple M9, MLX on gpu",
    versions={"mlx_mtp": "0.1.0", "mlx": "0.32.4", "mlx-lm": "0.32.2"},
    seconds=123.4,
)
CARD = Card("gemma-4-26b-4bit", "google/gemma-4-26B-A4B-it", Path("nowhere"),
            "python -m mlx_mtp.convert --hf-path google/gemma-4-26B-A4B-it -q")


def with_readme(folder: Path, text: str) -> Card:
    (folder / "README.md").write_text(text)
    return replace(CARD, source_folder=folder)


def test_a_report_goes_to_json_and_comes_back_the_same() -> None:
    assert Report.from_json(REPORT.to_json()) == REPORT
    plain = replace(REPORT, drafting=None)
    assert Report.from_json(plain.to_json()) == plain
    unmeasured = replace(REPORT, drafting=DraftingComparison(3, 8, "x", 64, None, None, note="nothing fits"))
    assert Report.from_json(unmeasured.to_json()) == unmeasured


def test_json_holds_the_derived_figures_too() -> None:
    derived = json.loads(REPORT.to_json())["derived"]
    assert derived["mean_acceptance_length_before"] == pytest.approx(3.1)
    assert derived["mean_acceptance_length_after"] == pytest.approx(3.0)
    assert derived["mean_acceptance_length_kept"] == pytest.approx(3.0 / 3.1)
    assert derived["bits"]["target: experts"] == pytest.approx(4.5)


def test_what_is_no_number_becomes_null_since_json_has_no_nan() -> None:
    damaged = replace(REPORT, text=replace(REPORT.text, kl=math.nan, output_perplexity=math.inf))
    text = damaged.to_json()
    assert "NaN" not in text
    assert "Infinity" not in text
    back = Report.from_json(text)
    assert math.isnan(back.text.kl)
    assert back.text.source_perplexity == REPORT.text.source_perplexity
    assert "nan" in table(back)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"source": 1}', "null"])
def test_what_is_no_report_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"no report of a conversion .*; expected what the converter wrote"):
        Report.from_json(text)


def test_the_table_fits_a_terminal_and_says_everything() -> None:
    lines = table(REPORT).splitlines()
    assert max(map(len, lines)) <= 120
    experts = next(line for line in lines if " experts " in line)
    assert experts.split() == ["target", "experts", "90", "12,846", "4.50", "9.12%", "13.12%",
                               "layers.29.experts.switch_glu.gate_proj"]
    norms = next(line for line in lines if "norms" in line)
    assert norms.endswith("0.00%")  # where nothing moved there is no worst
    text = "\n".join(lines)
    for figure in ("8.123 before, 8.456 after", "0.03125 nats", "95.30% of 730", "3.10 before, 3.00 after: 96.77% kept",
                   "2 of 8 answers; 62.50%", "the bundled sample text; bfloat16", "Apple M9"):
        assert figure in text


def test_the_table_says_what_was_not_measured_and_why() -> None:
    drafting = replace(REPORT.drafting, before=None, same_answers=None, same_beginnings=None,  # type: ignore[type-var]
                       note="nothing measured before: the pair needs 52.0 GB")
    text = table(replace(REPORT, drafting=drafting))
    assert "not measured, 3.00 after" in text
    assert "kept" not in text
    assert "note: nothing measured before: the pair needs 52.0 GB" in text


def test_a_pair_without_rounds_has_the_length_of_plain_decoding() -> None:
    assert Acceptance(0, 0, 0).mean_length == 1.0


def front_matter(text: str) -> list[str]:
    assert text.startswith("---\n")
    return text.split("---\n")[1].splitlines()


def test_the_card_passes_the_licence_through_and_names_source_command_and_versions(tmp_path: Path) -> None:
    card = with_readme(tmp_path, "---\nlicense: gemma\nlicense_link: https://example.org/terms\ntags: [a]\n---\n# Hi\n")
    text = model_card(replace(card, revision="abc123"), REPORT)
    assert {"library_name: mlx", "base_model: google/gemma-4-26B-A4B-it", "license: gemma", "- mlx",
            "license_link: https://example.org/terms", "pipeline_tag: text-generation"} <= set(front_matter(text))
    assert "- a" not in front_matter(text)
    for part in (CARD.command, "revision abc123", "mlx_mtp 0.1.0", "mlx-lm 0.32.2", table(REPORT),
                 'python -m mlx_mtp.generate --model gemma-4-26b-4bit -p "Hello"',
                 "python -m mlx_lm generate --model gemma-4-26b-4bit"):
        assert part in text


def test_the_card_shows_mlx_vlm_only_where_vision_and_audio_were_kept() -> None:
    assert "mlx_vlm" not in model_card(CARD, REPORT)
    kept = model_card(replace(CARD, has_towers=True), REPORT)
    assert "python -m mlx_vlm generate --model gemma-4-26b-4bit --image" in kept
    assert "pipeline_tag: image-text-to-text" in front_matter(kept)


def test_the_card_of_a_pair_runs_it_with_its_drafter() -> None:
    text = model_card(replace(CARD, drafter="gemma-4-26b-4bit-assistant"), REPORT)
    assert "--model gemma-4-26b-4bit --draft-model gemma-4-26b-4bit-assistant" in text
    assert "- speculative-decoding" in front_matter(text)
    drafters = model_card(replace(CARD, name="x-4bit-assistant", is_drafter=True, target="x-4bit"), None)
    assert "--model x-4bit --draft-model x-4bit-assistant" in drafters
    assert "mlx_lm" not in drafters


def test_the_card_of_a_drafter_alone_leaves_its_targets_name_open() -> None:
    card = model_card(replace(CARD, name="x-assistant", is_drafter=True), None)
    assert "--model TARGET --draft-model x-assistant" in card


def test_a_folders_path_is_no_base_model_but_the_sources_own_is(tmp_path: Path) -> None:
    card = replace(with_readme(tmp_path, "---\nbase_model: google/gemma-4-E2B-it\n---\n"), source=str(tmp_path))
    assert "base_model: google/gemma-4-E2B-it" in front_matter(model_card(card, None))
    bare = model_card(replace(CARD, source="/somewhere/else", source_folder=tmp_path / "no"), None)
    assert not any(line.startswith("base_model") for line in front_matter(bare))
    assert "Nothing was measured (`--no-verify`)." in bare
    assert all(f"{name} {number}" in bare for name, number in versions().items())


@pytest.mark.parametrize("yaml", ["license: [gemma", "- a\n- b"])
def test_a_source_readme_that_cannot_be_read_is_said_and_ends_no_conversion(yaml: str, tmp_path: Path) -> None:
    text = model_card(with_readme(tmp_path, f"---\n{yaml}\n---\n"), REPORT)
    assert "The metadata of the source's README.md cannot be read, so its licence is not named above" in text
    assert not any(line.startswith("license") for line in front_matter(text))

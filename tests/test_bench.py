"""The decode bench: texts before speeds, figures that can be trusted, and files that say what they promise."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support import golden_pair

import mlx_mtp
from bench import bandwidth, blas, card, decode, plots, rounds, sweep
from bench.bandwidth import Bandwidth
from bench.measure import Difference, Spread, Tokens, clocked, difference
from bench.prompts import KINDS, RAGGED, RANDOM, prompts
from bench.record import SCHEMA, Agreement, CellResult, Record, RunnerResult, Split, cell_lines
from bench.replay import ReplayDrafter, replayed_drafts
from bench.runners import Drafting, DraftLength, Ours, Prompts, Runner
from bench.sweep import NoPeers, Sweep, SweepConfig
from mlx_mtp import Pair, demo
from mlx_mtp.errors import RequestError

TINY = ["--rows", "1", "2", "--num-draft-tokens", "3", "--prompts", "code", "--max-tokens", "6", "--runs", "1"]


@pytest.fixture(scope="module")
def pair() -> Pair:
    return mlx_mtp.load()


@pytest.fixture(autouse=True, scope="module")
def known_bandwidth() -> Iterator[None]:
    """What takes its time to be measured well is measured once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "measure_bandwidth", lambda dtype: Bandwidth(10.0, 8.0))
        patch.setattr(rounds, "BLOCK", 1)
        patch.setattr(sweep, "LEAST_PAIRS", 1)
        yield


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, known_bandwidth: None) -> tuple[Path, str]:
    """The folder of a small run, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("bench"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        assert decode.main([*TINY, "--output", str(folder)]) == 0
    return folder, "\n".join(printed)


def test_a_small_run_prints_a_line_for_every_decoder_below_the_card(outcome: tuple[Path, str]) -> None:
    _, printed = outcome
    lines = [line.split() for line in printed.splitlines()]
    assert [line[4] for line in lines if line[1:2] == ["code"] and "ours" in line] == ["0", "3", "0", "3"]
    for key in ("machine", "backend", "blas", "packages", "power", "target", "bandwidth", "overhead:"):
        assert any(line[:1] == [key] for line in lines), key


def test_the_json_file_holds_what_its_schema_names(outcome: tuple[Path, str]) -> None:
    record = json.loads((outcome[0] / "decode.json").read_text())
    assert record["schema"] == SCHEMA
    assert record.keys() == names(Record)
    for cell in record["cells"]:
        assert cell.keys() == names(CellResult)
        assert len(cell["prompt_tokens"]) == cell["rows"]
        for split in cell["splits"]:
            assert split.keys() == names(Split)
            assert split["round_ms"] == pytest.approx(split["draft_ms"] + split["verify_ms"] + split["rest_ms"])
        for runner in cell["runners"]:
            assert runner.keys() == names(RunnerResult)
            assert runner["tokens_per_s"].keys() == names(Spread)
            assert runner["difference"] is None
            assert runner["tpot_ms"]["median"] == pytest.approx(1e3 * cell["rows"] / runner["tokens_per_s"]["median"])
    assert [one["num_draft_tokens"] for one in record["agreement"]] == [0, 3]
    assert all(one.keys() == names(Agreement) for one in record["agreement"])


def names(schema: type) -> set[str]:
    assert is_dataclass(schema)
    return {one.name for one in fields(schema)}


def test_the_plots_are_pictures_and_can_be_drawn_again_from_the_file(
    outcome: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = {path.name for path in outcome[0].glob("*.png")}
    assert written == {"speedup.png", "acceptance.png", "round.png"}
    assert plots.main([str(outcome[0] / "decode.json"), "--output", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == written
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in [*outcome[0].glob("*.png"), *tmp_path.glob("*.png")])
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_without_matplotlib_one_line_says_so_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert decode.main(TINY) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: plots need matplotlib")
    assert "mlx-mtp[bench]" in error
    assert error.count("\n") == 1


@pytest.fixture
def broken_drafting(monkeypatch: pytest.MonkeyPatch) -> None:
    """With drafts the third token of each row is another one."""
    original = Ours.steps

    def steps(self: Ours, prompts: Prompts, *arguments: Any) -> Iterator[Tokens]:
        seen = [0] * len(prompts)
        for step in original(self, prompts, *arguments):
            changed = []
            for row, token in step:
                seen[row] += 1
                changed.append((row, token + (self.num_draft_tokens != 0 and seen[row] == 3)))
            yield changed

    monkeypatch.setattr(Ours, "steps", steps)


@pytest.mark.usefixtures("broken_drafting")
def test_a_text_that_drafting_changed_ends_the_bench_with_one_line_and_no_figure(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert decode.main([*TINY, "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "tok/s" not in printed.out
    assert printed.err.startswith("error: drafting changed a text: 1 rows of code, K = 3: row 0 has ")
    assert "at token 2 " in printed.err
    assert "mlx_mtp.check" in printed.err
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("broken_drafting")
def test_where_near_ties_may_flip_a_difference_is_reported_and_not_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sweep, "is_exact", lambda pair: False)
    assert decode.main([*TINY, "--rows", "2", "--no-plots", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "2 rows differ, the first (row 0) at token 2" in printed
    assert "see python -m mlx_mtp.check" in printed
    record = json.loads((tmp_path / "decode.json").read_text())
    assert [runner["difference"] and runner["difference"]["position"] for runner in record["cells"][0]["runners"]] == [
        None, 2]


class FakePeer:
    """Says what plain decoding says, but for row 1 at token 4; or raises."""

    name = "fake"

    def __init__(self, pair: Pair, prompts: Prompts, fails: bool, k: DraftLength = 0) -> None:
        self._plain, self._fails, self.num_draft_tokens = Ours(pair, None, 0, prompts), fails, k

    def steps(self, prompts: Prompts, max_tokens: int) -> Iterator[Tokens]:
        if self._fails:
            raise ValueError("this model\nis not supported")
        for i, step in enumerate(self._plain.steps(prompts, max_tokens)):
            yield [(row, token + (row == 1 and i == 4)) for row, token in step]

    def drafting(self) -> Drafting | None:
        return None


class FakePeers:
    def __init__(self, pair: Pair) -> None:
        self._pair = pair

    def runners(self, num_draft_tokens: Sequence[DraftLength], drafts: np.ndarray | None) -> list[Runner]:
        batch = prompts(self._pair, "code", 2, 0)
        return [FakePeer(self._pair, batch, fails=False), FakePeer(self._pair, batch, fails=True, k=3)]


def test_a_peer_that_says_something_else_or_fails_is_part_of_the_result(pair: Pair) -> None:
    config = SweepConfig(rows=(2,), num_draft_tokens=(0,), prompts=("code",), max_tokens=8, runs=1)
    one = Sweep(pair, config, Bandwidth(10.0, 8.0), FakePeers(pair))
    one.check(lambda text: None)
    cell, = one.measure(lambda text: None)
    ours, other, failed = cell.runners
    expected = clocked(2, 8, Ours(pair, None, 0, prompts(pair, "code", 2, 0)).steps(prompts(pair, "code", 2, 0), 8))
    right = expected.texts[1][4]
    assert other.difference == Difference(rows=1, row=1, position=4, got=right + 1, expected=right)
    assert other.tokens_per_s is not None
    assert ours.speedup == 1
    assert failed.failed == "ValueError: this model is not supported"
    assert failed.tokens_per_s is None
    assert [line[-1] for line in cell_lines(cell)] == [
        "same", "1 rows differ, the first (row 1) at token 4", "did not run: ValueError: this model is not supported"]


def test_a_replay_gives_the_acceptance_that_was_asked_for_and_the_same_text(pair: Pair) -> None:
    config = SweepConfig(rows=(2,), num_draft_tokens=(2,), prompts=(RANDOM,), context=(9,), max_tokens=24, runs=1,
                         acceptance=0.7)
    one = Sweep(pair, config, Bandwidth(10.0, 8.0), NoPeers())
    one.check(lambda text: None)
    cell, = one.measure(lambda text: None)
    drafted = cell.runners[1]
    assert drafted.difference is None
    assert drafted.acceptance_at == pytest.approx(walked(config, [9 + 24] * 2), abs=0.05)
    right = replayed_drafts([list(range(5000))], 0.7, 10_000)[0, :5000] == np.arange(5000)
    assert right.mean() == pytest.approx(0.7, abs=0.03)


def walked(config: SweepConfig, lengths: list[int]) -> list[float]:
    """Acceptance at each position by hand: each round ends at the first draft that the replay has wrong."""
    assert config.acceptance is not None
    texts = [list(range(length)) for length in lengths]
    right = replayed_drafts(texts, config.acceptance, 10_000)[:, : lengths[0]] == np.arange(lengths[0])
    counts = []
    for row in right:
        newest = config.context[0]
        while newest < lengths[0] - 1:
            ahead = [*row[newest + 1 :], False][: config.num_draft_tokens[-1]]
            counts.append(ahead.index(False) if False in ahead else len(ahead))
            newest += counts[-1] + 1
    return [sum(count > i for count in counts) / len(counts) for i in range(max(counts))]


def test_a_replay_stays_with_its_row_when_others_end_before_it(pair: Pair) -> None:
    tokens, batch = 40, prompts(pair, RANDOM, 3, 0)
    plain = Ours(pair, None, 0, batch)
    texts = clocked(3, tokens, plain.steps(batch, tokens)).texts
    known = replayed_drafts([[*prompt, *text] for prompt, text in zip(batch, texts, strict=True)], 1.0, 10_000)
    known[1:, : len(batch[0]) + tokens // 2] = 0  # the first row ends while the others still have nothing right
    assert pair.drafter is not None
    rounds = list(Ours(pair, ReplayDrafter(pair.drafter, known), 3, batch).steps(batch, tokens))
    assert len(rounds) <= tokens // 2 + tokens // 2 / 4 + 5


def test_only_the_time_in_which_all_rows_decode_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 1.0, 2.0, 4.0, 6.0, 9.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    run = clocked(2, 4, [[(0, 5)], [(0, 6), (1, 5)], [(0, 7), (1, 6)], [(0, 8), (1, 7)], [(1, 8)]])
    assert run.ttft == (1.0, 2.0)
    assert run.tokens_per_s == 4 / (6.0 - 2.0)
    assert run.tpot == pytest.approx(2.0)
    assert run.texts == ((5, 6, 7, 8), (5, 6, 7, 8))


def test_the_bench_counts_the_tokens_per_second_that_the_request_itself_counts(pair: Pair) -> None:
    batch = prompts(pair, "code", 1, 0)
    runner, apart = Ours(pair, pair.drafter, 3, batch), []
    for _ in range(4):
        run = clocked(1, 24, runner.steps(batch, 24))
        assert run.tokens_per_s is not None
        apart.append(abs(run.tokens_per_s / runner.stats[0].generation_tps - 1))
    assert min(apart) < 0.03


@pytest.mark.parametrize(("texts", "expected", "found"), [
    ([[1, 2], [3, 4]], [[1, 2], [3, 4]], None),
    ([[1, 2, 9], [3, 8, 5]], [[1, 2, 3], [3, 4, 5]], Difference(2, 1, 1, 8, 4)),
    ([[1, 2]], [[1, 2, 3]], Difference(1, 0, 2, None, 3)),
])
def test_the_first_difference_is_found(
    texts: list[list[int]], expected: list[list[int]], found: Difference | None
) -> None:
    assert difference(texts, expected) == found


def test_prompts_are_filled_to_a_context_and_come_by_growing_length(pair: Pair) -> None:
    for kind in KINDS:
        lengths = [len(prompt) for prompt in prompts(pair, kind, 8, 0)]
        assert lengths == sorted(lengths)
        assert all(abs(len(prompt) - 120) <= 4 for prompt in prompts(pair, kind, 8, 120))
    assert [len(prompt) for prompt in prompts(pair, RAGGED, 3, 100)] == [8, 54, 100]
    with pytest.raises(RequestError, match="a context of 10 tokens was asked for"):
        prompts(pair, "code", 1, 10)


@pytest.mark.parametrize(("changes", "complaint"), [
    ({"prompts": ("poems",)}, "no prompts of the kind 'poems'"),
    ({"rows": ()}, "rows is empty"),
    ({"acceptance": 2.0}, "acceptance is 2.0; expected a share"),
    ({"num_draft_tokens": (99,)}, "num_draft_tokens is 99"),
])
def test_impossible_sweeps_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        SweepConfig(**changes)


def test_quick_is_overridden_by_other_flags_and_plain_decoding_is_always_there() -> None:
    args = decode.parser().parse_args(["--quick", "--rows", "2", "--num-draft-tokens", "5", "auto"])
    config = decode.sweep_config(args)
    assert (config.rows, config.num_draft_tokens, config.prompts) == ((2,), (0, 5, "auto"), decode.QUICK.prompts)


def test_the_bytes_of_a_round_are_those_of_the_weights_it_reads() -> None:
    target, drafter = golden_pair("mixture")
    experts = target.config.text.experts
    assert experts is not None
    total = sum(array.nbytes for _, array in bandwidth._parameters(target))
    of_experts = sum(array.nbytes for path, array in bandwidth._parameters(target) if ".switch_glu." in path)
    share = experts.top_k / experts.num_experts
    assert bandwidth.target_bytes(target, 1) == pytest.approx(total - of_experts * (1 - share))
    assert bandwidth.target_bytes(target, 10_000) == pytest.approx(total)
    assert bandwidth.drafter_bytes(drafter, 1) <= sum(array.nbytes for _, array in bandwidth._parameters(drafter))
    found = bandwidth.measure_bandwidth(mx.float32, 2**20)
    assert found.best == max(found.copy, found.matvec) > 0


def test_the_card_names_machine_backend_versions_power_and_checkpoint(pair: Pair, tmp_path: Path) -> None:
    found = card.environment_card() | card.checkpoint_card(pair, demo.TARGET, demo.TARGET.with_name("edge-assistant"))
    assert found.keys() == {"machine", "system", "backend", "blas", "python", "packages", "power", "target",
                            "target numbers", "drafter", "drafter numbers"}
    assert "2.13 M parameters" in found["target numbers"]
    assert "float32, unquantized" in found["target numbers"]
    assert card.power_source(tmp_path) == "unknown"
    for name, online in (("BAT0", None), ("AC", "1\n")):
        (tmp_path / name).mkdir()
        if online:
            (tmp_path / name / "online").write_text(online)
    if blas.platform.system() == "Linux":
        assert card.power_source(tmp_path) == "mains"


def test_another_checkpoint_has_another_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    found = set()
    for content in (b"a" * 100, b"a" * 99 + b"b", b"a" * 101):
        weights.write_bytes(content)
        found.add(card.fingerprint(tmp_path))
    assert len(found) == 3


def test_the_bench_starts_itself_again_with_openblas_at_most_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blas, "is_openblas", lambda: False)
    monkeypatch.setattr(blas, "products_use_blas", lambda: True)
    library = tmp_path / "libblas.so.3"
    assert blas.find_openblas([f"{tmp_path}/*.so.3"]) is None
    library.touch()
    assert blas.find_openblas([f"{tmp_path}/*.so.3"]) == library
    environment = blas.restart_environment({"LD_PRELOAD": "other.so"}, library)
    assert environment == {
        "LD_PRELOAD": f"{library} other.so", blas.CHOICE: "openblas", blas.TIMEOUT: blas.SHORT_TIMEOUT}
    assert blas.restart_environment(environment, library) is None
    assert blas.restart_environment({blas.CHOICE: "reference"}, library) is None
    assert blas.restart_environment({}, None) is None


def test_an_openblas_older_than_the_processor_is_told_which_kernels_to_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = "flags\t\t: fpu sse3 avx2 avx512f avx512vl"
    assert blas.better_core("Prescott", features) == "SkylakeX"
    assert blas.better_core("Prescott", "flags : avx2") == "Haswell"
    assert blas.better_core("Prescott", "flags : sse3") is None
    assert blas.better_core("Zen", features) is None

    monkeypatch.setattr(blas, "is_openblas", lambda: False)
    monkeypatch.setattr(blas, "products_use_blas", lambda: True)
    monkeypatch.setattr(blas, "core", lambda library: "Prescott")
    monkeypatch.setattr(blas, "_features", lambda: features)
    started = blas.restart_environment({}, tmp_path)
    assert started is not None
    assert started[blas.CORE] == "SkylakeX"
    started = blas.restart_environment({blas.CORE: "Haswell"}, tmp_path)
    assert started is not None
    assert started[blas.CORE] == "Haswell"  # the user's word stands

    monkeypatch.setattr(blas, "is_openblas", lambda: True)  # preloaded by hand
    preloaded = {"LD_PRELOAD": "libblas.so.3"}
    settings = {blas.CORE: "SkylakeX", blas.TIMEOUT: blas.SHORT_TIMEOUT}
    assert blas.restart_environment(preloaded, tmp_path) == {**preloaded, **settings, blas.CHOICE: "openblas"}
    by_hand = {**preloaded, blas.CORE: "Prescott", blas.TIMEOUT: "26"}
    assert blas.restart_environment(by_hand, tmp_path) is None


def test_a_library_that_is_not_openblas_has_no_core_to_tell(tmp_path: Path) -> None:
    library = tmp_path / "libblas.so.3"
    library.write_bytes(b"no library")
    assert blas.core(library) == "an unknown processor"

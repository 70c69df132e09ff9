"""The command: its verdict, its report, its exit codes, and one line for what is wrong with the input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import check_plants
import pytest
from rich.console import Console

import mlx_mtp
from mlx_mtp import RequestError, api
from mlx_mtp.check import loading
from mlx_mtp.check.__main__ import main, parser
from mlx_mtp.check.report import Report
from mlx_mtp.check.settings import QUICK, CheckConfig

SMALL = ["--rows", "2", "--num-draft-tokens", "2", "--max-tokens", "8"]
PROMPTS = '{"prompt": "Explain `operator.lt`.", "id": "lt"}\n{"prompt": "Explain `os.path`.", "temperature": 0.9}\n'


@pytest.fixture(scope="module")
def pair() -> api.Pair:
    return mlx_mtp.load()


@pytest.fixture
def loaded(pair: api.Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads the pair once for all tests."""

    def load(model: object, draft_model: object, *, calibrate: bool, before_reading: Any, **_: object) -> api.Pair:
        assert not calibrate  # what rounds took in earlier runs must not decide what this one does
        given = replace(pair, drafter=None) if draft_model == api.NO_DRAFTER else pair
        before_reading(given)
        return given

    monkeypatch.setattr(api, "load", load)


@pytest.fixture
def prompts_file(tmp_path: Path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text(PROMPTS)
    return str(path)


def test_a_healthy_pair_exits_with_0_and_writes_its_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real loading, bundled prompts, and a report as the docstring describes it."""
    output = tmp_path / "report.json"
    assert main(["--rows", "4", "--num-draft-tokens", "0", "auto", "-m", "8", "--output", str(output)]) == 0
    shown = capsys.readouterr()
    assert "The promise holds over" in shown.out
    assert "built-in demonstration pair" in shown.err
    report = json.loads(output.read_text())
    assert list(report) == ["verdict", "reason", "environment", "settings", "totals", "cells", "margins", "near_ties",
                            "violations", "notes"]
    assert report["verdict"] == "holds"
    assert report["environment"].keys() == {"device", "versions", "checkpoint", "dtype", "drafter"}
    assert report["settings"] == {"rows": [4], "num_draft_tokens": [0, "auto"], "max_tokens": 8,
                                  "temperatures": [0.0, 1.0], "tolerance": 1e-4}
    assert [(cell["rows"], cell["num_draft_tokens"]) for cell in report["cells"]] == [(4, 0), (4, "auto")]
    totals = report["totals"]
    assert totals["texts"] == totals["plain_texts"] == 2 * totals["replays"] == 32
    assert totals["tokens"] == sum(cell["tokens"] for cell in report["cells"]) > 200
    assert totals["rejected"] > 0
    assert report["margins"][-1]["up_to"] is None
    assert sum(row["decided"] for row in report["margins"]) == totals["replayed_tokens"]
    assert sum(row["flipped"] for row in report["margins"]) == 0


def test_a_broken_promise_exits_with_1_and_says_where(
    loaded: None, prompts_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check_plants.noise_is_keyed_by_the_wrong_position(monkeypatch)
    output = tmp_path / "report.json"
    assert main(["--prompts-file", prompts_file, "--rows", "1", "--num-draft-tokens", "0", "3", "-m", "12",
                 "--output", str(output)]) == 1
    verdict = capsys.readouterr().out.strip().splitlines()[-2:]
    assert verdict[0].startswith("The promise is BROKEN in")
    assert "K 3 (K = 0 is not)" in verdict[0]
    assert all(part in verdict[1] for part in ("temperature", "1 row", "token", "expected", "got", "tolerance"))
    report = json.loads(output.read_text())
    assert report["verdict"] == "broken"
    first = report["violations"][0]
    assert first.keys() == {"prompt", "temperature", "seed", "rows", "num_draft_tokens", "index", "position", "got",
                            "expected", "margin"}
    assert first["num_draft_tokens"] == 3
    assert first["temperature"] > 0
    assert first["margin"] > report["settings"]["tolerance"]
    assert f"token {first['index']} of the answer (position {first['position']})" in verdict[1]
    assert sum(row["flipped"] for row in report["margins"]) == report["totals"]["violations"]


@pytest.mark.parametrize(("draft_model", "num_draft_tokens", "code", "says"), [
    ("auto", "0", 1, "nothing was drafted"),
    ("none", "3", 0, "The promise holds over"),
])
def test_a_drafter_that_nothing_was_rejected_of_proves_nothing(
    draft_model: str, num_draft_tokens: str, code: int, says: str, loaded: None, prompts_file: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--prompts-file", prompts_file, "--draft-model", draft_model, "--rows", "2", "-m", "4",
                 "--num-draft-tokens", num_draft_tokens]) == code
    shown = capsys.readouterr()
    assert says in shown.out.splitlines()[-1]
    assert ("there is no drafter" in shown.err) == (draft_model == "none")


def test_a_line_with_settings_of_its_own_is_decoded_with_these_alone(
    loaded: None, prompts_file: str, tmp_path: Path
) -> None:
    output = tmp_path / "report.json"
    main(["--prompts-file", prompts_file, *SMALL, "--temp", "0", "0.5", "0.7", "--output", str(output)])
    assert json.loads(output.read_text())["totals"]["texts"] == 3 + 1


def test_flags_and_quick_change_what_the_dataclass_says() -> None:
    default = parser().parse_args([])
    assert all(value is None for name, value in vars(default).items() if name in CheckConfig.__dataclass_fields__)
    assert CheckConfig() != QUICK
    given = parser().parse_args(["--quick", "--rows", "3", "5", "--num-draft-tokens", "auto", "2", "--temp", "0.3"])
    assert (given.rows, given.num_draft_tokens, given.temperatures) == ([3, 5], ["auto", 2], [0.3])


def test_no_colours_or_boxes_where_there_is_no_terminal(
    loaded: None, prompts_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not Console().is_terminal
    main(["--prompts-file", prompts_file, *SMALL])
    shown = capsys.readouterr()
    assert shown.out.isascii()
    assert "\x1b" not in shown.out + shown.err
    assert all(len(line) <= 120 for line in shown.out.splitlines()[:-1])


@pytest.mark.parametrize(("arguments", "says"), [
    (["--rows", "0"], "rows is 0"),
    (["--rows", "two"], "invalid int value: 'two'"),
    (["--num-draft-tokens", "99"], "num_draft_tokens is 99"),
    (["--num-draft-tokens", "some"], "'some'; expected a whole number or auto"),
    (["--max-tokens", "0"], "max_tokens is 0"),
    (["--temp", "-1"], "temperature is -1"),
    (["--tolerance", "-0.1"], "tolerance is -0.1"),
    (["--tolerance", "nan"], "tolerance is nan"),
    (["--prompts-file", "nowhere.txt"], "nowhere.txt cannot be read"),
    (["--output", "no/such/folder/report.json"], "there is no folder no/such/folder"),
    (["--output", "."], "is a folder"),
    (["--model", "no-such-folder"], "no folder no-such-folder"),
    (["--max-tokens", "100000"], "no prompt of the check fits"),
    (["--nonsense"], "unrecognized arguments: --nonsense"),
])
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(arguments)
    except SystemExit as error:  # argparse's own
        code = error.code
    assert code == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert says in shown.err
    assert shown.err.count("\n") == 1


def test_flags_reach_the_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def load(*_: object, **settings: Any) -> api.Pair:
        given.update(settings)
        raise RequestError("enough")

    monkeypatch.setattr(loading, "load", load)
    assert main(["--draft-bits", "4", "--max-context", "512", "--no-kernels", "--no-calibration"]) == 2
    del given["before_reading"]
    assert given == {"draft_bits": 4, "max_context": 512, "kernels": False, "calibrate": False}


def test_the_report_is_written_though_nobody_reads_the_table(
    loaded: None, prompts_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def show(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(Report, "show", show)
    monkeypatch.setattr("mlx_mtp.command._discard_stdout", lambda: None)
    output = tmp_path / "report.json"
    assert main(["--prompts-file", prompts_file, "--output", str(output), *SMALL]) == 141
    assert json.loads(output.read_text())["verdict"]


def test_the_report_does_not_take_the_place_of_the_prompts(
    loaded: None, prompts_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--prompts-file", prompts_file, "--output", prompts_file]) == 2
    assert "--output is the prompts file itself" in capsys.readouterr().err
    assert Path(prompts_file).read_text() == PROMPTS


@pytest.mark.parametrize(("line", "says"), [
    ('{"prompt": "Hi", "stop": ["."]}', "stop strings"),
    ('{"prompt": "Hi", "tokens": 3}', "has the key 'tokens'"),
    ('{"prompt": "' + "many words " * 3000 + '"}', "the model's context holds"),
])
def test_a_bad_line_of_a_prompts_file_is_named(
    line: str, says: str, loaded: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "Hello"}\n' + line + "\n")
    assert main(["--prompts-file", str(path)]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {path}:2: ")
    assert says in shown
    assert shown.count("\n") == 1

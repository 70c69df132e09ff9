"""What all commands share: streams that are closed or full, what is known to be wrong with --output, the way out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mlx_mtp.command import check_output
from mlx_mtp.errors import RequestError

ROOT = Path(__file__).parent.parent
PRINTS = "import sys; from mlx_mtp.command import guarded; sys.exit(guarded(lambda: print('text') or 0))"
LEFT_OPEN = """
import mlx_mtp
stream = mlx_mtp.stream_generate(mlx_mtp.load(), "def fib(n):", max_tokens=100)
print(next(stream).text)
"""


def shell(line: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a line of the shell; `arguments` are "$1", "$2", ... and "$0" is this Python."""
    return subprocess.run(["sh", "-c", line, sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, check=False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stdout_is_one_line() -> None:
    done = shell('"$0" -c "$1" > /dev/full', PRINTS)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: reading or writing failed: No space left")


@pytest.mark.parametrize(("closed", "out"), [("<&-", "text\n"), (">&-", ""), ("2>&-", "text\n"), ("<&- >&- 2>&-", "")])
def test_a_command_runs_without_a_standard_stream(closed: str, out: str) -> None:
    done = shell(f'"$0" -c "$1" {closed}', PRINTS)
    assert (done.returncode, done.stdout, done.stderr) == (0, out, "")


def test_a_model_loads_where_stdin_is_closed() -> None:
    done = shell('"$0" -m mlx_mtp.generate --prompt Hi --max-tokens 2 --no-calibration --verbose F <&-')
    assert (done.returncode, done.stderr) == (0, "")


def test_a_stream_that_nobody_closed_ends_silently_with_the_interpreter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = shell('"$0" -c "$1"', LEFT_OPEN)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_known_to_be_wrong_with_output_is_said_before_anything_runs(tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("Hi")
    (tmp_path / "link").symlink_to(prompts)
    for path, says in (
        (tmp_path / "nowhere" / "x", "there is no folder"), (tmp_path, "is a folder: expected the name of a file"),
        (prompts, "is the prompts file itself"), (tmp_path / "link", "is the prompts file itself"),
    ):
        with pytest.raises(RequestError, match=says):
            check_output(path, str(prompts))
    check_output(tmp_path / ("x" * 300), "y" * 300)  # whether it can be written is found when that is tried

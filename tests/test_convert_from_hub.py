"""The whole way: the command converts a repository of the Hub by its name, over a connection that breaks."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from fake_hub import COMMIT, ROOT, FakeHub, environment, serving

from mlx_mtp import demo
from mlx_mtp.api import load

COMMAND = (
    "import sys, time\n"
    "from huggingface_hub import constants\n"
    "from mlx_mtp.convert.__main__ import main\n"
    "constants.DOWNLOAD_CHUNK_SIZE = 1000  # the client writes a file in such steps, by default 10 MB\n"
    "time.sleep = lambda seconds: None  # between its attempts\n"
    "sys.exit(main(sys.argv[1:]))\n"
)


def convert(tmp_path: Path, hub: FakeHub, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", COMMAND, *arguments], cwd=ROOT, env=environment(tmp_path, hub),
                          timeout=120, capture_output=True, text=True, check=False)


def test_a_conversion_whose_download_broke_off_goes_on_and_its_folder_loads(tmp_path: Path) -> None:
    output = tmp_path / "out/gem-4bit"
    command = "--hf-path", "me/demo", "--mlx-path", str(output), "-q", "--no-verify"
    drafter = demo.TARGET.with_name(f"{demo.TARGET.name}-assistant")
    with serving(tmp_path / "served") as hub:
        for name, source in {"me/demo": demo.TARGET, "me/demo-assistant": drafter}.items():
            hub.repositories[name] = Path(shutil.copytree(source, tmp_path / "served" / name))
        (hub.repositories["me/demo"] / "README.md").write_text("---\nlicense: apache-2.0\n---\nA card.\n")
        hub.cuts["model.safetensors"] = [1_000_000, *[0] * 5]
        broken = convert(tmp_path, hub, *command)
        assert broken.returncode == 2
        assert broken.stderr.startswith("error: downloading me/demo from the Hub failed: ")
        assert broken.stderr.count("\n") == 1
        assert not output.parent.exists()

        hub.ranges.clear()
        hub.cuts.clear()
        done = convert(tmp_path, hub, *command)
    assert (done.returncode, done.stderr) == (0, "")
    assert hub.ranges == [("model.safetensors", "bytes=1000000-"), ("model.safetensors", None)]
    assert COMMIT in (output / "README.md").read_text()
    assert "license: apache-2.0" in (output / "README.md").read_text()
    assert json.loads((output / "config.json").read_text())["quantization"]["bits"] == 4
    pair = load(output)
    assert pair.drafter is not None


def test_a_missing_or_gated_repository_and_no_network_are_one_line_each(tmp_path: Path) -> None:
    command = "--mlx-path", str(tmp_path / "out/gem"), "-q"
    with serving(tmp_path / "served") as hub:
        hub.refusals = {"me/gated": (403, "GatedRepo"), "me/closed": (401, "GatedRepo")}
        answers = {name: convert(tmp_path, hub, "--hf-path", name, *command)
                   for name in ("me/nothing", "me/gated", "me/closed")}
    answers["me/far"] = convert(tmp_path, hub, "--hf-path", "me/far", *command)  # nobody listens any more
    for (name, answer), expected in zip(
        answers.items(), ("no such repository", "gated", "gated", "cannot be reached"), strict=True
    ):
        assert (answer.returncode, answer.stdout) == (2, ""), name
        assert answer.stderr.startswith("error: "), name
        assert expected in answer.stderr, name
        assert answer.stderr.count("\n") == 1, name
    assert not (tmp_path / "out").exists()

"""The user's calibration file: entries come back, and whatever is wrong with the file costs one warning."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from mlx_mtp.calibration import CalibrationFile, default_path, machine


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "calibration.json"


def test_entries_come_back_from_a_file_that_did_not_exist(path: Path) -> None:
    file = CalibrationFile(path)
    assert file.read("a key") is None
    file.write("a key", {"seconds": {"4": 0.5}})
    file.write("another", {"answer": 42})
    file.write("another", {"answer": 43})
    assert CalibrationFile(path).read("a key") == {"seconds": {"4": 0.5}}
    assert CalibrationFile(path).read("another") == {"answer": 43}
    assert [found.name for found in path.parent.iterdir()] == ["calibration.json"]  # no half-written file stays


@pytest.mark.parametrize("content", [b"{ not json", b"[1, 2]", b"\xff\xfe\x00", b"", b"[" * 10**5])
def test_a_corrupt_file_costs_one_warning_and_is_replaced(
    path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    file = CalibrationFile(path)
    assert file.read("a key") is None
    assert file.read("a key") is None
    file.write("a key", {"answer": 42})
    assert len(caplog.records) == 1
    assert str(path) in caplog.text
    assert CalibrationFile(path).read("a key") == {"answer": 42}
    json.loads(path.read_text())


def test_an_entry_that_is_no_object_is_no_entry(path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"a key": 3}')
    assert CalibrationFile(path).read("a key") is None


def test_a_folder_that_cannot_be_made_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "in the way").write_text("a file where the folder should be")
    file = CalibrationFile(tmp_path / "in the way" / "calibration.json")
    for _ in range(2):
        assert file.read("a key") is None
        file.write("a key", {"answer": 42})
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_file_that_cannot_be_replaced_costs_one_warning(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.mkdir(parents=True)  # not even root can put a file in place of a folder
    file = CalibrationFile(path)
    file.write("a key", {"answer": 42})
    assert file.read("a key") is None
    assert len(caplog.records) == 1
    assert list(path.parent.iterdir()) == [path]


def test_the_file_lies_in_the_users_cache_folder_and_keys_name_the_machine() -> None:
    assert default_path().name == "calibration.json"
    assert "mlx_mtp" in default_path().parts
    assert "mlx " in machine()


@pytest.mark.parametrize("name", ["LD_PRELOAD", "OPENBLAS_CORETYPE", "OPENBLAS_NUM_THREADS", "OPENBLAS_THREAD_TIMEOUT"])
def test_a_key_names_the_blas_and_its_settings_on_a_cpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "another one")
    monkeypatch.setattr("mlx_mtp.calibration.is_gpu", lambda: False)
    assert "another one" in machine()
    monkeypatch.setattr("mlx_mtp.calibration.is_gpu", lambda: True)
    assert "another one" not in machine()

from pathlib import Path

import mlx.core as mx
import pytest


@pytest.fixture(autouse=True, scope="session")
def on_cpu() -> None:
    """Exact comparisons are promised in float32 on CPU."""
    mx.set_default_device(mx.cpu)


@pytest.fixture(autouse=True)
def own_user_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests neither read nor write what is kept for the user who runs them."""
    home = tmp_path_factory.getbasetemp() / "user"
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, str(Path(home) / name))

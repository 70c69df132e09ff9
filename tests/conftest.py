import mlx.core as mx
import pytest


@pytest.fixture(autouse=True, scope="session")
def on_cpu() -> None:
    """Exact comparisons are promised in float32 on CPU."""
    mx.set_default_device(mx.cpu)

"""Live against transformers, where it is installed (the `oracle` extra): checkpoints that no golden has seen."""

import sys
import warnings
from pathlib import Path

import mlx.core as mx
import pytest
from support import GOLDENS, KINDS, new_cache, relative_error

from mlx_mtp.checkpoint.loader import load_drafter, load_target
from mlx_mtp.config import FULL, SLIDING, AttentionKind

pytest.importorskip("torch", reason="torch is not installed")
warnings.simplefilter("ignore")  # torch's and transformers' own are not ours to mend
sys.path.insert(0, str(GOLDENS))
golden_checkpoints = pytest.importorskip("golden_checkpoints")
golden_reference = pytest.importorskip("golden_reference")

TOLERANCE = 2e-5
LENGTH = 70


@pytest.fixture(params=[1, 2], ids=lambda seed: f"seed {seed}")
def seed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    for module in (golden_checkpoints, golden_reference):
        monkeypatch.setattr(module, "SEED", request.param)
    return int(request.param)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_a_fresh_random_checkpoint_gives_transformers_logits_and_drafts(name: str, seed: int, tmp_path: Path) -> None:
    kind = next(kind for kind in golden_checkpoints.KINDS if kind.name == name)
    for role in ("target", "assistant"):
        golden_checkpoints.write_checkpoint(kind, role, tmp_path / role)
    reference = golden_reference.load_reference(kind, tmp_path)
    target, _ = load_target(tmp_path / "target", mx.float32)
    drafter = load_drafter(tmp_path / "assistant", mx.float32)

    tokens = golden_reference.random_prompt(kind, "live", LENGTH + 1)
    output = golden_reference.run_target(reference.target, tokens[:LENGTH])
    cache = new_cache(target)
    stage = cache.stage(LENGTH, mx.array([LENGTH]))
    hidden = target(mx.array([tokens[:LENGTH]]), stage)
    cache.commit(mx.array([LENGTH]), LENGTH)
    assert relative_error(target.logits(hidden)[0], mx.array(output.logits[0].numpy())) <= TOLERANCE

    expected = golden_reference.run_drafter(
        reference, tokens[-1], output.hidden_states[-1][0, -1], dict(output.shared_kv_states), LENGTH)
    kinds: tuple[AttentionKind, ...] = (SLIDING, FULL)
    donors = target.config.text.donors
    context = drafter.context({kind: cache.read(donors[kind]) for kind in kinds},
                              {kind: cache.key_positions(kind) for kind in kinds}, cache.lengths)
    token, state = mx.array([tokens[-1]]), hidden[:, -1]
    for step in range(golden_reference.DRAFT_STEPS):
        candidates, state = drafter(target.embed(token), state, context)
        logits = mx.array(expected["logits"][step].numpy())
        if candidates.token_ids is not None:
            logits = logits[candidates.token_ids[0]]
        assert relative_error(candidates.logits[0], logits) <= TOLERANCE
        token = mx.array([int(expected["tokens"][step])])  # teacher-forced: a near-tie must not derail the chain

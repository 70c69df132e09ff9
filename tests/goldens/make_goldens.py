"""Make the golden files of this folder, or check that the committed ones can be made again.

    python tests/goldens/make_goldens.py                write <kind>/{target,assistant}/ and <kind>/golden.safetensors
    python tests/goldens/make_goldens.py --check        make everything anew elsewhere and compare; exit 1 if it differs
    python tests/goldens/make_goldens.py --sensitivity  make porting mistakes on purpose; exit 1 if a golden misses one

Needs torch and transformers 5.22.2 (5.23.0 cannot construct an assistant). README.md lists the names and shapes.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from golden_checkpoints import KINDS, Kind, config_class, write_checkpoint
from golden_reference import SAFE_GAP, all_goldens, load_reference
from golden_sensitivity import check_sensitivity
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
# PyTorch takes other vector code on other processors: its own float32 results differed by up to 4e-6 of the largest
# value between an Intel Xeon and an AMD EPYC. The tests hold this package to 2e-5 of the same files.
TOLERANCE = 1e-5
TRANSFORMERS_VERSION = "5.22.2"


def make(folder: Path) -> None:
    """Write the checkpoints of every kind below `folder`, load them back and write their goldens."""
    for kind in KINDS:
        for role in ("target", "assistant"):
            write_checkpoint(kind, role, folder / kind.name / role)
            require_equal_spellings(kind, role, folder / kind.name / role)
        goldens = all_goldens(load_reference(kind, folder / kind.name))
        metadata = {"transformers": TRANSFORMERS_VERSION}
        save_file(goldens, str(folder / kind.name / "golden.safetensors"), metadata=metadata)
        describe(kind.name, goldens)


def require_equal_spellings(kind: Kind, role: str, folder: Path) -> None:
    """Raise unless transformers reads the same model from config.json and config.per_layer.json."""
    hub, per_layer = (
        config_class(kind, role).from_dict(json.loads((folder / name).read_text())).to_dict()
        for name in ("config.json", "config.per_layer.json")
    )
    if hub != per_layer:
        raise RuntimeError(f"{folder}: config.json and config.per_layer.json describe different models")


def describe(name: str, goldens: dict[str, torch.Tensor]) -> None:
    """Print how spread the logits of a kind are, so that a degenerate golden is noticed."""
    for section in ("target", "drafter"):
        logits = torch.cat(
            [value for key, value in goldens.items() if key.startswith(section) and key.endswith(".logits")]
        )
        finite = logits[~logits.isinf()]
        best = logits.softmax(dim=-1).max(dim=-1).values
        choices = len(set(logits.argmax(dim=-1).tolist()))
        print(
            f"{name:8} {section:8} logits std {finite.std():.2f}, largest {finite.abs().max():.1f}; "
            f"top-1 probability {best.min():.2f} to {best.max():.2f}; {choices} different argmax of {len(logits)}"
        )
    gaps = [f"{float(value):.4f}" for key, value in goldens.items() if key.endswith("min_gap")]
    print(f"{name:8} greedy   smallest gaps {', '.join(gaps)} (at least {SAFE_GAP} by construction)")


def differences(committed: Path, made: Path, tolerance: float) -> list[str]:
    """One line per file or tensor that differs between two folders by more than `tolerance` of its largest value."""
    names = {
        path.relative_to(root)
        for root in (committed, made)
        for kind in KINDS
        for path in (root / kind.name).rglob("*")
        if path.is_file()
    }
    problems = []
    for name in sorted(names):
        old, new = committed / name, made / name
        if not (old.exists() and new.exists()):
            problems.append(f"{name}: only in {'the committed files' if old.exists() else 'the new ones'}")
        elif name.suffix == ".json":
            if old.read_text() != new.read_text():
                problems.append(f"{name}: text differs")
        else:
            problems += tensor_differences(str(name), load_file(old), load_file(new), tolerance)
    return problems


def tensor_differences(
    name: str, old: dict[str, torch.Tensor], new: dict[str, torch.Tensor], tolerance: float
) -> list[str]:
    """The tensors of two files that differ in name, dtype, shape or value; infinities must be in the same places.

    Values may differ by `tolerance` of a tensor's largest one, gaps between two logits by that of the largest logit.
    """
    if old.keys() != new.keys():
        return [f"{name}: tensor names differ: {sorted(old.keys() ^ new.keys())}"]
    problems = []
    logits = [value for key, value in old.items() if key.startswith("target.") and key.endswith(".logits")]
    largest_logit = max(map(largest, logits), default=0.0)
    for key, old_value in old.items():
        new_value = new[key]
        if old_value.shape != new_value.shape or old_value.dtype != new_value.dtype:
            old_form, new_form = (f"{value.dtype} {tuple(value.shape)}" for value in (old_value, new_value))
            problems.append(f"{name}: {key}: {old_form} became {new_form}")
            continue
        if torch.equal(old_value, new_value):
            continue
        finite = old_value.isfinite() & new_value.isfinite()
        change = (old_value[finite].double() - new_value[finite].double()).abs().max()
        relative = float(change) / (largest_logit if key.endswith("min_gap") else largest(old_value))
        if relative > tolerance or not torch.equal(old_value[~finite], new_value[~finite]):
            problems.append(f"{name}: {key}: relative difference {relative:.2g}")
    return problems


def largest(tensor: torch.Tensor) -> float:
    """The largest finite absolute value."""
    return float(tensor[tensor.isfinite()].double().abs().max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="compare instead of writing")
    mode.add_argument("--sensitivity", action="store_true", help="make mistakes on purpose and require that they show")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="of --check, of a tensor's largest value")
    arguments = parser.parse_args()
    if transformers.__version__ != TRANSFORMERS_VERSION:
        parser.error(f"got transformers {transformers.__version__}, the goldens are defined by {TRANSFORMERS_VERSION}")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if arguments.sensitivity:
        problems = [problem for kind in KINDS for problem in check_sensitivity(kind, HERE / kind.name)]
    elif arguments.check:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder))
            problems = differences(HERE, Path(folder), arguments.tolerance)
    else:
        make(HERE)
        problems = []
    for problem in problems:
        print(problem)
    print("FAILED" if problems else "ok")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

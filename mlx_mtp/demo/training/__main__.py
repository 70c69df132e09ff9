"""The sub-commands that made the demo models, in the order in which they run; see README.md beside this file."""

import argparse
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer

from .batches import encode_corpus
from .corpus import build_corpus, load_corpus, save_corpus
from .drafter import build_drafter, load_target, train_drafter
from .export import export_drafter, export_target
from .families import FAMILIES
from .fast_layers import use_fast_norm
from .held_out import choose_prompts, load_pair, measure_pair, save_prompts
from .target import train_target
from .tokenizer import save_tokenizer, train_tokenizer

DEMO_FOLDER = Path(__file__).resolve().parent.parent


def prepare(arguments: argparse.Namespace) -> None:
    """Corpus, tokenizer and token streams."""
    corpus = build_corpus(arguments.documents, arguments.library)
    save_corpus(corpus, arguments.work / "corpus")
    tokenizer = train_tokenizer(corpus)
    save_tokenizer(tokenizer, arguments.work / "tokenizer")
    encode_corpus(corpus, tokenizer, arguments.work)
    print(f"{[len(pairs) for pairs in corpus.pairs]} chat pairs (training, held out)")


def export(arguments: argparse.Namespace) -> None:
    family = FAMILIES[arguments.family]
    target = load_target(family, arguments.work)
    drafter = build_drafter(family, seed=0)
    drafter.load_state_dict(torch.load(arguments.work / f"{family.name}-drafter.pt"))
    tokenizer = Tokenizer.from_file(str(arguments.work / "tokenizer" / "tokenizer.json"))
    export_target(target, family, tokenizer, arguments.out / family.name)
    export_drafter(drafter, family, arguments.out / f"{family.name}-assistant")


def prompts(arguments: argparse.Namespace) -> None:
    """Choose the held-out prompts with the exported edge target."""
    target, _, tokenizer = load_pair(arguments.out, "edge")
    pairs = load_corpus(arguments.work / "corpus").pairs[1]
    save_prompts(choose_prompts(target, tokenizer, pairs), arguments.out / "heldout_prompts.json")


def check(arguments: argparse.Namespace) -> None:
    """The exact greedy walk of the exported pair on the held-out prompts."""
    use_fast_norm()
    target, assistant, tokenizer = load_pair(arguments.out, arguments.family)
    entries = json.loads((arguments.out / "heldout_prompts.json").read_text())
    for kind, statistics in measure_pair(target, assistant, tokenizer, entries, arguments.drafts).items():
        print(f"{arguments.family} {kind}: {statistics}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mlx_mtp.demo.training", description=__doc__)
    commands = parser.add_subparsers(required=True)

    def add(name: str, function: object, *, family: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("--work", type=Path, required=True, help="folder for everything that is not shipped")
        command.add_argument("--seed", type=int, default=0)
        if family:
            command.add_argument("--family", choices=sorted(FAMILIES), required=True)
        return command

    preparation = add("prepare", prepare, family=False)
    preparation.add_argument("--documents", type=Path, required=True, help="_sources folder of Debian's python3.11-doc")
    preparation.add_argument("--library", type=Path, required=True, help="CPython 3.11's standard library")
    for name, function, steps in (("target", train_target, 2400), ("drafter", train_drafter, 320)):
        command = add(name, function)
        command.add_argument("--steps", type=int, default=steps)
        command.add_argument("--save-every", type=int, default=200)
        command.add_argument("--no-bf16", dest="bf16", action="store_false", help="do not autocast matrix products")
        command.add_argument("--own-answers", type=int, default=1600, help="answers that the target writes")
        command.add_argument("--centroid-steps", type=int, default=150)
    for name, function in (("export", export), ("prompts", prompts), ("check", check)):
        command = add(name, function, family=name != "prompts")
        command.add_argument("--out", type=Path, default=DEMO_FOLDER)
        command.add_argument("--drafts", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.function(arguments)


if __name__ == "__main__":
    main()

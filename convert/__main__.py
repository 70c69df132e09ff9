"""The command `python -m mlx_mtp.convert`: a checkpoint in, a folder for MLX and its drafter's beside it out.

The summary goes to stdout and everything else to stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mlx_mtp.command import Parser, guarded
from mlx_mtp.convert import convert
from mlx_mtp.convert.recipes import RECIPES
from mlx_mtp.convert.settings import ConvertConfig


def parser() -> argparse.ArgumentParser:
    """The flags, named as in mlx_lm.convert; every default comes from ConvertConfig."""
    default = ConvertConfig("-")
    cli = Parser(prog="python -m mlx_mtp.convert",
                 description="Convert a Gemma 4 checkpoint and its MTP drafter to MLX, and say what it cost.")
    add = cli.add_argument
    add("--hf-path", "--model", required=True, help="folder, Hub name (owner/name), or kaggle:<handle>")
    add("--mlx-path", default=default.mlx_path, help="folder to write; the drafter goes beside it, as "
                                                     "<folder>-assistant (default: %(default)s)")
    add("--revision", help="the Hub's branch, tag or commit")
    add("--quantize", "-q", action="store_true", help="quantize, by the recipe")
    add("--q-bits", type=int, help="bits a weight (default: the mode's own, 4 in affine mode)")
    add("--q-group-size", type=int, help="weights that share a scale (default: the mode's own, 64 in affine mode)")
    add("--q-mode", default=default.q_mode, help="affine, mxfp4, nvfp4 or mxfp8 (default: %(default)s)")
    add("--recipe", default=default.recipe, choices=RECIPES,
        help="recommended keeps what suffers most at 8 bits, uniform only what would break (default: %(default)s)")
    add("--dtype", help="float16, bfloat16 or float32 for what is not quantized (default: the source's)")
    add("--dequantize", "-d", action="store_true", help="write a quantized checkpoint in full")
    add("--draft", nargs="?", const=True, default=default.draft, metavar="NAME",
        help="demand the drafter, or name it (default: the one that belongs to the target by its name, if any)")
    add("--no-draft", dest="draft", action="store_false", default=default.draft, help="convert the target alone")
    add("--draft-bits", type=int, help="bits of the drafter (default: 4 with -q, else the source's type)")
    add("--keep-towers", action="store_true", help="copy vision and audio tensors through, for mlx-vlm")
    add("--allow-nan", action="store_true", help="let NaN and infinity through")
    add("--force", action="store_true", help="replace the checkpoint at the output")
    add("--verify", action=argparse.BooleanOptionalAction, default=default.verify,
        help="compare the result with the source, and write a report beside it (default: yes)")
    add("--dry-run", action="store_true", help="only print what would be done (a Hub checkpoint is downloaded even so)")
    add("--upload-repo", help="upload the result to this repository of the Hub (the drafter to <name>-assistant)")
    return cli


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or what `guarded` says."""
    settings = vars(parser().parse_args(arguments))

    def run() -> int:
        conversion = convert(**settings)
        print(conversion.described() if settings["dry_run"] else conversion.summary())
        return 0

    return guarded(run, "interrupted: what is whole is kept, and the same command resumes from there")


if __name__ == "__main__":
    sys.exit(main())

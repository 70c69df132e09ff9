"""Which BLAS matrix products go to on Linux, and a bench started again with OpenBLAS where that is installed.

MLX's Linux wheel links the reference BLAS, whose time grows with every row it multiplies: there, checking four tokens
costs almost four times one, which is unlike any machine that somebody would decode on. With OpenBLAS preloaded a few
rows cost about the same as one.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlx_mtp.command import Parser
from mlx_mtp.device import is_gpu

CHOICE = "MLX_MTP_BENCH_BLAS"  # "reference" keeps what is linked; the bench sets "openblas" when it starts itself again
# Where distributions put a library that answers to the reference BLAS's names.
INSTALLED = (
    "/usr/lib/*/openblas-pthread/libblas.so.3", "/usr/lib/*/openblas-openmp/libblas.so.3",
    "/usr/lib/*/openblas*/libblas.so.3", "/usr/lib64/libopenblas.so.0", "/usr/lib/libopenblas.so.0",
)


def products_use_blas() -> bool:
    """Whether the default device is a Linux CPU; elsewhere MLX brings its own kernels, or Apple's."""
    return platform.system() == "Linux" and not is_gpu()


def is_openblas() -> bool:
    """Whether this process has OpenBLAS mapped; NumPy's own copy, which answers to other names, does not count."""
    maps = Path("/proc/self/maps")
    return maps.exists() and any("openblas" in line and "scipy_openblas" not in line
                                 for line in maps.read_text().splitlines())


def name() -> str:
    if not products_use_blas():
        return "MLX's own"
    return "OpenBLAS, preloaded" if is_openblas() else "reference"


def find_openblas(patterns: Sequence[str] = INSTALLED) -> Path | None:
    """The first OpenBLAS that is installed, or None."""
    return next((path for pattern in patterns for path in sorted(Path("/").glob(pattern.lstrip("/")))), None)


def add_flag(cli: argparse.ArgumentParser) -> None:
    cli.add_argument("--blas", choices=["auto", "reference"], default="auto",
                     help="on a Linux CPU: auto starts the bench again with OpenBLAS preloaded where it is installed, "
                          "reference keeps the one that MLX links (default: %(default)s)")


def restart_environment(environment: Mapping[str, str], library: Path | None) -> dict[str, str] | None:
    """The environment to start again in, or None where that is not wanted, not possible, or has happened already."""
    if library is None or environment.get(CHOICE) is not None or is_openblas() or not products_use_blas():
        return None
    preloaded = " ".join(filter(None, (str(library), environment.get("LD_PRELOAD"))))
    return {**environment, CHOICE: "openblas", "LD_PRELOAD": preloaded}


def prefer_openblas() -> None:
    """Starts this very command again with OpenBLAS, unless `--blas reference` or the environment says otherwise."""
    cli = Parser(add_help=False, allow_abbrev=False)
    add_flag(cli)
    if cli.parse_known_args()[0].blas == "reference":
        return
    library = find_openblas()
    environment = restart_environment(os.environ, library)
    if environment is not None:
        print(f"starting again with OpenBLAS ({library}); --blas reference keeps MLX's BLAS", file=sys.stderr)
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


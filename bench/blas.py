"""Which BLAS matrix products go to on Linux, and a bench started again with OpenBLAS where that is installed.

MLX's Linux wheel links the reference BLAS, whose time grows with every row it multiplies: there, checking four tokens
costs almost four times one, which is unlike any machine that somebody would decode on. With OpenBLAS preloaded a few
rows cost about the same as one.

OpenBLAS has kernels for each processor. A release that is older than the processor does not know it and takes those
that any processor runs, up to three times slower: then it is told which to take. Its idle threads go on asking for work
for 25 ms, on cores that the decoders' own threads want: they are told to sleep after a tenth of a millisecond.
"""

from __future__ import annotations

import argparse
import ctypes
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
CORE = "OPENBLAS_CORETYPE"  # OpenBLAS's own: the processor whose kernels it takes
TIMEOUT, SHORT_TIMEOUT = "OPENBLAS_THREAD_TIMEOUT", "18"  # OpenBLAS's own: 2^18 cycles instead of 2^26
GENERIC_CORES = ("Prescott", "Core2", "Generic")  # what an x86-64 falls back to
CORES_BY_FEATURE = {"avx512vl": "SkylakeX", "avx2": "Haswell"}  # newest first; features as Linux lists them


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
    if not is_openblas():
        return "reference"
    return f"OpenBLAS, preloaded, kernels for {core()}, idle threads' timeout {os.environ.get(TIMEOUT, 'its own')}"


def core(library: Path | None = None) -> str:
    """The processor whose kernels OpenBLAS takes: this process's, or that of a library that is loaded to be asked."""
    try:
        ask = ctypes.CDLL(library).openblas_get_corename
    except (OSError, AttributeError):
        return "an unknown processor"
    ask.restype = ctypes.c_char_p
    return str(ask().decode())


def better_core(chosen: str, features: str) -> str | None:
    """Another core than the one chosen, where that one is a fallback and the processor has more than it uses."""
    if chosen not in GENERIC_CORES:
        return None
    return next((name for feature, name in CORES_BY_FEATURE.items() if feature in features.split()), None)


def _features() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith("flags")), "")


def find_openblas(patterns: Sequence[str] = INSTALLED) -> Path | None:
    """The first OpenBLAS that is installed, or None."""
    return next((path for pattern in patterns for path in sorted(Path("/").glob(pattern.lstrip("/")))), None)


def add_flag(cli: argparse.ArgumentParser) -> None:
    cli.add_argument("--blas", choices=["auto", "reference"], default="auto",
                     help="on a Linux CPU: auto starts the bench again with OpenBLAS preloaded where it is installed, "
                          "reference keeps the one that MLX links (default: %(default)s)")


def restart_environment(environment: Mapping[str, str], library: Path | None) -> dict[str, str] | None:
    """The environment to start again in, or None where that is not wanted, not possible, or has happened already.

    library: an OpenBLAS that is installed; where one is preloaded already only its settings may have to be others.
    """
    if environment.get(CHOICE) is not None or not products_use_blas():
        return None
    if is_openblas():
        library = None
    elif library is None:
        return None
    better = better_core(core(library), _features())
    settings = {TIMEOUT: SHORT_TIMEOUT, **({CORE: better} if better else {})}
    if library is None and settings.keys() <= environment.keys():
        return None
    preloaded = " ".join(filter(None, (str(library or ""), environment.get("LD_PRELOAD"))))
    return {**settings, **environment, CHOICE: "openblas", "LD_PRELOAD": preloaded}


def prefer_openblas() -> None:
    """Starts this very command again with OpenBLAS, unless `--blas reference` or the environment says otherwise."""
    cli = Parser(add_help=False, allow_abbrev=False)
    add_flag(cli)
    if cli.parse_known_args()[0].blas == "reference":
        return
    environment = restart_environment(os.environ, find_openblas())
    if environment is not None:
        changed = ("LD_PRELOAD", CORE, TIMEOUT)
        chosen = " ".join(f"{name}={environment[name]}" for name in changed if environment.get(name))
        print(f"starting again with OpenBLAS ({chosen}); --blas reference keeps MLX's BLAS", file=sys.stderr)
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


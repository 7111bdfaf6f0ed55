"""C++ kernels behind a plain C interface: setup.py builds them for two levels of x86-64 where a compiler is at hand."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

LEVELS = {"AVX512": ("v4", "v3"), "AVX2": ("v3",)}  # what torch says of the CPU -> builds that run on it, best first
HEADERS = sorted(Path(__file__).parent.glob("*.h"))


def source_hash(source: Path) -> str:
    """Of a kernel's source with what it may include, as setup.py makes it."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in (*HEADERS, source))).hexdigest()


def load_kernels(source: Path, signatures: Mapping[str, Sequence[type]]) -> ctypes.CDLL | str:
    """The kernels built from `NAME.cpp` as `_NAME_LEVEL.so` beside it, or why there are none."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in LEVELS:
        return f"this CPU is {capability}, and they are built for AVX2 and AVX-512"
    wanted = source_hash(source)
    reason = "they are not built; there was no g++ when the project was installed"
    names = [f"_{source.stem}_{level}.*so" for level in LEVELS[capability]]
    for path in (path for name in names for path in sorted(source.parent.glob(name))):
        try:
            library = ctypes.CDLL(str(path))
            library.native_source.restype = ctypes.c_char_p
            built_from = library.native_source().decode()
        except (OSError, AttributeError) as error:
            reason = f"{path.name} does not load ({error}); install the project again"
            continue
        if built_from != wanted:
            reason = f"{path.name} was built from another {source.name}; install the project again"
            continue
        for name, types in signatures.items():
            getattr(library, name).argtypes = types
            getattr(library, name).restype = None
        return library
    return reason

"""float32 products of matrices on a CPU by OpenBLAS, where that is faster than what PyTorch takes by itself.

PyTorch multiplies with MKL, which takes AVX-512 on Intel's CPUs only: on AMD's that have it OpenBLAS is more than twice
as fast (`tools/bench/cpu_products.py`). `multiply_by_openblas` puts it behind `torch.mm` and `torch.addmm`, and so
behind every linear layer of Megatron and of SGLang, forward and backward.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FEWEST_ROWS = 8  # below, a product reads its weight once and MKL does that well

_ROW_MAJOR, _AS_IS, _TRANSPOSED = 101, 111, 112  # cblas.h

Product = Callable[..., Tensor]


@functools.cache
def missing() -> str:
    """Why there is no OpenBLAS here; empty if there is."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX512", "AVX2"):
        return "it is used on x86-64 with AVX2"
    return "" if _path() else "the package scipy-openblas32 is not installed"


@functools.cache
def why_not() -> str:
    """What keeps PyTorch's products with PyTorch's choice; empty if nothing does."""
    if reason := missing():
        return reason
    if _is_intel():
        return "MKL knows Intel's CPUs"
    if not hasattr(torch.library, "get_kernel"):
        return f"torch {torch.__version__} lets nobody behind torch.mm; 2.9 does"
    return ""


def _is_intel() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text()


def _path() -> Path | None:
    """Of OpenBLAS's library. Importing its package would show its names to every library that is loaded later."""
    package = importlib.util.find_spec("scipy_openblas32")
    folders = package.submodule_search_locations or [] if package else []
    return next((path for folder in folders for path in Path(folder, "lib").glob("libscipy_openblas*.so")), None)


@functools.cache
def library() -> ctypes.CDLL:
    """OpenBLAS, with as many threads as PyTorch has. Only where nothing is `missing`."""
    openblas = ctypes.CDLL(str(_path()))
    number, pointer, real = ctypes.c_int, ctypes.c_void_p, ctypes.c_float
    openblas.scipy_cblas_sgemm.argtypes = (
        *(number,) * 6,  # order, a and b transposed, rows, columns, inner
        *(real, pointer, number, pointer, number),  # alpha, a, b
        *(real, pointer, number),  # beta, c
    )
    openblas.scipy_cblas_sgemm.restype = None
    openblas.scipy_openblas_get_corename.restype = ctypes.c_char_p
    openblas.scipy_openblas_set_num_threads(torch.get_num_threads())
    return openblas


def core() -> str:
    """The family of CPUs whose kernels it chose: by what this one can, or by OPENBLAS_CORETYPE."""
    return library().scipy_openblas_get_corename().decode()


def sgemm_address() -> int:
    """Of its `cblas_sgemm`, for kernels in C++."""
    address = ctypes.cast(library().scipy_cblas_sgemm, ctypes.c_void_p).value
    assert address
    return address


def use_threads(count: int) -> None:
    """As torch.set_num_threads, for OpenBLAS if this process has it."""
    if library.cache_info().currsize:
        library().scipy_openblas_set_num_threads(count)


@functools.cache
def multiply_by_openblas() -> bool:
    """Has the float32 products of this process and its forks computed by OpenBLAS; whether it did.

    What it is not made for, and everything where `why_not` says so, stays with PyTorch's choice. Calling it again does
    nothing.
    """
    if why_not():
        return False
    library()
    ours = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Warning only once for all operators", category=UserWarning)
        for name, in_place_of in (("mm", _mm), ("mm.out", _mm_out), ("addmm", _addmm), ("addmm_", _addmm_)):
            by_mkl = torch.library.get_kernel(f"aten::{name}", "CPU").call_boxed
            ours.impl(name, in_place_of(by_mkl), "CPU", with_keyset=True)
    _kept.append(ours)
    return True


_kept: list[Any] = []  # what is registered ends with its library


def _order(x: Tensor) -> tuple[int, int] | None:
    """How OpenBLAS is told of a matrix: as it is or transposed, and the stride of its rows or columns."""
    rows, columns = x.stride()
    if columns == 1 and rows >= x.shape[1]:
        return _AS_IS, rows
    return (_TRANSPOSED, columns) if rows == 1 and columns >= x.shape[0] else None


def add_product(a: Tensor, b: Tensor, out: Tensor, *, beta: float = 0.0, alpha: float = 1.0) -> bool:
    """out = beta * out + alpha * a b, where OpenBLAS can and should; whether it did."""
    if not (a.dtype is b.dtype is out.dtype is torch.float32 and a.ndim == b.ndim == out.ndim == 2):
        return False
    (rows, inner), (other, columns) = a.shape, b.shape
    if inner != other or inner == 0 or min(rows, columns) < FEWEST_ROWS or out.shape != (rows, columns):
        return False
    order_a, order_b, order_out = _order(a), _order(b), _order(out)
    if order_a is None or order_b is None or order_out is None or order_out[0] != _AS_IS:
        return False
    library().scipy_cblas_sgemm(
        *(_ROW_MAJOR, order_a[0], order_b[0], rows, columns, inner),
        *(alpha, a.data_ptr(), order_a[1], b.data_ptr(), order_b[1]),
        *(beta, out.data_ptr(), order_out[1]),
    )
    return True


# PyTorch's operators, each around the kernel it takes the place of.


def _mm(by_mkl: Product) -> Product:
    def mm(keys: Any, a: Tensor, b: Tensor) -> Tensor:
        out = a.new_empty(a.shape[0], b.shape[-1])
        return out if add_product(a, b, out) else by_mkl(keys, a, b)

    return mm


def _mm_out(by_mkl: Product) -> Product:
    def mm_out(keys: Any, a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        return out if add_product(a, b, out) else by_mkl(keys, a, b, out=out)

    return mm_out


def _addmm(by_mkl: Product) -> Product:
    def addmm(keys: Any, start: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
        if start.dtype is torch.float32 and a.ndim == b.ndim == 2 and a.shape[0] >= FEWEST_ROWS:
            out = start.expand(a.shape[0], b.shape[1]).clone(memory_format=torch.contiguous_format)
            if add_product(a, b, out, beta=beta, alpha=alpha):
                return out
        return by_mkl(keys, start, a, b, beta=beta, alpha=alpha)

    return addmm


def _addmm_(by_mkl: Product) -> Product:
    def addmm_(keys: Any, total: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
        done = add_product(a, b, total, beta=beta, alpha=alpha)
        return total if done else by_mkl(keys, total, a, b, beta=beta, alpha=alpha)

    return addmm_

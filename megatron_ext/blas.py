"""float32 products of matrices on a CPU by OpenBLAS, where that is faster than what PyTorch takes by itself.

PyTorch multiplies with MKL; on an AMD CPU with AVX-512 OpenBLAS is twice as fast (`tools/bench/cpu_products.py`).
`multiply_by_openblas` puts it behind `torch.mm` and `torch.addmm`, and so
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
MOST_THREADS = 64  # of the package's build

_ROW_MAJOR, _AS_IS, _TRANSPOSED = 101, 111, 112  # cblas.h

Product = Callable[..., Tensor]


@functools.cache
def _load() -> ctypes.CDLL | str:
    """OpenBLAS with as many threads as PyTorch has, or why there is none."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX512", "AVX2"):
        return "it is used on x86-64 with AVX2"
    # Importing its package would show the library's names to every library that is loaded later.
    package = importlib.util.find_spec("scipy_openblas32")
    folders = package.submodule_search_locations or [] if package else []
    paths = [path for folder in folders for path in Path(folder, "lib").glob("libscipy_openblas*.so")]
    if not paths:
        return "the package scipy-openblas32 is not installed"
    number, pointer, real = ctypes.c_int, ctypes.c_void_p, ctypes.c_float
    try:
        openblas = ctypes.CDLL(str(paths[0]))
        openblas.scipy_cblas_sgemm.argtypes = (
            *(number,) * 6,  # order, a and b transposed, rows, columns, inner
            *(real, pointer, number, pointer, number),  # alpha, a, b
            *(real, pointer, number),  # beta, c
        )
        openblas.scipy_cblas_sgemm.restype = None
        openblas.scipy_openblas_get_corename.restype = ctypes.c_char_p
        openblas.scipy_openblas_set_num_threads(torch.get_num_threads())
    except (OSError, AttributeError) as error:
        return f"{paths[0].name} does not load: {error}"
    return openblas


def missing() -> str:
    """Why there is no OpenBLAS here; empty if there is."""
    found = _load()
    return found if isinstance(found, str) else ""


def library() -> ctypes.CDLL:
    """OpenBLAS. Only where nothing is `missing`."""
    found = _load()
    assert not isinstance(found, str), found
    return found


@functools.cache
def why_not() -> str:
    """What keeps PyTorch's products with PyTorch's choice; empty if nothing does."""
    if reason := missing():
        return reason
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and "GenuineIntel" in cpuinfo.read_text():
        return "on an Intel CPU nobody has compared it with MKL"
    if torch.get_num_threads() > MOST_THREADS:
        return f"its package is built for {MOST_THREADS} threads"
    if not hasattr(torch.library, "get_kernel"):
        return f"torch {torch.__version__} lets nobody behind torch.mm; 2.9 does"
    return ""


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
    if _load.cache_info().currsize and not missing():
        library().scipy_openblas_set_num_threads(count)


@functools.cache
def multiply_by_openblas() -> bool:
    """Has the float32 products of this process and its forks computed by OpenBLAS; whether it did.

    What it is not made for, and everything where `why_not` says so, stays with PyTorch's choice. Calling it again does
    nothing.
    """
    if why_not():
        return False
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


def _orders(a: Tensor, b: Tensor) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Those of two matrices that OpenBLAS can and should multiply."""
    if not (a.dtype is b.dtype is torch.float32 and a.ndim == b.ndim == 2):
        return None
    (rows, inner), (other, columns) = a.shape, b.shape
    if inner != other or inner == 0 or min(rows, columns) < FEWEST_ROWS:
        return None
    order_a, order_b = _order(a), _order(b)
    return None if order_a is None or order_b is None else (order_a, order_b)


def _takes(out: Tensor, a: Tensor, b: Tensor) -> bool:
    if out.dtype is not torch.float32 or out.shape != (a.shape[0], b.shape[1]):
        return False
    order = _order(out)
    return order is not None and order[0] == _AS_IS


def _multiply(orders: Any, a: Tensor, b: Tensor, out: Tensor, *, beta: float = 0.0, alpha: float = 1.0) -> Tensor:
    """out = beta * out + alpha * a b"""
    (a_as, a_stride), (b_as, b_stride) = orders
    library().scipy_cblas_sgemm(
        *(_ROW_MAJOR, a_as, b_as, a.shape[0], b.shape[1], a.shape[1]),
        *(alpha, a.data_ptr(), a_stride, b.data_ptr(), b_stride),
        *(beta, out.data_ptr(), out.stride(0)),
    )
    return out


def add_product(a: Tensor, b: Tensor, out: Tensor, *, beta: float = 0.0, alpha: float = 1.0) -> bool:
    """out = beta * out + alpha * a b, where OpenBLAS can and should; whether it did."""
    orders = _orders(a, b)
    if orders is None or not _takes(out, a, b):
        return False
    _multiply(orders, a, b, out, beta=beta, alpha=alpha)
    return True


# PyTorch's operators, each around the kernel it takes the place of.


def _mm(by_mkl: Product) -> Product:
    def mm(keys: Any, a: Tensor, b: Tensor) -> Tensor:
        orders = _orders(a, b)
        if orders is None:
            return by_mkl(keys, a, b)
        return _multiply(orders, a, b, a.new_empty(a.shape[0], b.shape[1]))

    return mm


def _mm_out(by_mkl: Product) -> Product:
    def mm_out(keys: Any, a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
        return out if add_product(a, b, out) else by_mkl(keys, a, b, out=out)

    return mm_out


def _addmm(by_mkl: Product) -> Product:
    def addmm(keys: Any, start: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
        orders = _orders(a, b)
        if orders is None or start.dtype is not torch.float32:
            return by_mkl(keys, start, a, b, beta=beta, alpha=alpha)
        out = start.expand(a.shape[0], b.shape[1]).clone(memory_format=torch.contiguous_format)
        return _multiply(orders, a, b, out, beta=beta, alpha=alpha)

    return addmm


def _addmm_(by_mkl: Product) -> Product:
    def addmm_(keys: Any, total: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
        done = add_product(a, b, total, beta=beta, alpha=alpha)
        return total if done else by_mkl(keys, total, a, b, beta=beta, alpha=alpha)

    return addmm_

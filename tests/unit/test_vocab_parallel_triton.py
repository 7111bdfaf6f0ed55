"""The Triton kernels without a GPU: in the interpreter, and as code for GPUs that is compiled and looked at."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_ext.vocab_parallel import triton_kernels
from megatron_ext.vocab_parallel.gpu import BLOCK, NUM_WARPS, SLAB

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def test_the_kernels_stand_up_to_the_same_tests_in_the_interpreter():
    """Triton decides between compiler and interpreter when it is imported, so this takes a process of its own."""
    tests = [Path(__file__).with_name(f"test_vocab_parallel{part}.py") for part in ("", "_modes", "_peers")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", "triton", "-p", "no:cacheprovider", *tests],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 80, result.stdout[-500:]


ARGUMENTS = {
    "TILES": "*i32",
    "TARGETS": "*i64",
    "LIVE": "*i1",
    "SUSPECT": "*i1",
    **dict.fromkeys(("STATS", "SUMS", "ROWS", "FOR_LOGPROBS", "FOR_ENTROPY", "FOR_LOSS", "CLIPPED_MASS"), "*fp32"),
    **dict.fromkeys(("stride", "out_stride"), "i64"),
    **dict.fromkeys(("start", "num_tiles", "slots", "V", "WIDTH", "slabs"), "i32"),
    **dict.fromkeys(("scale", "clip"), "fp32"),
}
LOGITS = ("LOGITS", "STUDENT", "TEACHER", "OUT")
CONSTANTS = {"HAS_LIVE": False, "HAS_ENTROPY": True, "ALIGN": 16, "BLOCK": BLOCK, "SLAB": SLAB}
ALIGNED = (*LOGITS, "stride", "out_stride", "V", "WIDTH")  # every padded vocabulary is a multiple of 128 columns
KERNELS = ("token_stats", "token_grad", "kl_stats", "kl_scan", "kl_grad")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", KERNELS)
def test_compiled_for_a_gpu_it_spills_nothing_and_moves_logits_in_vectors(name, capability, dtype, tmp_path):
    kernel = getattr(triton_kernels, name)
    types = ARGUMENTS | dict.fromkeys(LOGITS, f"*{dtype}")
    constants = {n: value for n, value in (CONSTANTS | {"LIVE": None}).items() if n in kernel.arg_names}
    signature = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
    aligned = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in ALIGNED if n in kernel.arg_names}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": NUM_WARPS},
    )
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [CUOBJDUMP, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout
    registers, stack, local = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK", "LOCAL"))
    assert (stack, local) == (0, 0), "registers were spilled to memory"
    assert registers <= 128, f"{registers} registers a thread leave a multiprocessor half empty"

    # A thread works on BLOCK / 32 / NUM_WARPS logits of each tensor, in loads and stores of 16 bytes.
    bytes_each = BLOCK // 32 // NUM_WARPS * (2 if dtype == "bf16" else 4)
    inputs = sum(n in kernel.arg_names for n in ("LOGITS", "STUDENT", "TEACHER"))
    blocks = SLAB if "SLAB" in kernel.arg_names else 1
    wide = {kind: len(re.findall(rf"{kind}\.global[^;]*\.v4", compiled.asm["ptx"])) for kind in ("ld", "st")}
    assert wide["ld"] == inputs * blocks * bytes_each // 16
    assert wide["st"] == ("OUT" in kernel.arg_names) * blocks * bytes_each // 16

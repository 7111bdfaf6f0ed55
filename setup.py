"""Packaging. Dependencies are locked in requirements/: install those files with --no-deps first.

torch and sglang stay out of install_requires: resolving them would fetch CUDA builds on a laptop.
"""

import hashlib
import platform
from pathlib import Path

from setuptools import Extension, find_packages, setup

HEADERS = sorted(Path("megatron_ext").glob("*.h"))
KERNELS = [
    Path("megatron_ext/layers.cpp"),
    Path("megatron_ext/vocab_parallel/rows.cpp"),
    Path("searche1/rollout/engine_ops.cpp"),
]


def native(path: Path, level: str) -> Extension:
    """CPU kernels for an x86-64 level. Without a compiler pip goes on: plain torch does the same, slower."""
    source = hashlib.sha256(b"".join(file.read_bytes() for file in (*HEADERS, path))).hexdigest()
    return Extension(
        ".".join([*path.parent.parts, f"_{path.stem}_{level}"]),
        [str(path)],
        depends=[str(header) for header in HEADERS],
        define_macros=[("NATIVE_SOURCE", f'"{source}"')],  # megatron_ext/native.py compares it
        extra_compile_args=[
            *("-std=gnu++17", "-O3", f"-march=x86-64-{level}", "-mprefer-vector-width=512", "-ffp-contract=fast"),
            *("-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"),
        ],
        optional=True,
    )


setup(
    name="searche1",
    version="0.1.0",
    description="Search-E1: self-evolving search agents with GRPO and on-policy self-distillation",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["searche1", "searche1.*", "megatron_ext", "megatron_ext.*"]),
    package_data={"searche1": ["assets/**/*", "**/*.cpp"], "megatron_ext": ["**/*.cpp", "*.h"]},
    ext_modules=[native(path, level) for path in KERNELS for level in ("v3", "v4")]
    if platform.machine() == "x86_64"
    else [],
    extras_require={
        "gpu": ["faiss-gpu>=1.15", "transformer-engine[pytorch]>=2.0"],
        "dev": ["pytest", "pytest-timeout", "pytest-xdist", "ruff", "mypy"],
    },
    entry_points={
        "console_scripts": ["searche1 = searche1.cli:main"],
        # SGLang loads this in every process it spawns; on a machine with CUDA it steps aside.
        "sglang.srt.platforms": ["searche1_cpu = searche1.rollout.cpu_platform:activate"],
    },
)

"""Packaging. Dependencies are locked in requirements/: install those files with --no-deps first.

torch and sglang stay out of install_requires: resolving them would fetch CUDA builds on a laptop.
"""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="searche1",
    version="0.1.0",
    description="Search-E1: self-evolving search agents with GRPO and on-policy self-distillation",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["searche1", "searche1.*", "megatron_ext", "megatron_ext.*"]),
    package_data={"searche1": ["assets/**/*"]},
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

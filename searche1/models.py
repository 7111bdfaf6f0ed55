"""Model folders and devices, for whoever runs a model: found, checked and named before anything loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from searche1.config import PromptConfig
from searche1.prompts import encode_prompt
from searche1.types import UserError


def choose_device(wanted: str) -> str:
    """cpu or cuda. Raises UserError when a GPU is asked for and none is there."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise UserError(f"run.device must be auto, cpu or cuda, got {wanted!r}")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError("run.device=cuda but torch sees no GPU; use run.device=cpu, or run `searche1 doctor`")
    if wanted == "cpu" and torch.cuda.is_available():
        raise UserError("run.device=cpu but torch sees a GPU, and SGLang would take it; set CUDA_VISIBLE_DEVICES=''")
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def choose_dtype(wanted: str, device: str) -> torch.dtype:
    """The type named by train.dtype; "auto" is bfloat16 on GPUs and float32 on CPUs. Raises UserError."""
    names = {
        "auto": torch.bfloat16 if device == "cuda" else torch.float32,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
    }
    if wanted not in names:
        raise UserError(f"train.dtype must be one of {sorted(names)}, got {wanted!r}")
    return names[wanted]


def resolve_model(path: str) -> Path:
    """The local folder of a HuggingFace model; a hub id is downloaded on first use. Raises UserError."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.txt", "*.model", "*.jinja", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"model.path={path!r} is neither a folder nor a model that can be downloaded ({type(error).__name__}); "
            "give an existing HuggingFace folder, or check the name and the network"
        ) from error


def load_tokenizer(model_path: Path, prompt: PromptConfig) -> Any:
    """The model's tokenizer. Raises UserError if its folder has none that can write its prompts."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        raise UserError(f"{model_path} holds no readable tokenizer: {str(error).splitlines()[0]}") from error
    # A folder without tokenizer files loads as a tokenizer that knows no word.
    if not encode_prompt(prompt.user, tokenizer):
        raise UserError(f"{model_path} holds no tokenizer: prompts become no tokens; copy its tokenizer files there")
    return tokenizer

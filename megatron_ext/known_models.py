"""The numbers of released backbones, so that a plan needs no download.

They are those of each checkpoint's config.json, as far as memory, layouts and speed depend on them.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.hf_mapping import ModelShape, model_shape


@dataclass(frozen=True)
class KnownModel:
    """A released checkpoint: the model type that transformers knows, and its config.json's numbers."""

    model_type: str
    numbers: dict[str, Any]
    billions: float  # parameters, as its model card rounds them
    hub_ids: tuple[str, ...]  # checkpoints of this size


def _sizes(
    hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int, *, tied: bool = False, **others: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        **others,
    }


def _qwen25(size: str) -> tuple[str, ...]:
    return (f"Qwen/Qwen2.5-{size}-Instruct", f"Qwen/Qwen2.5-{size}")


_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
_A3B: dict[str, Any] = {**_EXPERTS, "moe_intermediate_size": 768}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
KNOWN_MODELS = {
    "Qwen2.5-3B": KnownModel("qwen2", _sizes(2048, 36, 16, 2, 11008, 151936, tied=True), 3.09, _qwen25("3B")),
    "Qwen2.5-7B": KnownModel("qwen2", _sizes(3584, 28, 28, 4, 18944, 152064), 7.62, _qwen25("7B")),
    "Qwen2.5-14B": KnownModel("qwen2", _sizes(5120, 48, 40, 8, 13824, 152064), 14.77, _qwen25("14B")),
    "Qwen2.5-32B": KnownModel("qwen2", _sizes(5120, 64, 40, 8, 27648, 152064), 32.76, _qwen25("32B")),
    "Qwen2.5-72B": KnownModel("qwen2", _sizes(8192, 80, 64, 8, 29568, 152064), 72.71, _qwen25("72B")),
    "Qwen3-8B": KnownModel("qwen3", _sizes(4096, 36, 32, 8, 12288, 151936, head_dim=128), 8.19, ("Qwen/Qwen3-8B",)),
    "Qwen3-30B-A3B": KnownModel(
        "qwen3_moe",
        _sizes(2048, 48, 32, 4, 6144, 151936, head_dim=128, **_A3B),
        30.53,
        ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-30B-A3B-Instruct-2507"),
    ),
    "Llama-3.3-70B": KnownModel(
        "llama",
        _sizes(8192, 80, 64, 8, 28672, 128256, max_position_embeddings=131072, rope_parameters=_LLAMA3),
        70.55,
        ("meta-llama/Llama-3.3-70B-Instruct", "meta-llama/Llama-3.1-70B-Instruct"),
    ),
    "Mistral-7B-v0.3": KnownModel(
        "mistral",
        _sizes(4096, 32, 32, 8, 14336, 32768, sliding_window=None),
        7.25,
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistralai/Mistral-7B-v0.3"),
    ),
}
HUB_IDS = {hub_id: known for known in KNOWN_MODELS.values() for hub_id in known.hub_ids}


def hf_config(known: KnownModel) -> Any:
    """The HuggingFace config of a known model."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = AutoConfig.for_model(known.model_type, **known.numbers)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[known.model_type]]
    return config


def folder_shape(folder: Path) -> ModelShape:
    """The numbers of a HuggingFace folder. Raises ValueError without a readable config.json of a known architecture."""
    from transformers import AutoConfig

    try:
        return model_shape(AutoConfig.from_pretrained(folder))
    except OSError as error:
        raise ValueError(
            f"{folder} holds no readable config.json ({str(error).splitlines()[0]}); give a local HuggingFace folder "
            "(hf download NAME --local-dir DIR)"
        ) from error


def read_shape(path: str) -> ModelShape:
    """The numbers of a HuggingFace folder, or of a known hub id without a download.

    Raises ValueError for a folder without a readable config.json, an architecture without rules, or an unknown id.
    """
    if Path(path).is_dir():
        return folder_shape(Path(path))
    if path in HUB_IDS:
        return model_shape(hf_config(HUB_IDS[path]))
    near = difflib.get_close_matches(path, HUB_IDS, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"{path!r} is neither a folder nor a model whose numbers are known here.{hint} "
        f"Known are {', '.join(HUB_IDS)}; of any other give a folder, which needs no more than its config.json"
    )

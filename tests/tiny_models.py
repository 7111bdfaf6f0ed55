"""Small real models that tests of several folders make."""

from pathlib import Path

import torch

# Family -> what its tiny config sets beside the sizes. Head sizes differ from hidden size / heads where they may.
FAMILIES = {
    "qwen2": {},
    "qwen3": {"head_dim": 24},
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,  # long wavelengths, which the scaling changes
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    },
    "qwen3_moe": {
        "head_dim": 24,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,  # SGLang leaves padding to such a multiple uninitialised on a CPU
        "norm_topk_prob": True,
    },
    "mistral": {"sliding_window": None, "head_dim": 8},
}


def make_qwen2(folder: Path, *, tied: bool, vocab_size: int = 200, num_layers: int = 4, seed: int = 0) -> Path:
    """A random Qwen2 of a few thousand parameters, saved as HuggingFace saves it."""
    return make_model(folder, "qwen2", tied=tied, vocab_size=vocab_size, num_layers=num_layers, seed=seed)


def make_model(
    folder: Path, family: str, *, tied: bool, vocab_size: int = 200, num_layers: int = 4, seed: int = 0
) -> Path:
    """A random model of a family of a few thousand parameters, saved as HuggingFace saves it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": vocab_size,
            "hidden_size": 64,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
            "tie_word_embeddings": tied,
            **FAMILIES[family],
        },
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:  # initialised to constants, which would hide mapping faults
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    return folder

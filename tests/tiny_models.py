"""Small real models that tests of several folders make."""

from pathlib import Path

import torch


def make_qwen2(folder: Path, *, tied: bool, vocab_size: int = 200, num_layers: int = 4, seed: int = 0) -> Path:
    """A random Qwen2 of a few thousand parameters, saved as HuggingFace saves it."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=512,
        rope_theta=100.0,
        tie_word_embeddings=tied,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:  # initialised to constants, which would hide mapping faults
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    return folder

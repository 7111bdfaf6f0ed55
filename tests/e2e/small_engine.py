"""A random Qwen2 of a few thousand parameters, an engine for it, and what transformers says of its answers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path

import aiohttp
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_ext.buckets import fill_buckets
from megatron_ext.shared_weights import SharedWeights
from searche1.rollout.engine import ADOPT, COMPARE, Engine, shared
from searche1.types import Completion

TOLERANCE = 1e-4
END = "<|im_end|>"


def make_model(*, vocab_size: int, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=128,  # heads of 32, which the C++ kernels know
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        eos_token_id=vocab_size - 1,
    )
    model = Qwen2ForCausalLM(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    return model


def start_options(folder: Path, log_path: Path) -> dict:
    return {
        "model_path": folder,
        "device": "cpu",
        "dtype": "float32",
        "tensor": 1,
        "port": 0,
        "seed": 0,
        "mem_fraction": 0.2,
        "max_total_tokens": 20000,
        "max_running": 64,
        "context_length": 1024,
        "attention_backend": "",
        "log_path": log_path,
    }


def load(
    engine: Engine,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    version: str,
    is_exact: bool = True,
    memory: SharedWeights | None = None,
) -> None:
    """New weights in small buckets, which the engine compares with what it then holds, or in memory it takes over."""
    engine.begin_update()
    for bucket in fill_buckets(memory.take(tensors) if memory else tensors, bucket_bytes=40_000):
        engine.load_bucket([shared(bucket.tensors())])
        if is_exact:
            engine.load_bucket([shared(bucket.tensors())], load_format=COMPARE)
    if memory:
        engine.load_bucket([shared(memory.tensors())], load_format=ADOPT)
    engine.end_update(version=version)


def complete(engine: Engine, prompts: Sequence[Sequence[int]], **options) -> list[Completion]:
    """All prompts at once, sampled with seeds 0, 1, ..."""
    settings = {"max_new_tokens": 24, "temperature": 1.0, "top_p": 1.0, "stop": (), **options}

    async def run() -> list[Completion]:
        async with aiohttp.ClientSession() as session:
            requests = (engine.generate(session, ids, **{"seed": i, **settings}) for i, ids in enumerate(prompts))
            return await asyncio.gather(*requests)

    return asyncio.run(run())


def true_logprobs(model: Qwen2ForCausalLM, ids: Sequence[int]) -> torch.Tensor:
    """Of every id but the first, given those before it."""
    with torch.no_grad():
        logits = model(torch.tensor([list(ids)])).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def worst_gap(model: Qwen2ForCausalLM, prompt: Sequence[int], completion: Completion) -> float:
    expected = true_logprobs(model, [*prompt, *completion.token_ids])[len(prompt) - 1 :]
    return (expected - torch.tensor(completion.logprobs)).abs().max().item()


def prompts_of_many_lengths() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(0, 256, (150,), generator=generator).tolist()
    return [shared[: 5 * i] + torch.randint(0, 256, (i + 1,), generator=generator).tolist() for i in range(30)]

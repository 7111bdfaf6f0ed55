"""One rank of a layout test: GRPO and OPSD steps on fixed data, results written by rank 0."""

import json
import random
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from safetensors.torch import save_file
from torch import Tensor

from megatron_ext.convert import RELEASE
from megatron_ext.hf_io import hf_tensors
from megatron_ext.lora import LoraSettings
from megatron_ext.model import ModelSettings, build_model
from megatron_ext.optimizer import OptimizerSettings
from megatron_ext.parallel import Layout, close_parallel, init_parallel
from searche1.config import Config, GRPOConfig, OPSDConfig, TrainConfig
from searche1.grpo import grpo_step
from searche1.opsd import TrainedPair, opsd_step, token_kls
from searche1.packing import MIN_SHARED_PREFIX, Sample
from searche1.policy import Policy, read_shape
from searche1.types import Group, Question, Span, Trajectory

VOCAB = 200  # not a multiple of 128: the last ranks hold padding columns
CONFIG = Config(
    train=TrainConfig(max_tokens=160, logits_chunk=16),
    grpo=GRPOConfig(mini_batch_size=6, kl_coef=0.1, entropy_coef=0.01),
    opsd=OPSDConfig(pairs_per_step=4, max_teacher_tokens=160),
)
OPTIMIZER = OptimizerSettings(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, grad_clip=1.0, distributed=True)


def ids(generator: random.Random, count: int) -> tuple[int, ...]:
    return tuple(generator.randrange(VOCAB) for _ in range(count))


def trajectory(generator: random.Random, prompt: tuple[int, ...] = ()) -> Trajectory:
    def policy(kind: str) -> Span:
        tokens = ids(generator, generator.randrange(3, 9))
        return Span("policy", kind, tokens, (-5.0,) * len(tokens), "")

    seen = Span("environment", "information", ids(generator, generator.randrange(4, 12)), (), "")
    return Trajectory(prompt or ids(generator, 6), (policy("search"), seen, policy("answer")), "answered")


def groups(generator: random.Random) -> list[Group]:
    """Prompts of two groups are long enough to be packed once, where no context ranks cut them."""
    prompts = (ids(generator, MIN_SHARED_PREFIX), ids(generator, MIN_SHARED_PREFIX + 5), ())
    return [
        Group(
            Question(str(k), "q?", ("a",), "toy"),
            tuple(trajectory(generator, prompts[k]) for _ in range(4)),
            tuple(float(generator.random() < 0.5) for _ in range(4)),
        )
        for k in range(3)
    ]


def pairs(generator: random.Random) -> list[TrainedPair]:
    made = []
    for _ in range(4):
        t = trajectory(generator)
        made.append(
            TrainedPair(
                student=Sample(t.prompt_ids, t.response_ids, t.policy_mask),
                teacher=Sample(ids(generator, 20), t.response_ids, t.policy_mask),
                question="nq:0",
            )
        )
    return made


def copied(policy: Policy) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in policy.hf_weights()}


def train(model: Path, out: Path, layout: Layout, checkpoint: Path | None) -> None:
    """The story of one model; `checkpoint` is another layout's, written between its second and third GRPO step."""
    generator = random.Random(0)
    options = {"model_path": model, "layout": layout, "train": CONFIG.train, "optimizer": OPTIMIZER}

    policy = Policy(**options)
    exported = {"before": copied(policy)}
    reference = policy.snapshot()
    batch = groups(generator)
    # Two steps: in the second the policy has left its reference, so KL and ratios are not trivial.
    metrics = {"grpo": [grpo_step(policy, reference, batch, config=CONFIG, lr=1e-3) for _ in range(2)]}
    exported["grpo"] = copied(policy)
    policy.save_checkpoint(out / "checkpoint", step=2)
    policy.finish_checkpoint()
    metrics["third"] = grpo_step(policy, reference, batch, config=CONFIG, lr=1e-3)
    exported["third"] = copied(policy)

    if checkpoint is not None:
        policy = Policy(**options)
        assert policy.load_checkpoint(checkpoint) == 2
        metrics["continued"] = grpo_step(policy, reference, batch, config=CONFIG, lr=1e-3)
        exported["continued"] = copied(policy)

    policy = Policy(**options, lora=LoraSettings(rank=4, alpha=8, seed=0))
    distilled = pairs(generator)
    metrics["opsd"] = [opsd_step(policy, distilled, config=CONFIG, lr=1e-2) for _ in range(3)]
    exported["opsd"] = copied(policy)
    metrics["token_kls"] = [asdict(kl) for kl in token_kls(policy, distilled, CONFIG)]
    policy.save_adapter(out / "adapter")
    policy.save_checkpoint(out / "adapter_checkpoint", step=3)
    policy.finish_checkpoint()
    policy = Policy(**options, lora=LoraSettings(rank=4, alpha=8, seed=1))
    policy.load_checkpoint(out / "adapter_checkpoint")
    exported["reloaded"] = copied(policy)

    if layout.is_writer:
        for name, tensors in exported.items():
            save_file({k: v.contiguous() for k, v in tensors.items()}, out / f"{name}.safetensors")
        (out / "metrics.json").write_text(json.dumps(metrics))


def convert(model: Path, converted: Path, out: Path, layout: Layout) -> None:
    """Load a converted checkpoint as any program on Megatron does, write what was loaded, and save it from here."""
    shape = read_shape(model)
    built = build_model(shape, ModelSettings(torch.float32, "none"), layout)
    loaded = dist_checkpointing.load({"model": built.sharded_state_dict()}, str(converted / RELEASE))
    built.load_state_dict(loaded["model"])
    exported = {name: tensor.contiguous() for name, tensor in hf_tensors(built, shape, layout)}
    if layout.is_writer:
        save_file(exported, out / "converted.safetensors")
        (out / "resaved").mkdir()
    dist.barrier()
    dist_checkpointing.save({"model": built.sharded_state_dict()}, str(out / "resaved"))


def run_layout(
    root: Path,
    out: Path,
    sizes: dict[str, int],
    trained: tuple[str, ...],
    only_converted: tuple[str, ...],
    continued: Path | None,
) -> None:
    """Train each of `trained` in root/models, and load it and each of `only_converted` from root/converted.

    `out` gets a folder of results for each. `continued` is the `out` of another layout, whose checkpoints go on.
    """
    layout = init_parallel(**sizes, device="cpu")
    for name in trained + only_converted:
        model = root / "models" / name
        if name in trained:
            checkpoint = continued / name / "checkpoint" if continued else None
            train(model, out / name, layout, checkpoint)
        elif layout.is_writer:
            (out / name).mkdir(parents=True)
        convert(model, root / "converted" / name, out / name, layout)
    close_parallel()

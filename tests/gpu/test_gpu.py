"""What only a GPU shows: NCCL, bfloat16, Transformer Engine where it imports, CUDA handles, engine sleep.

Skipped as a whole on a machine without CUDA; scripts/gpu_check.sh runs it on one.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from tiny_models import make_model

from megatron_ext.convert import RELEASE, hf_to_megatron
from megatron_ext.hf_io import HFReader, hf_tensors
from megatron_ext.lora import LoraSettings
from megatron_ext.model import ModelSettings, build_model, has_transformer_engine
from megatron_ext.optimizer import OptimizerSettings
from megatron_ext.parallel import Layout, close_parallel, init_parallel
from megatron_ext.vocab_parallel import TokenLogprobs
from searche1.colocation import Colocation, Phase
from searche1.config import OPSDConfig, TrainConfig
from searche1.engines import free_gpu_bytes
from searche1.opsd import opsd_metrics
from searche1.packing import Sample, make_batches, row_weights
from searche1.policy import Policy, read_shape
from searche1.rollout.engine import start_engine
from searche1.rollout.places import engine_places
from searche1.sync import Link, sync_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

POLICY = Path(__file__).resolve().parents[2] / "searche1" / "assets" / "toy_policy"
OPTIMIZER = OptimizerSettings(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0, grad_clip=1.0, distributed=True)


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    yield init_parallel(tensor=1, pipeline=1, sequence=False, device="cuda")
    close_parallel()


def samples() -> list[Sample]:
    ids = [tuple((7 * k + 11 * n) % 400 + 3 for k in range(length)) for n, length in enumerate((40, 17, 90))]
    return [Sample(x[:8], x[8:], (True,) * (len(x) - 8)) for x in ids]


def batches(layout: Layout):  # type: ignore[no-untyped-def]
    packed = samples()
    weights = row_weights(packed, "sequence_mean")
    return make_batches(packed, weights, max_tokens=512, rank=0, num_ranks=1)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.15)])
def test_logprobs_follow_transformers(layout: Layout, dtype: str, tolerance: float) -> None:
    from transformers import AutoModelForCausalLM

    policy = Policy(model_path=POLICY, layout=layout, train=TrainConfig(dtype=dtype), optimizer=None)
    packed = batches(layout)
    found = policy.by_sample(packed, policy.logprobs(packed, temperature=1.0), num_samples=3)
    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32).cuda()
    for sample, mine in zip(samples(), found, strict=True):
        ids = torch.tensor([sample.prompt_ids + sample.response_ids], device="cuda")
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        theirs = logprobs[7:-1].gather(1, ids[0, 8:, None])[:, 0].cpu()
        assert (torch.tensor(mine) - theirs).abs().mean() < tolerance


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_an_opsd_update_in_bfloat16_lowers_its_loss(layout: Layout, recompute: str) -> None:
    policy = Policy(
        model_path=POLICY,
        layout=layout,
        train=TrainConfig(dtype="bfloat16", recompute=recompute),
        optimizer=OPTIMIZER,
        lora=LoraSettings(rank=8, alpha=16, seed=0),
    )
    packed = batches(layout)
    # Any fixed target will do: the rows of another order of the same samples' hidden states.
    with policy.adapter_disabled():
        teacher = [rows.roll(1, dims=0) for rows in policy.hidden_rows(packed)]
    settings = OPSDConfig()

    def loss(hidden: torch.Tensor, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        weights = packed[index].weights.to(hidden.device)
        value, kl = policy.kl_loss(hidden, teacher[index], weights, kl_clip=settings.kl_clip, temperature=1.0)
        return value, opsd_metrics(kl, weights)

    losses = [policy.train_step(packed, loss, lr=1e-3)["loss"] for _ in range(10)]
    assert losses[-1] < losses[0]


@pytest.mark.skipif(not has_transformer_engine(), reason="needs Transformer Engine")
def test_a_prompt_that_is_packed_once_gives_the_same_logprobs_and_gradient(layout: Layout) -> None:
    """Transformer Engine under a mask from the lower right; what a CPU does is in tests/unit/test_prefixes.py."""
    prompt = tuple(range(3, 103))
    group = [Sample(prompt, tuple((7 * k + n) % 400 + 3 for k in range(n)), (True,) * n) for n in (40, 1, 90)]
    weights = row_weights(group, "token_mean")

    def run(wish: str) -> tuple[torch.Tensor, float]:
        train = TrainConfig(dtype="bfloat16", share_prefix=wish)
        policy = Policy(model_path=POLICY, layout=layout, train=train, optimizer=OPTIMIZER)
        once = policy.share_prefix
        (batch,) = make_batches(group, weights, max_tokens=512, rank=0, num_ranks=1, share_prefix=once)
        assert bool(batch.inputs.prefixes) == once == (wish == "always")
        rows = policy.by_sample([batch], policy.logprobs([batch], temperature=1.0), num_samples=3)

        def row_loss(found: TokenLogprobs, rows: slice) -> torch.Tensor:
            return -(batch.weights.to(layout.device)[rows] * found.logprobs).sum()

        def loss(hidden: torch.Tensor, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            value, _ = policy.token_loss(hidden, batch.targets, row_loss, temperature=1.0)
            return value, {"loss": value.detach()}

        norm = policy.train_step([batch], loss, lr=1e-3)["grad_norm"]
        return torch.tensor([x for sample in rows for x in sample]), norm

    once, often = run("always"), run("never")
    assert (once[0] - often[0]).abs().mean() < 0.05
    assert once[1] == pytest.approx(often[1], rel=0.02)


def test_the_engine_gets_weights_by_handle_sleeps_and_wakes(layout: Layout, tmp_path: Path) -> None:
    policy = Policy(model_path=POLICY, layout=layout, train=TrainConfig(dtype="float32"), optimizer=OPTIMIZER)
    packed = batches(layout)

    def loss(hidden: torch.Tensor, index: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        weights = packed[index].weights.to(hidden.device)

        def row_loss(found: TokenLogprobs, rows: slice) -> torch.Tensor:
            return -(weights[rows] * found.logprobs).sum()

        value, _ = policy.token_loss(hidden, packed[index].targets, row_loss, temperature=1.0)
        return value, {"loss": value.detach()}

    policy.train_step(packed, loss, lr=1e-2)  # now the engine's own weights are stale
    expected = policy.by_sample(packed, policy.logprobs(packed, temperature=1.0), num_samples=3)
    (place,) = engine_places(count=1, tensor=1, device="cuda", world_size=1, ranks_per_node=1)
    free_before = free_gpu_bytes()
    with start_engine(
        model_path=POLICY,
        device="cuda",
        dtype="float32",
        tensor=1,
        port=0,
        seed=0,
        mem_fraction=0.4,
        max_total_tokens=0,
        max_running=64,
        context_length=1000,
        attention_backend="triton",
        log_path=tmp_path / "engine.log",
        sampling_backend="pytorch",
        cuda_graph=False,
        can_sleep=True,
    ) as engine:
        engine.wait_until_ready(timeout_s=600)
        link = Link(place, engine)
        colocation = Colocation(
            is_on=True,
            engines={0: engine},
            free_bytes=free_gpu_bytes,
            free_before_engines=free_before,
            together=lambda work: work(),
        )
        ids = [list(s.prompt_ids + s.response_ids) for s in samples()]
        for version in ("1", "2"):
            awake = free_gpu_bytes()
            colocation.to(Phase.TRAIN, policy)  # measures itself that 0.4 of the GPU came free
            assert free_gpu_bytes() - awake > 0.3 * torch.cuda.get_device_properties(0).total_memory
            policy.train_step(packed, loss, lr=0.0)  # memory that came back is memory that works
            colocation.to(Phase.SYNC, policy)
            sync_weights(policy, [link], version=version, bucket_bytes=1 << 20, is_exact=True)
            colocation.to(Phase.ROLLOUT, policy)
            for mine, theirs in zip(expected, engine.logprobs(ids), strict=True):
                gap = (torch.tensor(mine) - torch.tensor(theirs[7:])).abs().mean()
                assert gap < 1e-2
        colocation.to(Phase.TRAIN, policy)
        with colocation.room_for_start(policy, [0]):  # an engine that died while the trainer had the GPU
            engine.restart()
            engine.wait_until_ready(timeout_s=600)
        policy.train_step(packed, loss, lr=0.0)


def test_the_layer_spec_says_what_it_uses(layout: Layout) -> None:
    policy = Policy(model_path=POLICY, layout=layout, train=TrainConfig(), optimizer=None)
    names = {type(module).__name__ for module in policy._model.modules()}
    assert ("PrefixedSelfAttention" in names) != has_transformer_engine()


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_a_converted_checkpoint_has_all_that_the_layers_of_this_gpu_ask_for(
    layout: Layout, tmp_path: Path, family: str
) -> None:
    """With Transformer Engine these are states of fp8 and grouped experts, which a CPU has not."""
    source = make_model(tmp_path / "source", family, tied=False)
    shape = read_shape(source)
    hf_to_megatron(source, tmp_path / "megatron", shape)
    model = build_model(shape, ModelSettings(torch.float32, "none"), layout)
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(tmp_path / "megatron" / RELEASE))
    model.load_state_dict(loaded["model"])
    reader = HFReader(source)
    for name, tensor in hf_tensors(model, shape, layout):
        assert torch.equal(tensor.cpu(), reader.tensor(name)), name


def test_a_checkpoint_holds_what_was_there_when_it_began_though_training_goes_on(
    layout: Layout, tmp_path: Path
) -> None:
    """The copy to the host is done when `save_checkpoint` returns; the disk is written beside the next update."""

    def make() -> Policy:
        return Policy(model_path=POLICY, layout=layout, train=TrainConfig(), optimizer=OPTIMIZER)

    def loss(hidden, index):  # type: ignore[no-untyped-def]
        return hidden.float().pow(2).mean(), {"loss": hidden.new_zeros(())}

    packed = batches(layout)
    policy = make()
    policy.train_step(packed, loss, lr=1e-3)
    saved = policy.snapshot()
    policy.save_checkpoint(tmp_path / "step_1", step=1)
    policy.train_step(packed, loss, lr=1e-3)
    policy.finish_checkpoint()
    assert any(not torch.equal(saved[name], now) for name, now in policy.snapshot().items())
    again = make()
    assert again.load_checkpoint(tmp_path / "step_1") == 1
    assert all(torch.equal(saved[name], now) for name, now in again.snapshot().items())

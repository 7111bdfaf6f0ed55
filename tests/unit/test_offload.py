"""Memory that goes to the host and back: it is really free meanwhile, and training does not notice."""

import random
from pathlib import Path

import pytest
import torch
from tiny_models import make_qwen2

from megatron_ext import offload as module
from megatron_ext.lora import LoraSettings
from megatron_ext.offload import HostOffload
from megatron_ext.optimizer import OptimizerSettings
from megatron_ext.parallel import Layout
from searche1.config import Config, OPSDConfig, TrainConfig
from searche1.opsd import TrainedPair, opsd_step
from searche1.packing import Sample, make_batches, row_weights
from searche1.policy import Policy

CONFIG = Config(train=TrainConfig(max_tokens=64), opsd=OPSDConfig(pairs_per_step=2, max_teacher_tokens=64))


def test_views_come_back_with_their_bits_and_their_memory_is_free_meanwhile():
    base = torch.arange(100.0)
    view, other = base[10:20].view(2, 5), torch.ones(7, dtype=torch.bfloat16)
    offload = HostOffload([base, view, other])
    assert offload.num_bytes == 400 + 14  # the view has no memory of its own
    assert offload.to_host() == 414 and offload.is_offloaded
    assert base.untyped_storage().nbytes() == other.untyped_storage().nbytes() == 0
    assert offload.to_host() == 0  # nothing is there any more
    offload.back()
    offload.back()
    assert torch.equal(base, torch.arange(100.0)) and torch.equal(view, base[10:20].view(2, 5))
    assert view.data_ptr() == base.data_ptr() + 40 and (other == 1).all()


@pytest.mark.parametrize("slab", [7, 64, 400, 10_000])
def test_host_memory_comes_in_pieces_of_any_size(monkeypatch, slab):
    monkeypatch.setattr(module, "SLAB", slab)
    tensors = [torch.randn(count) for count in (100, 3, 50)]
    before = [x.clone() for x in tensors]
    offload = HostOffload(tensors)
    for _ in range(2):
        assert offload.to_host() == 612
        assert max(len(x) for x in offload._slabs) <= slab and sum(len(x) for x in offload._slabs) == 612
        offload.back()
        assert all(map(torch.equal, tensors, before))


def test_host_memory_goes_to_what_takes_the_place_of_an_optimizers_state():
    old, new = torch.zeros(10), torch.arange(10.0)
    first = HostOffload([old])
    first.to_host()
    slab = first._slabs[0].data_ptr()
    first.back()
    second = HostOffload([new])
    assert first.is_same_memory(HostOffload([old])) and not first.is_same_memory(second)
    second.take_host_memory(first)
    second.to_host()
    assert new.untyped_storage().nbytes() == 0 and second._slabs[0].data_ptr() == slab
    second.back()
    assert torch.equal(new, torch.arange(10.0)) and not old.any()


def test_scratch_memory_is_freed_without_a_copy():
    scratch = torch.zeros(1000)
    offload = HostOffload([scratch], keep_contents=False)
    assert offload.to_host() == 4000 and scratch.untyped_storage().nbytes() == 0
    offload.back()
    assert scratch.zero_().sum() == 0 and len(scratch) == 1000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen2(tmp_path_factory.mktemp("offload") / "model", tied=True)


def pairs() -> list[TrainedPair]:
    dice = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(dice.randrange(200) for _ in range(count))

    made = []
    for _ in range(2):
        response = ids(8)
        made.append(TrainedPair(Sample(ids(5), response, (True,) * 8), Sample(ids(12), response, (True,) * 8), "nq:0"))
    return made


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4, alpha=8, seed=0)])
def test_training_with_trips_to_the_host_gives_the_same_bits(
    layout: Layout, model: Path, distributed: bool, lora: LoraSettings | None
):
    settings = OptimizerSettings(lr=1e-2, betas=(0.9, 0.999), weight_decay=0.0, grad_clip=1.0, distributed=distributed)

    def trained(*, with_trips: bool) -> dict[str, torch.Tensor]:
        policy = Policy(model_path=model, layout=layout, train=CONFIG.train, optimizer=settings, lora=lora)
        for _ in range(3):
            if with_trips:
                moved = policy.optimizer_to_host()
                weights = policy.weights_to_host()
                assert moved > 0 and weights > 0
                assert all(p.untyped_storage().nbytes() == 0 for p in policy._model.parameters())
                with pytest.raises(AssertionError):
                    policy.snapshot()
                policy.to_device()
            if lora is None:
                # Without an adapter teacher and student are one model: any gradient will do.
                _plain_step(policy)
            else:
                opsd_step(policy, pairs(), config=CONFIG, lr=1e-2)
        return policy.snapshot()

    stayed, travelled = trained(with_trips=False), trained(with_trips=True)
    assert stayed.keys() == travelled.keys()
    assert all(torch.equal(stayed[name], travelled[name]) for name in stayed)


def _plain_step(policy: Policy) -> None:
    samples = [pair.student for pair in pairs()]
    batches = make_batches(samples, row_weights(samples, "token_mean"), max_tokens=64, rank=0, num_ranks=1)

    def loss(hidden: torch.Tensor, index: int):
        value, _ = policy.token_loss(
            hidden, batches[index].targets, lambda new, rows: -new.logprobs.sum(), temperature=1.0
        )
        return value, {"loss": value.detach()}

    policy.train_step(batches, loss, lr=1e-2)

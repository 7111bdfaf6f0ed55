"""Updates of a policy in one process: they do what they say, and checkpoints continue them to the bit."""

import os
import random
import signal
from dataclasses import replace

import numpy
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from one_policy import (
    ADAM,
    LORA,
    TRAIN,
    assert_same_bits,
    batches,
    exported,
    likelihood_loss,
    logprobs,
    samples,
    update,
)
from tiny_models import make_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from megatron_ext.checkpoint import find_damage
from megatron_ext.flops import head_flops, layer_flops
from searche1.packing import make_batches, pack, row_weights
from searche1.policy import read_shape
from searche1.types import UserError, disk_fault

# -- updates --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lora", "lr"), [(None, 3e-3), (LORA, 3e-2)], ids=["all weights", "adapter"])
def test_updates_on_the_same_samples_lower_the_loss(make_policy, lora, lr):
    policy = make_policy(lora=lora)
    losses = [update(policy, lr=lr)["loss"] for _ in range(15)]
    assert losses[-1] < 0.5 * losses[0]
    assert policy.version == 15


def test_splitting_a_mini_batch_into_micro_batches_changes_neither_loss_nor_gradient(make_policy):
    assert len(batches(max_tokens=20)) > len(batches()) == 1
    whole, split = (update(make_policy(), max_tokens=tokens) for tokens in (64, 20))
    assert split == pytest.approx(whole, rel=1e-5)


def test_any_packing_over_any_number_of_data_ranks_gives_the_same_loss_and_gradient(make_policy):
    """The sum over ranks, which the trainer takes by a collective, is taken here one rank after another."""
    members = [*samples(0), *samples(1), *samples(2)]
    weights = row_weights(members, "sequence_mean")

    def summed(*, max_tokens, num_ranks):
        policy = make_policy(optimizer=replace(ADAM, grad_clip=1e9))
        packed = [
            batch
            for rank in range(num_ranks)
            for batch in make_batches(
                members, weights, max_tokens=max_tokens, rank=rank, num_ranks=num_ranks, attention_cost=0.01
            )
        ]
        metrics = policy.train_step(packed, likelihood_loss(policy, packed), lr=1e-3)
        return len(packed), metrics["loss"], torch.cat([p.main_grad.flatten() for p in policy._model.parameters()])

    _, loss, gradient = summed(max_tokens=1000, num_ranks=1)
    assert gradient.norm() > 0.1
    for max_tokens, num_ranks in ((1000, 3), (40, 1), (40, 5), (20, 2), (20, 16)):
        number, found, its_gradient = summed(max_tokens=max_tokens, num_ranks=num_ranks)
        assert number >= num_ranks
        assert found == pytest.approx(loss, rel=1e-6)
        assert (its_gradient - gradient).norm() <= 3e-6 * gradient.norm()


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_the_flops_of_a_model_are_what_torch_counts_in_transformers(family, tmp_path):
    folder = make_model(tmp_path / "model", family, tied=False)
    shape = read_shape(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    for length in (5, 23):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, length, dtype=torch.int64))
        products = counter.flop_counts["Global"][torch.ops.aten.bmm]  # attention, without leaving out the future
        rotary = 2 * length * shape.head_dim // 2
        linears = layer_flops(shape, length, 0) + head_flops(shape, length)
        assert counter.get_total_flops() - products == pytest.approx(
            linears, rel=0.02
        )  # norms and biases are no products
        assert products - rotary == 2 * (layer_flops(shape, length, length) - layer_flops(shape, length, 0))


def test_an_empty_micro_batch_adds_nothing_to_an_update(make_policy):
    def run(with_empty):
        policy = make_policy()
        packed = batches() + ([pack([], [], [])] if with_empty else [])
        nll = likelihood_loss(policy, packed)

        def loss(hidden, index):
            if index == 1:
                assert hidden.shape[0] == 0
                value, _ = policy.token_loss(
                    hidden, packed[1].targets, lambda found, rows: found.logprobs.sum(), temperature=1.0
                )
                return value, {"loss": hidden.new_zeros(()), "logprob_max": hidden.new_tensor(-100.0)}
            return nll(hidden, index)

        return policy.train_step(packed, loss, lr=1e-3), exported(policy)

    (metrics, weights), (plain_metrics, plain_weights) = run(True), run(False)
    assert metrics == plain_metrics
    assert_same_bits(weights, plain_weights)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_leaves_the_weights_and_the_next_update_alone(make_policy, scale):
    hurt, healthy = make_policy(), make_policy()
    before = exported(hurt)
    metrics = update(hurt, scale=scale)
    assert metrics["is_skipped"] == 1.0
    assert_same_bits(exported(hurt), before)
    after, expected = update(hurt), update(healthy)
    assert after == expected and after["is_skipped"] == 0.0
    assert_same_bits(exported(hurt), exported(healthy))


@pytest.mark.parametrize("mode", ["recompute", "materialized"])
def test_every_mode_of_the_losses_gives_the_same_updates(make_policy, mode):
    for lora in (None, LORA):
        plain, other = (make_policy(train=replace(TRAIN, loss_mode=m), lora=lora) for m in ("chunked", mode))
        for _ in range(2):
            assert update(other) == pytest.approx(update(plain), rel=1e-5)
        for one, two in zip(exported(plain).values(), exported(other).values(), strict=True):
            # Adam divides by a gradient's size: of one near zero its rounding moves the weight, by some of a step.
            torch.testing.assert_close(one, two, rtol=0, atol=2e-4)
            assert ((one - two).abs() > 2e-5).float().mean() < 1e-3


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_activations_give_the_same_update(make_policy, recompute):
    plain, recomputed = (make_policy(train=replace(TRAIN, recompute=r)) for r in ("none", recompute))
    assert update(recomputed) == pytest.approx(update(plain), rel=1e-6)
    weights, expected = exported(recomputed), exported(plain)
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=1e-6)


def test_an_adapter_gets_the_same_gradient_however_activations_are_recomputed(make_policy):
    """Its base is frozen, embedding included, and a recomputed layer whose input needs no gradient gives none."""
    plain, selective, full = (
        update(make_policy(train=replace(TRAIN, recompute=recompute), lora=LORA))
        for recompute in ("none", "selective", "full")
    )
    assert plain["grad_norm"] > 1e-2 and plain["is_skipped"] == 0.0
    assert selective == pytest.approx(plain, rel=1e-5)
    assert full == pytest.approx(plain, rel=1e-5)


def test_the_gradient_norm_is_reported_before_it_is_clipped(make_policy):
    loose, tight = (make_policy(optimizer=replace(ADAM, grad_clip=clip)) for clip in (1e6, 1e-3))
    norms = [update(policy)["grad_norm"] for policy in (loose, tight)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6) and norms[0] > 1e-2


def test_a_policy_without_an_optimizer_cannot_be_updated(make_policy):
    with pytest.raises(AssertionError, match="without an optimizer"):
        update(make_policy(optimizer=None))


def test_another_snapshots_weights_are_lent_and_given_back(make_policy):
    policy = make_policy()
    start, at_start = policy.snapshot(), logprobs(policy)
    update(policy, lr=1e-2)
    moved, at_moved = policy.snapshot(), logprobs(policy)
    assert not torch.equal(at_start, at_moved)
    with policy.weights(start):
        assert torch.equal(logprobs(policy), at_start)
    assert torch.equal(logprobs(policy), at_moved)
    assert_same_bits(policy.snapshot(), moved)
    policy.restore(start)
    assert torch.equal(logprobs(policy), at_start)


def test_lending_weights_between_updates_does_not_change_the_next_update(make_policy):
    lending, plain = make_policy(), make_policy()
    start = lending.snapshot()
    for policy in (lending, plain):
        update(policy)
    with lending.weights(start):
        logprobs(lending)
    assert update(lending) == update(plain)
    assert_same_bits(exported(lending), exported(plain))


def test_a_run_continued_from_a_checkpoint_gives_the_same_bits(make_policy, tmp_path):
    policy = make_policy()
    for _ in range(3):
        update(policy)
    policy.save_checkpoint(tmp_path / "step_3", step=3)
    assert [p.suffix for p in tmp_path.iterdir()] == [".partial"]
    expected = [update(policy) for _ in range(2)]  # while it is written
    policy.finish_checkpoint()
    assert [p.name for p in tmp_path.iterdir()] == ["step_3"]
    assert find_damage(tmp_path / "step_3") == ""

    continued = make_policy()
    assert continued.load_checkpoint(tmp_path / "step_3") == 3
    assert continued.version == 3
    assert [update(continued) for _ in range(2)] == expected
    assert_same_bits(exported(continued), exported(policy))


@pytest.mark.parametrize("victim", ["write_preloaded_data_multiproc", "write_preloaded_data"])
def test_a_writer_that_is_killed_is_told_and_makes_no_checkpoint(make_policy, tmp_path, monkeypatch, victim):
    """The process that a rank forks, and the ones that it forks in turn."""

    def be_killed(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(FileSystemWriterAsync, victim, staticmethod(be_killed))
    policy = make_policy()
    update(policy)
    policy.save_checkpoint(tmp_path / "step_1", step=1)
    with pytest.raises(UserError, match=r"ended before it was done.*run the same command again"):
        policy.finish_checkpoint()
    assert not (tmp_path / "step_1").exists()
    monkeypatch.undo()
    policy.save_checkpoint(tmp_path / "step_2", step=2)
    policy.finish_checkpoint()
    assert make_policy().load_checkpoint(tmp_path / "step_2") == 2


def test_no_step_draws_from_a_generator_so_none_is_saved(make_policy):
    """What a continued run needs of chance comes from seeds: docs/reliability.md."""

    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())

    policy = make_policy(lora=LORA)
    before = states()
    update(policy)
    logprobs(policy)
    assert states() == before


def test_a_checkpoint_replaces_an_older_one_of_the_same_name(make_policy, tmp_path):
    policy = make_policy()
    for step in (1, 2):
        update(policy)
        policy.save_checkpoint(tmp_path / "last", step=step)
        policy.finish_checkpoint()
    assert make_policy().load_checkpoint(tmp_path / "last") == 2


def test_a_disk_that_is_full_when_a_checkpoint_begins_is_a_fault_of_the_disk(make_policy, tmp_path, monkeypatch):
    policy = make_policy()
    update(policy)

    def save(*_: object, **__: object) -> None:
        torch.save({"step": torch.zeros(100_000)}, "/dev/full")

    monkeypatch.setattr(dist_checkpointing, "save", save)
    with pytest.raises(OSError, match="the disk is full or broken") as caught:
        policy.save_checkpoint(tmp_path / "step_1", step=1)
    assert "could not be written" in str(disk_fault(caught.value))


def test_a_gpu_without_memory_left_names_the_settings_that_decide(make_policy):
    def loss(hidden, index):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    with pytest.raises(UserError, match=r"9\.00 GiB.*train\.max_tokens \(now 64\).*train\.recompute=full"):
        make_policy().train_step(batches(), loss, lr=1e-3)

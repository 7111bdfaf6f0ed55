"""The trainable policy in one process: the same numbers as transformers and PEFT, and updates that do what they say."""

import json
import os
import random
import signal
from dataclasses import replace

import numpy
import pytest
import torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import FAMILIES, make_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GemmaConfig

from megatron_ext.checkpoint import find_damage
from megatron_ext.flops import head_flops, layer_flops
from megatron_ext.lora import LoraSettings
from megatron_ext.optimizer import OptimizerSettings
from megatron_ext.parallel import close_parallel, init_parallel
from searche1.config import TrainConfig
from searche1.models import choose_dtype, resolve_model
from searche1.packing import Sample, Sharing, make_batches, pack, row_weights
from searche1.policy import Policy, read_shape
from searche1.types import UserError

TRAIN = TrainConfig(max_tokens=64, logits_chunk=8)
ADAM = OptimizerSettings(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, grad_clip=1.0, distributed=True)
LORA = LoraSettings(rank=4, alpha=8, seed=3)
LENGTHS = ((6, 11), (1, 4), (9, 1), (3, 17))  # tokens of prompt and response


@pytest.fixture(scope="module")
def layout():
    yield init_parallel(tensor=1, pipeline=1, sequence=False, device="cpu")
    close_parallel()


@pytest.fixture
def make_policy(tiny_qwen2, layout):
    def run(*, folder=tiny_qwen2, train=TRAIN, optimizer=ADAM, lora=None):
        return Policy(model_path=folder, layout=layout, train=train, optimizer=optimizer, lora=lora)

    return run


def samples(seed=0):
    """Responses whose middle third is an observation."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for prompt, response in LENGTHS:
        ids = torch.randint(200, (prompt + response,), generator=generator).tolist()
        mask = tuple(not response // 3 <= k < 2 * response // 3 for k in range(response))
        made.append(Sample(tuple(ids[:prompt]), tuple(ids[prompt:]), mask))
    return made


def batches(of=None, *, max_tokens=64):
    of = samples() if of is None else of
    weights = row_weights(of, "token_mean")
    return make_batches(of, weights, max_tokens=max_tokens, rank=0, num_ranks=1)


def logprobs(policy, of=None, *, temperature=1.0, max_tokens=64):
    """Every sample's policy logprobs, one after another."""
    packed = batches(of, max_tokens=max_tokens)
    rows = policy.by_sample(packed, policy.logprobs(packed, temperature=temperature), num_samples=len(of or samples()))
    return torch.tensor([x for sample in rows for x in sample])


def transformers_logprobs(model, *, temperature=1.0):
    found = []
    for sample in samples():
        ids = torch.tensor([sample.prompt_ids + sample.response_ids])
        with torch.no_grad():
            log_p = (model(ids).logits[0].float() / temperature).log_softmax(-1)
        first = len(sample.prompt_ids)
        found += [log_p[first + k - 1, sample.response_ids[k]] for k, mine in enumerate(sample.policy_mask) if mine]
    return torch.stack(found)


def likelihood_loss(policy, packed, *, scale=1.0):
    """Weighted negative log-likelihood of the policy tokens."""

    def loss(hidden, index):
        def row_loss(found, rows):
            return -(packed[index].weights[rows] * found.logprobs).sum() * scale

        value, found = policy.token_loss(hidden, packed[index].targets, row_loss, temperature=1.0)
        highest = max(found.logprobs, default=hidden.new_tensor(-100.0))  # an empty micro-batch has none
        return value, {"loss": value.detach(), "logprob_max": highest}

    return loss


def update(policy, *, scale=1.0, lr=1e-3, max_tokens=64):
    packed = batches(max_tokens=max_tokens)
    return policy.train_step(packed, likelihood_loss(policy, packed, scale=scale), lr=lr)


def exported(policy):
    return {name: tensor.clone() for name, tensor in policy.hf_weights()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def randomize_adapter(policy):
    generator = torch.Generator().manual_seed(9)
    fresh = policy.snapshot()
    policy.restore({name: torch.randn(p.shape, generator=generator) * 0.1 for name, p in fresh.items()})


# -- the same model as transformers' --------------------------------------------------------------


def test_weights_come_back_to_the_same_bits(tiny_qwen2, make_policy):
    assert_same_bits(exported(make_policy()), load_file(tiny_qwen2 / "model.safetensors"))


def test_a_saved_folder_is_one_that_transformers_loads(tiny_qwen2, make_policy, tmp_path):
    make_policy(optimizer=None).save_hf(tmp_path / "hf")
    found, original = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "hf", tiny_qwen2))
    assert_same_bits(found.state_dict(), original.state_dict())


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen2"])
def test_every_family_is_the_model_that_transformers_has(family, is_tied, make_policy, tmp_path):
    folder = make_model(tmp_path / "model", family, tied=is_tied)
    policy = make_policy(folder=folder, lora=LORA)
    assert_same_bits(exported(policy), load_file(folder / "model.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.testing.assert_close(logprobs(policy), transformers_logprobs(model), rtol=0, atol=1e-4)

    randomize_adapter(policy)
    policy.save_adapter(tmp_path / "adapter")
    policy.save_hf(tmp_path / "merged")
    adapted = transformers_logprobs(PeftModel.from_pretrained(model, tmp_path / "adapter").eval())
    merged = transformers_logprobs(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval())
    for expected in (adapted, merged):
        torch.testing.assert_close(logprobs(policy), expected, rtol=0, atol=1e-4)


def test_llama_3s_scaled_positions_are_not_ordinary_ones(make_policy, tmp_path):
    folder = make_model(tmp_path / "model", "llama", tied=False)
    scaled = logprobs(make_policy(folder=folder, optimizer=None))
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_parameters"]["rope_theta"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert (logprobs(make_policy(folder=folder, optimizer=None)) - scaled).abs().max() > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_of_packed_sequences_equal_transformers(tiny_qwen2, make_policy, temperature):
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2).eval()
    expected = transformers_logprobs(model, temperature=temperature)
    found = logprobs(make_policy(), temperature=temperature)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_neighbour_in_the_pack_changes_no_bit(make_policy):
    policy = make_policy(optimizer=None)
    mine, first, second = samples(0)[0], samples(1), samples(2)
    for place in range(3):
        found = []
        for others in (first, second):
            members = [*others[1:3]]
            members.insert(place, mine)
            batch = pack(members, row_weights(members, "token_mean"), range(3))
            rows = policy.logprobs([batch], temperature=1.0)[0]
            found.append(rows[batch.sample_of_row == place])
        assert torch.equal(*found)


def test_padding_behind_the_sequences_changes_nothing(make_policy):
    policy = make_policy(optimizer=None)
    weights = row_weights(samples(), "token_mean")
    plain, padded = (pack(samples(), weights, range(4), sharing=Sharing(sequence=multiple)) for multiple in (1, 64))
    assert len(padded.inputs.token_ids) == 64 > len(plain.inputs.token_ids)
    one, other = (policy.logprobs([batch], temperature=1.0)[0] for batch in (plain, padded))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


# -- what cannot work -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 3}, r"4 attention heads, which tensor-parallel size 3.*parallel\.tensor to a divisor of 4"),
        ({"tensor": 4}, r"2 key-value heads, which tensor-parallel size 4.*parallel\.tensor to a divisor of 2"),
        ({"pipeline": 3}, r"4 layers, which pipeline-parallel size 3.*parallel\.pipeline to a divisor of 4"),
    ],
)
def test_a_layout_that_cannot_hold_the_model_is_told_which_size_to_change(tiny_qwen2, layout, sizes, message):
    with pytest.raises(UserError, match=message):
        Policy(model_path=tiny_qwen2, layout=replace(layout, **sizes), train=TRAIN, optimizer=None)


def test_too_few_processes_for_the_layout_are_told_how_many_to_start():
    with pytest.raises(ValueError, match="1 processes cannot hold tensor-parallel 2 x pipeline-parallel 1"):
        init_parallel(tensor=2, pipeline=1, sequence=False, device="cpu")
    with pytest.raises(ValueError, match="x context-parallel 3; start a multiple of 3 processes"):
        init_parallel(tensor=1, pipeline=1, context=3, sequence=False, device="cpu")


def test_sequence_parallelism_without_tensor_parallelism_is_refused():
    with pytest.raises(ValueError, match="needs tensor parallelism of at least 2"):
        init_parallel(tensor=1, pipeline=1, sequence=True, device="cpu")


def test_unknown_choices_name_the_known_ones(make_policy, layout):
    with pytest.raises(UserError, match=r"recompute must be one of .*'full', 'none', 'selective'.*got 'ful'"):
        make_policy(train=replace(TRAIN, recompute="ful"))
    with pytest.raises(UserError, match=r"train\.dtype must be one of .*got 'fp32'"):
        choose_dtype("fp32", "cpu")


def test_a_folder_of_another_family_is_refused_as_a_users_mistake(make_policy, tmp_path):
    GemmaConfig(architectures=["GemmaForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="GemmaForCausalLM"):
        make_policy(folder=tmp_path)


def test_a_model_that_is_no_folder_and_no_name_is_refused():
    with pytest.raises(UserError, match="neither a folder nor a model that can be downloaded"):
        resolve_model("no/such/place")


# -- adapters -------------------------------------------------------------------------------------


def test_a_fresh_adapter_changes_no_bit(make_policy):
    adapted, plain = make_policy(lora=LORA), make_policy(optimizer=None)
    assert torch.equal(logprobs(adapted), logprobs(plain))
    assert_same_bits(exported(adapted), exported(plain))


def test_merged_weights_give_the_adapters_logprobs(make_policy, tmp_path):
    policy = make_policy(lora=LORA)
    before = logprobs(policy)
    randomize_adapter(policy)
    assert (logprobs(policy) - before).abs().max() > 0.1
    policy.save_hf(tmp_path / "hf")
    merged = make_policy(folder=tmp_path / "hf", optimizer=None)
    torch.testing.assert_close(logprobs(merged), logprobs(policy), rtol=0, atol=1e-5)


def test_with_the_adapter_off_the_model_is_its_base_and_then_itself_again(make_policy):
    policy, base = make_policy(lora=LORA), logprobs(make_policy(optimizer=None))
    randomize_adapter(policy)
    adapted = logprobs(policy)
    with policy.adapter_disabled():
        assert torch.equal(logprobs(policy), base)
    assert torch.equal(logprobs(policy), adapted)


def test_peft_loads_the_saved_adapter_and_computes_the_same_logprobs(tiny_qwen2, make_policy, tmp_path):
    policy = make_policy(lora=LORA)
    randomize_adapter(policy)
    policy.save_adapter(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    expected = transformers_logprobs(model)
    torch.testing.assert_close(logprobs(policy), expected, rtol=0, atol=1e-4)
    with model.disable_adapter():
        assert (transformers_logprobs(model) - expected).abs().max() > 0.1


def test_training_an_adapter_moves_it_and_nothing_else(make_policy):
    policy = make_policy(lora=LORA)
    before, base = policy.snapshot(), logprobs(policy)
    assert all("lora" in name for name in before)
    update(policy, lr=1e-2)
    after = policy.snapshot()
    assert all(not torch.equal(before[name], after[name]) for name in before if ".b." in name)
    with policy.adapter_disabled():
        assert torch.equal(logprobs(policy), base)
    assert not torch.equal(logprobs(policy), base)


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
            torch.testing.assert_close(one, two, rtol=0, atol=2e-5)


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


def test_a_gpu_without_memory_left_names_the_settings_that_decide(make_policy):
    def loss(hidden, index):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    with pytest.raises(UserError, match=r"9\.00 GiB.*train\.max_tokens \(now 64\).*train\.recompute=full"):
        make_policy().train_step(batches(), loss, lr=1e-3)

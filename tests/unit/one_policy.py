"""Samples, losses and comparisons for tests of a policy in one process."""

import torch

from megatron_ext.lora import LoraSettings
from megatron_ext.optimizer import OptimizerSettings
from searche1.config import TrainConfig
from searche1.packing import Sample, make_batches, row_weights

TRAIN = TrainConfig(max_tokens=64, logits_chunk=8)
ADAM = OptimizerSettings(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.01, grad_clip=1.0, distributed=True)
LORA = LoraSettings(rank=4, alpha=8, seed=3)
LENGTHS = ((6, 11), (1, 4), (9, 1), (3, 17))  # tokens of prompt and response


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

"""The engine's C++ layers against PyTorch in float64, and what they leave to SGLang's own."""

import ctypes
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from megatron_ext import blas
from searche1.rollout import engine_ops as ops
from searche1.rollout.cpu_kernels import seeded_multinomial

WHY_NOT = ops.library() if isinstance(ops.library(), str) else ""
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


def unlike(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in units of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


class Layer(SimpleNamespace):
    """As much of SGLang's layers as is read; its own forward says that it was asked."""

    def forward_native(self, *arguments):
        return ("native", len(arguments))


@pytest.mark.parametrize("size", ops.HEAD_SIZES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
def test_a_new_token_attends_to_all_tokens_of_its_request_wherever_they_are(size, heads, kv_heads):
    torch.manual_seed(0)
    lengths = torch.tensor([1, 7, 8, 33, 250])
    places, requests = 400, len(lengths)
    slots = torch.stack([torch.randperm(places)[:256] for _ in range(9)]).int()
    numbers = torch.randperm(9)[:requests]
    query = 3 * torch.randn(requests, heads, size)
    keys, values = torch.randn(2, places, kv_heads, size)
    assert ops.can_attend(query, keys)
    output = torch.full_like(query, float("nan"))
    options = {"keys": keys, "values": values, "slots": slots, "scale": size**-0.5}
    ops.attention(query, output, numbers=numbers, lengths=lengths, counts=None, **options)
    for i, length in enumerate(lengths.tolist()):
        own = slots[numbers[i], :length].long()
        k, v = (x[own].double().transpose(0, 1) for x in (keys, values))
        expected = F.scaled_dot_product_attention(query[i].double()[:, None], k, v, enable_gqa=True)[:, 0]
        assert unlike(output[i], expected) < 2e-6
    alone = torch.empty_like(query[3:4])
    ops.attention(query[3:4], alone, numbers=numbers[3:4], lengths=lengths[3:4], counts=None, **options)
    assert torch.equal(alone[0], output[3])  # the same bits in any company


@pytest.mark.parametrize("size", ops.HEAD_SIZES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (40, 1)])
def test_new_tokens_attend_to_what_is_known_and_to_new_ones_up_to_themselves(size, heads, kv_heads):
    torch.manual_seed(0)
    counts = torch.tensor([1, 7, 2, 33, 150])  # of a prompt alone, behind known tokens, and more than a block
    lengths = torch.tensor([9, 7, 40, 96, 250])
    places = 500
    slots = torch.stack([torch.randperm(places)[:256] for _ in range(9)]).int()
    numbers = torch.randperm(9)[: len(lengths)]
    query = 3 * torch.randn(int(counts.sum()), heads, size)
    keys, values = torch.randn(2, places, kv_heads, size)
    output = torch.full_like(query, float("nan"))
    options = {"keys": keys, "values": values, "slots": slots, "scale": size**-0.5}
    ops.attention(query, output, numbers=numbers, lengths=lengths, counts=counts, **options)
    parts = zip(query.split(counts.tolist()), output.split(counts.tolist()), numbers, lengths.tolist(), strict=True)
    for asked, found, number, length in parts:
        k, v = (x[slots[number, :length].long()].double().transpose(0, 1) for x in (keys, values))
        mask = causal_lower_right(len(asked), length)
        expected = F.scaled_dot_product_attention(
            asked.double().transpose(0, 1)[None], k[None], v[None], attn_mask=mask, enable_gqa=True
        )
        assert unlike(found, expected[0].transpose(0, 1)) < 5e-6
    last = slice(-150, None)
    alone = torch.empty_like(query[last])
    ops.attention(query[last], alone, numbers=numbers[-1:], lengths=lengths[-1:], counts=counts[-1:], **options)
    assert torch.equal(alone, output[last])  # the same bits in any company


@dataclass
class Weights:
    """Of a decoder layer; products as [out, in], as checkpoints have them."""

    heads: int
    kv_heads: int
    size: int
    norms: torch.Tensor  # [2, hidden]
    qkv: torch.Tensor
    bias: torch.Tensor | None
    out: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor

    @staticmethod
    def random(*, heads: int, kv_heads: int, size: int, hidden: int, width: int, has_bias: bool) -> "Weights":
        packed = (heads + 2 * kv_heads) * size
        shapes = ((packed, hidden), (hidden, heads * size), (2 * width, hidden), (hidden, width))
        qkv, out, gate_up, down = (torch.randn(shape) / shape[1] ** 0.5 for shape in shapes)
        bias = torch.randn(packed) if has_bias else None
        return Weights(heads, kv_heads, size, 1 + torch.rand(2, hidden), qkv, bias, out, gate_up, down)

    def as_layer(self, table: torch.Tensor, kept: list[torch.Tensor], *, products: str = "panels") -> ops.Layer:
        layer = ops.Layer(
            sgemm=blas.sgemm_address(),
            hidden=self.qkv.shape[1],
            heads=self.heads,
            kv_heads=self.kv_heads,
            size=self.size,
            width=self.down.shape[1],
            eps=1e-6,
            scale=self.size**-0.5,
            angles=table.data_ptr(),
            before_attention=self.norms[0].data_ptr(),
            before_mlp=self.norms[1].data_ptr(),
        )
        for name in ("qkv", "out", "gate_up", "down"):
            weight = getattr(self, name).t().contiguous()
            kept.append(weight)
            getattr(layer, name).weight = weight.data_ptr()
            if products == "panels":
                panels = ops.empty_panels(weight.t()).fill_(float("nan"))
                kept.append(panels)
                ops.to_panels(weight.t(), panels)
                getattr(layer, name).panels = panels.data_ptr()
        layer.qkv.bias = None if self.bias is None else self.bias.data_ptr()
        return layer

    def expected(self, x, residual, *, positions, table, own):
        """Of one request in float64: all its tokens x, of which those before are known; `own` are (keys, values)."""
        total = x.double() if residual is None else x.double() + residual.double()
        width = x.shape[-1]
        normed = F.rms_norm(total, (width,), self.norms[0].double(), 1e-6)
        packed = F.linear(normed, self.qkv.double(), None if self.bias is None else self.bias.double())
        split = [self.heads * self.size, self.kv_heads * self.size, self.kv_heads * self.size]
        q, k, v = (part.unflatten(-1, (-1, self.size)) for part in packed.split(split, dim=-1))
        cos, sin = (part[:, None].double() for part in table[positions].chunk(2, dim=-1))

        def rotated(heads):
            first, second = heads.chunk(2, dim=-1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

        known_k, known_v = (part.double() for part in own)
        k, v = torch.cat([known_k, rotated(k)]), torch.cat([known_v, v])
        attended = F.scaled_dot_product_attention(
            rotated(q).transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=causal_lower_right(len(q), len(k)),
            enable_gqa=True,
        )
        total = total + F.linear(attended[0].transpose(0, 1).flatten(1), self.out.double())
        normed = F.rms_norm(total, (width,), self.norms[1].double(), 1e-6)
        gate, up = F.linear(normed, self.gate_up.double()).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down.double()), total, k, v


@pytest.mark.skipif(bool(blas.missing()), reason=blas.missing())
@pytest.mark.parametrize("products", ["OpenBLAS", "panels"])
@pytest.mark.parametrize("counts", [None, [1, 5, 40]])
@pytest.mark.parametrize(("has_bias", "has_residual"), [(True, True), (False, False)])
@pytest.mark.parametrize(("heads", "kv_heads", "size", "hidden", "width"), [(4, 2, 32, 96, 160), (3, 1, 64, 128, 48)])
def test_a_decoder_layer(heads, kv_heads, size, hidden, width, has_bias, has_residual, counts, products):
    torch.manual_seed(0)
    weights = Weights.random(heads=heads, kv_heads=kv_heads, size=size, hidden=hidden, width=width, has_bias=has_bias)
    lengths, new = [1, 9, 70], counts or [1, 1, 1]
    table = torch.randn(100, size)
    slots = torch.randperm(7 * 80).int().view(7, 80)
    numbers = torch.tensor([5, 0, 2])
    keys, values = torch.randn(2, 7 * 80, kv_heads, size)
    before = keys.clone(), values.clone()
    positions = torch.cat([torch.arange(length - n, length) for length, n in zip(lengths, new, strict=True)])
    places = torch.cat(
        [slots[number, length - n : length] for number, length, n in zip(numbers, lengths, new, strict=True)]
    ).long()
    x = torch.randn(sum(new), hidden)
    residual = torch.randn(sum(new), hidden) if has_residual else None
    kept: list[torch.Tensor] = []
    layer = weights.as_layer(table, kept, products=products)
    layer.keys, layer.values = keys.data_ptr(), values.data_ptr()
    lengths_, counts_ = torch.tensor(lengths), torch.tensor(new)
    tokens = ops.Tokens(
        count=len(x),
        requests=3,
        slots_stride=80,
        positions=positions.data_ptr(),
        places=places.data_ptr(),
        numbers=numbers.data_ptr(),
        lengths=lengths_.data_ptr(),
        counts=counts_.data_ptr() if counts else None,
        slots=slots.data_ptr(),
    )
    out, total = torch.full((2, *x.shape), float("nan"))
    scratch = torch.full((len(x) * layer.scratch(),), float("nan"))
    given = (x.data_ptr(), None if residual is None else residual.data_ptr())
    ops.kernels().ops_layer(
        ctypes.byref(layer), ctypes.byref(tokens), *given, scratch.data_ptr(), total.data_ptr(), out.data_ptr()
    )
    at = 0
    for number, length, n in zip(numbers, lengths, new, strict=True):
        rows = slice(at, at + n)
        known = slots[number, : length - n].long()
        expected, expected_total, k, v = weights.expected(
            x[rows],
            None if residual is None else residual[rows],
            positions=positions[rows],
            table=table,
            own=(before[0][known], before[1][known]),
        )
        own = slots[number, :length].long()
        assert unlike(out[rows], expected) < 1e-5 and unlike(total[rows], expected_total) < 1e-5
        assert unlike(keys[own], k) < 1e-5 and unlike(values[own], v) < 1e-5
        at += n
    others = torch.ones(len(keys), dtype=torch.bool)
    others[places] = False
    assert torch.equal(keys[others], before[0][others]) and torch.equal(values[others], before[1][others])


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("inner", "columns"), [(1, 16), (37, 48), (256, 160), (4864, 32)])
def test_products_from_panels(inner, columns, has_bias):
    torch.manual_seed(0)
    weight, bias = torch.randn(inner, columns).t(), torch.randn(columns) if has_bias else None
    panels = ops.empty_panels(weight).fill_(float("nan"))
    ops.to_panels(weight, panels)
    x = torch.randn(30, inner)
    rows: dict[int, torch.Tensor] = {}
    for count in (1, 2, 5, 6, 7, 11, 12, 13, 25, 30):
        out = torch.full((count + 1, columns), float("nan"))
        pointers = (x.data_ptr(), panels.data_ptr(), None if bias is None else bias.data_ptr(), out.data_ptr())
        ops.kernels().ops_product(count, inner, columns, *pointers)
        assert (
            unlike(out[:-1], F.linear(x[:count].double(), weight.double(), bias if bias is None else bias.double()))
            < 1e-5
        )
        assert out[-1].isnan().all()  # nothing is written behind
        rows[count] = out[:-1]
    assert all(torch.equal(found, rows[30][:count]) for count, found in rows.items())  # the same bits in any company


class SmallModel:
    """Two layers between an embedding and a head, with a cache of `PLACES` places."""

    PLACES = 500

    def __init__(self) -> None:
        self.layers = [
            Weights.random(heads=4, kv_heads=2, size=32, hidden=96, width=160, has_bias=True) for _ in range(2)
        ]
        self.embedding, self.head = torch.randn(2, 50, 96)
        self.norm, self.table = 1 + torch.rand(96), torch.randn(100, 32)
        self.caches = torch.full((2, 2, self.PLACES, 2, 32), float("nan"))
        self.slots = torch.randperm(self.PLACES).int().view(5, 100)
        self.newest = torch.zeros(5, dtype=torch.int64)
        self.kept: list[torch.Tensor] = []
        self.structs = (ops.Layer * 2)(*(layer.as_layer(self.table, self.kept) for layer in self.layers))
        for struct, (keys, values) in zip(self.structs, self.caches, strict=True):
            struct.keys, struct.values = keys.data_ptr(), values.data_ptr()
        self.struct = ops.Model(
            layers=ctypes.addressof(self.structs),
            sgemm=blas.sgemm_address(),
            count=2,
            vocab=50,
            scratch=self.structs[0].scratch(),
            embedding=self.embedding.data_ptr(),
            norm=self.norm.data_ptr(),
            head=self.head.data_ptr(),
        )

    def start(self, numbers, lengths, *, new=None, temperatures=None, seeds=None, will_end=()):
        """The drawn ids and their logprobs, which are there after ops_wait. `new` are each request's new ids."""
        counts = [1] * len(lengths) if new is None else [len(ids) for ids in new]
        places = [
            self.slots[number, length - count : length]
            for number, length, count in zip(numbers, lengths, counts, strict=True)
        ]
        drawn, logprobs = torch.full((len(numbers),), -1, dtype=torch.int32), torch.empty(len(numbers))
        tensors = {
            "places": torch.cat(places).long(),
            "numbers": torch.tensor(numbers),
            "lengths": torch.tensor(lengths),
            "slots": self.slots,
        }
        others = {"newest": self.newest, "drawn": drawn, "logprobs": logprobs}
        if new is not None:
            tensors["counts"], others["ids"] = torch.tensor(counts), torch.tensor([id for ids in new for id in ids])
        if temperatures is not None:
            others |= {"temperatures": torch.tensor(temperatures), "seeds": torch.tensor(seeds)}
        self.kept += [*tensors.values(), *others.values()]
        tokens = ops.Tokens(
            count=sum(counts),
            requests=len(numbers),
            slots_stride=100,
            **{name: x.data_ptr() for name, x in tensors.items()},
        )
        batch = ops.Batch(tokens=tokens, **{name: x.data_ptr() for name, x in others.items()})
        ops.kernels().ops_start(ctypes.byref(self.struct), ctypes.byref(batch))
        STARTED.append(batch)
        if will_end:  # the scheduler gives its row to another request
            self.slots[list(will_end)] = 0
        return drawn, logprobs

    def expected(self, ids: list[int]) -> torch.Tensor:
        """Logprobs of the next token in float64."""
        x, residual, nothing = self.embedding[ids], None, torch.empty(0, 2, 32)
        for layer in self.layers:
            positions = torch.arange(len(ids))
            x, residual, *_ = layer.expected(x, residual, positions=positions, table=self.table, own=(nothing, nothing))
        last = F.rms_norm((x + residual)[-1], (96,), self.norm.double(), 1e-6)
        return F.log_softmax(self.head.double() @ last, dim=-1)


STARTED: list[ops.Batch] = []  # in this process


@pytest.mark.skipif(bool(blas.missing()), reason=blas.missing())
@pytest.mark.parametrize("is_greedy", [True, False])
def test_batches_in_the_stream_continue_what_those_before_them_drew(is_greedy):
    torch.manual_seed(1)
    model = SmallModel()
    prompts = {3: [7, 1, 49, 12, 30], 0: [9], 4: [int(x) for x in torch.randint(50, (40,))]}
    temperatures, seeds = {3: 1.0, 0: 0.7, 4: 1.3}, {3: 5, 0: 2**31 - 1, 4: 0}

    def options(numbers):
        if is_greedy:
            return {}
        return {"temperatures": [temperatures[k] for k in numbers], "seeds": [seeds[k] for k in numbers]}

    # Nobody looks at an id before all batches are handed over; a request comes later, and one leaves early.
    lengths = {number: len(ids) for number, ids in prompts.items()}
    found: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {number: [] for number in prompts}
    steps = [([3, 0], True), ([3, 0], False), ([4], True), ([0, 4, 3], False), ([4, 3], False), ([3, 4], False)]
    for step, (numbers, is_first) in enumerate(steps):
        will_end = [k for k in numbers if not any(k in others for others, _ in steps[step + 1 :])]
        for number in numbers if not is_first else []:
            lengths[number] += 1
        new = [prompts[number] for number in numbers] if is_first else None
        drawn, logprobs = model.start(
            numbers, [lengths[k] for k in numbers], new=new, will_end=will_end, **options(numbers)
        )
        for row, number in enumerate(numbers):
            found[number].append((drawn[row], logprobs[row]))
    ops.kernels().ops_wait(len(STARTED))

    for number, prompt in prompts.items():
        ids = list(prompt)
        for drawn, logprob in found[number]:
            expected = model.expected(ids)
            if is_greedy:
                assert drawn == expected.argmax()
            else:
                scaled = (expected / temperatures[number])[None]
                wanted = seeded_multinomial(scaled, torch.tensor([seeds[number]]), torch.tensor([len(ids) - 1]))
                assert drawn == wanted
            assert abs(logprob - expected[drawn]) < 2e-5
            ids.append(int(drawn))
        assert model.newest[number] == ids[-1]


@pytest.mark.skipif(bool(blas.missing()), reason=blas.missing())
@pytest.mark.parametrize("company", [1, 5, 30])
def test_a_request_has_the_same_bits_in_any_company(company):
    torch.manual_seed(2)
    model = SmallModel()
    prompt, other = [5, 6, 7, 8], [int(x) for x in torch.randint(50, (company,))]
    _, alone = model.start([1], [4], new=[prompt])
    _, together = model.start([0, 2], [company, 4], new=[other, prompt])
    ops.kernels().ops_wait(len(STARTED))
    keys = model.caches[:, :, model.slots[1, :4].long()], model.caches[:, :, model.slots[2, :4].long()]
    assert torch.equal(*keys) and abs(alone[0] - together[1]) < 1e-6  # the head's product is OpenBLAS's


def test_the_likeliest_ids_are_the_first_of_equals():
    logits = torch.randn(3, 1001)
    logits[1, [17, 400]] = 9.0
    ids, logprobs = torch.empty(3, dtype=torch.int32), torch.empty(3)
    ops.kernels().ops_likeliest(3, 1001, *(x.data_ptr() for x in (logits, ids, logprobs)))
    assert ids.tolist() == logits.argmax(-1).tolist() and ids[1] == 17
    assert unlike(logprobs, logits.double().log_softmax(-1).amax(-1)) < 1e-6


def test_other_sizes_and_dtypes_are_left_to_pytorch():
    assert not ops.can_attend(torch.zeros(2, 2, 80), torch.zeros(9, 2, 80))
    assert not ops.can_attend(torch.zeros(2, 2, 64).bfloat16(), torch.zeros(9, 2, 64).bfloat16())


@pytest.mark.parametrize("width", [16, 128, 896])
def test_the_norm_and_the_sum_that_it_is_of(width):
    torch.manual_seed(0)
    x, residual, weight = 5 * torch.randn(7, width), torch.randn(7, width), torch.randn(width)
    layer = Layer(weight=weight, variance_epsilon=1e-6, variance_size_override=None)
    normed, total = ops.rms_norm(layer, x, residual)
    assert torch.equal(total, x + residual)
    assert unlike(normed, F.rms_norm(total.double(), (width,), weight.double(), 1e-6)) < 1e-6
    assert unlike(ops.rms_norm(layer, x), F.rms_norm(x.double(), (width,), weight.double(), 1e-6)) < 1e-6
    assert ops.rms_norm(layer, x, residual, x) == ("native", 3)
    assert ops.rms_norm(layer, x.bfloat16()) == ("native", 3)
    assert ops.rms_norm(Layer(**{**vars(layer), "variance_size_override": 8}), x) == ("native", 3)


def test_the_gate_of_the_feed_forward_layer():
    x = torch.cat([torch.linspace(-120, 120, 64), torch.linspace(-3, 3, 64)]).repeat(3, 1)
    found = ops.silu_and_mul(Layer(), x)
    assert found.shape == (3, 64)
    assert unlike(found, F.silu(x[:, :64].double()) * x[:, 64:].double()) < 1e-6
    assert ops.silu_and_mul(Layer(), x[:, :24]) == ("native", 1)  # halves of 12


@pytest.mark.parametrize("size", [32, 64, 128])
def test_positions_rotate_queries_and_keys(size):
    torch.manual_seed(0)
    half = size // 2
    angle = torch.arange(50)[:, None] * 100.0 ** (-torch.arange(half) / half)
    table = torch.cat([angle.cos(), angle.sin()], dim=-1)
    layer = Layer(head_size=size, rotary_dim=size, is_neox_style=True, cos_sin_cache=table)
    packed = torch.randn(6, 5 * size)  # as the projection gives them: rows of q, k and v
    query, key, _ = packed.split([3 * size, size, size], dim=-1)
    positions = torch.tensor([0, 1, 2, 49, 7, 7])
    for x, found in zip((query, key), ops.rotate(layer, positions, query, key), strict=True):
        a, b = x.double().reshape(6, -1, 2, half).unbind(2)
        cos, sin = (part[:, None].double() for part in table[positions].chunk(2, dim=-1))
        expected = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(1)
        assert found.shape == x.shape and unlike(found, expected) < 1e-6
    assert ops.rotate(Layer(**{**vars(layer), "is_neox_style": False}), positions, query, key) == ("native", 3)
    assert ops.rotate(layer, positions, query, key, positions) == ("native", 4)


@pytest.mark.parametrize("vocab", [1, 7, 426, 5000])
def test_draws_are_those_of_plain_pytorch(vocab):
    torch.manual_seed(0)
    logprobs = (3 * torch.randn(500, vocab)).log_softmax(-1).double()
    logprobs[::3, : vocab // 2] = -torch.inf
    seeds, positions = torch.randint(0, 2**31, (500,)), torch.randint(0, 999, (500,))
    assert torch.equal(
        ops.seeded_multinomial(logprobs, seeds, positions), seeded_multinomial(logprobs, seeds, positions)
    )


@pytest.mark.parametrize("vocab", [1, 7, 426, 20_000])
def test_a_sample_is_the_draw_at_its_temperature_and_has_the_logprob_at_temperature_1(vocab):
    torch.manual_seed(0)
    logits = 3 * torch.randn(300, vocab)
    logits[::3, : vocab // 2] = -torch.inf
    temperatures = torch.rand(300, 1) + 0.3
    seeds, positions = torch.randint(0, 2**31, (300,)), torch.randint(0, 999, (300,))
    logits += torch.tensor([[0.0], [40.0], [-9.0]]).repeat(100, 1)
    ids, logprobs = ops.sample(logits, temperatures, seeds, positions)
    expected = seeded_multinomial((logits.double() / temperatures).log_softmax(-1), seeds, positions)
    assert torch.equal(ids[:, None].long(), expected)
    assert torch.allclose(logprobs, logits.double().log_softmax(-1).gather(1, expected)[:, 0].float(), atol=2e-6)
    alone = ops.sample(logits[5:6], temperatures[5:6], seeds[5:6], positions[5:6])
    assert torch.equal(alone[0], ids[5:6]) and torch.equal(alone[1], logprobs[5:6])  # the same bits in any company


PLAIN = {
    "sampling_seed": torch.tensor([1, 2]),
    "temperatures": torch.ones(2, 1),
    "is_all_greedy": False,
    "need_top_p_sampling": False,
    "need_top_k_sampling": False,
    "need_min_p_sampling": False,
    "grammars": None,
    "sampling_mask_batch_indices": None,
}


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({"sampling_seed": None}, {}),
        ({"is_all_greedy": True}, {}),
        ({"need_top_k_sampling": True}, {}),
        ({"grammars": ["one"]}, {}),
        ({}, {"top_nums": [0, 3]}),
        ({}, {"token_ids": [None, [4]]}),
    ],
)
def test_what_wants_more_than_a_draw_is_sampled_by_sglang(change, options):
    layer = Layer(rl_on_policy_target=None, _preprocess_logits=lambda logits, info: logits)
    output = SimpleNamespace(next_token_logits=torch.randn(2, 50))
    wanted = {"top_nums": [0, 0], "token_ids": [None, None], **options}
    sample = ops.sampler(lambda *arguments: "SGLang", has_original_logprobs=True)
    positions = torch.tensor([3, 4])
    assert sample(layer, output, SimpleNamespace(**(PLAIN | change)), True, **wanted, positions=positions) == "SGLang"
    ids = sample(layer, output, SimpleNamespace(**PLAIN), True, [0, 0], [None, None], positions)
    expected = output.next_token_logits.log_softmax(-1)[torch.arange(2), ids.long()]
    assert torch.allclose(output.next_token_logprobs, expected)

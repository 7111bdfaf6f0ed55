"""Flat buckets: what goes in comes out, in order, and never twice in the same memory."""

import pytest
import torch

from megatron_ext.buckets import SharedDoubleBuffer, fill_buckets


def tensors() -> list[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 5), (7,), (1,), (40, 30), (2, 2, 2), (600,), (5,)]
    types = [torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.bfloat16, torch.float32, torch.float64]
    return [
        (f"t{k}", torch.randn(size, generator=generator).to(dtype))
        for k, (size, dtype) in enumerate(zip(sizes, types, strict=True))
    ]


@pytest.mark.parametrize("bucket_bytes", [1, 256, 1000, 5000, 1 << 20])
def test_every_tensor_comes_out_once_in_order_with_its_bits(bucket_bytes):
    given = tensors()
    found = [item for bucket in fill_buckets(given, bucket_bytes=bucket_bytes) for item in bucket.tensors()]
    assert [name for name, _ in found] == [name for name, _ in given]
    for (_, out), (_, put_in) in zip(found, given, strict=True):
        assert out.dtype == put_in.dtype and out.shape == put_in.shape and torch.equal(out, put_in)


def test_a_bucket_is_as_large_as_asked_unless_one_tensor_is_larger():
    sizes = [(len(b.buffer), len(b.slots)) for b in fill_buckets(tensors(), bucket_bytes=2000)]
    assert [count for _, count in sizes] == [3, 1, 1, 1, 1]
    assert all(size <= 2000 + 256 or count == 1 for size, count in sizes)


def test_tensors_of_a_bucket_share_one_memory_and_buckets_share_none():
    buckets = list(fill_buckets(tensors(), bucket_bytes=2000))
    memories = [{t.untyped_storage().data_ptr() for _, t in bucket.tensors()} for bucket in buckets]
    assert all(len(memory) == 1 for memory in memories)
    assert len(set.union(*memories)) == len(buckets)


def test_a_mostly_empty_bucket_holds_no_more_memory_than_it_needs():
    (bucket,) = fill_buckets(tensors()[:3], bucket_bytes=1 << 20)
    assert bucket.buffer.untyped_storage().nbytes() < 2000


def test_a_bucket_is_a_copy():
    given = tensors()
    (bucket,) = fill_buckets(given, bucket_bytes=1 << 20)
    given[0][1].zero_()
    assert next(bucket.tensors())[1].abs().sum() > 0


def test_no_tensors_make_no_bucket():
    assert list(fill_buckets([], bucket_bytes=100)) == []


def test_shared_buffers_take_turns_and_grow():
    allocate = SharedDoubleBuffer()
    one, other = allocate(1000), allocate(1000)
    assert one.is_shared() and other.is_shared() and len(one) == len(other) == 1000
    assert len({one.data_ptr(), other.data_ptr()}) == 2
    assert allocate(600).data_ptr() == one.data_ptr()
    assert len(larger := allocate(5000)) == 5000 and larger.is_shared()
    assert allocate(1000).data_ptr() == one.data_ptr()


def test_buckets_in_shared_buffers_hold_the_same_tensors():
    given = tensors()
    found = []
    for bucket in fill_buckets(given, bucket_bytes=2000, allocate=SharedDoubleBuffer()):
        assert bucket.buffer.is_shared()
        found += [(name, tensor.clone()) for name, tensor in bucket.tensors()]  # before the next one comes
    assert all(n == m and torch.equal(a, b) for (n, a), (m, b) in zip(found, given, strict=True))

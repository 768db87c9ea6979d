from __future__ import annotations

import torch
from torch import Tensor

from megatron_orz.rollout.transport import Bucket, buckets


def unpack(bucket: Bucket) -> list[tuple[str, Tensor]]:
    sizes = [torch.Size(shape).numel() for shape in bucket.shapes]
    tensors = bucket.payload.clone().view(bucket.dtype).split(sizes)
    return [(name, flat.view(shape)) for name, flat, shape in zip(bucket.names, tensors, bucket.shapes, strict=True)]


def test_buckets_carry_every_tensor_unchanged_in_order() -> None:
    weights = [
        ("matrix", torch.randn(8, 16)),  # 512 bytes
        ("transposed", torch.randn(16, 8).t()),
        ("scalar", torch.tensor(3.0)),
        ("half", torch.randn(7).bfloat16()),  # another type begins another bucket
        ("large", torch.randn(1000).bfloat16()),  # larger than a bucket
        ("last", torch.randn(3)),
    ]
    received = []
    num_buckets = 0
    for bucket in buckets(iter(weights), 1024):
        received += unpack(bucket)
        num_buckets += 1
    assert [name for name, _ in received] == [name for name, _ in weights]
    for (_, actual), (_, expected) in zip(received, weights, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert num_buckets == 5  # matrix transposed | scalar | half | large | last


def test_a_bucket_is_filled_to_its_capacity() -> None:
    weights = ((str(index), torch.zeros(64)) for index in range(10))
    assert [len(bucket.payload) for bucket in buckets(weights, 1024)] == [1024, 1024, 512]


def test_no_weights_fill_no_bucket() -> None:
    assert list(buckets(iter([]), 1024)) == []

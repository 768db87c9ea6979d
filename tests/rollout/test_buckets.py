from __future__ import annotations

import json
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from megatron_orz.rollout.buckets import fill_buckets, num_payload_bytes, read_bucket


def memory(num_bytes: int) -> Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8)


def sent_and_read(
    weights: Iterable[tuple[str, Tensor]], capacity_bytes: int, dtype: torch.dtype | None = None
) -> list[list[tuple[str, Tensor]]]:
    """What a receiver makes of each bucket, from its header as JSON and a copy of its bytes."""
    read = []
    for bucket in fill_buckets(weights, capacity_bytes, memory, dtype=dtype):
        header = json.loads(json.dumps(bucket.header))
        assert num_payload_bytes(header) == len(bucket.payload)
        read.append(read_bucket(header, bucket.payload.clone()).tensors())
    return read


def test_buckets_carry_every_tensor_unchanged_in_order() -> None:
    weights = [
        ("matrix", torch.randn(8, 16)),  # 512 bytes
        ("transposed", torch.randn(16, 8).t()),
        ("scalar", torch.tensor(3.0)),
        ("half", torch.randn(7).bfloat16()),  # another type begins another bucket
        ("large", torch.randn(1000).bfloat16()),  # larger than a bucket
        ("last", torch.randn(3)),
    ]
    buckets = sent_and_read(weights, 1024)
    received = [item for bucket in buckets for item in bucket]
    assert [name for name, _ in received] == [name for name, _ in weights]
    for (_, actual), (_, expected) in zip(received, weights, strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert len(buckets) == 5  # matrix transposed | scalar | half | large | last


@pytest.mark.parametrize("capacity_bytes", [256, 1 << 20])
def test_floating_point_is_converted_on_the_way(capacity_bytes: int) -> None:
    weights = [("float", torch.randn(40, 3)), ("half", torch.randn(7).half()), ("integer", torch.arange(9))]
    received = dict(item for bucket in sent_and_read(weights, capacity_bytes, torch.bfloat16) for item in bucket)
    assert torch.equal(received["float"], weights[0][1].bfloat16())
    assert torch.equal(received["half"], weights[1][1].bfloat16())
    assert torch.equal(received["integer"], weights[2][1])


def test_a_bucket_is_filled_to_its_capacity() -> None:
    weights = ((str(index), torch.zeros(64)) for index in range(10))
    sizes = [len(bucket.payload) for bucket in fill_buckets(weights, 1024, memory)]
    assert sizes == [1024, 1024, 512]


def test_a_buffer_is_asked_for_when_a_bucket_begins() -> None:
    """A tensor that is larger than a bucket asks for more; nothing is written to memory that was not asked for."""
    asked = []

    def buffer(num_bytes: int) -> Tensor:
        asked.append(num_bytes)
        return memory(num_bytes)

    weights = [("small", torch.zeros(8)), ("large", torch.zeros(1000)), ("last", torch.zeros(8))]
    assert len(list(fill_buckets(weights, 1024, buffer))) == 3
    assert asked == [1024, 4000, 1024]


def test_no_weights_fill_no_bucket() -> None:
    assert list(fill_buckets(iter([]), 1024, memory)) == []

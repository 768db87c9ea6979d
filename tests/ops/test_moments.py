"""Moments under a mask, whole and in parts."""

import torch

from megatron_orz.ops.moments import combine_moments, masked_moments


def test_moments_are_count_mean_and_squared_deviations() -> None:
    x = torch.tensor([1.0, 100.0, 3.0, 8.0])
    mask = torch.tensor([True, False, True, True])
    assert masked_moments(x, mask).tolist() == [3.0, 4.0, 9.0 + 1.0 + 16.0]


def test_moments_ignore_what_is_masked_even_when_it_is_not_a_number() -> None:
    x = torch.tensor([1.0, float("nan"), float("inf")])
    assert masked_moments(x, torch.tensor([True, False, False])).tolist() == [1.0, 1.0, 0.0]
    assert masked_moments(x, torch.zeros(3, dtype=torch.bool)).tolist() == [0.0, 0.0, 0.0]


def test_combined_moments_of_parts_are_those_of_the_whole() -> None:
    """Parts of 0, 1 and many entries; from a mean this far from 0, E[x^2] - E[x]^2 would keep 4 digits."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e6
    parts = [masked_moments(part, torch.ones_like(part, dtype=torch.bool)) for part in x.split([0, 1, 299, 700])]
    expected = torch.stack([torch.tensor(1000.0).double(), x.mean(), (x - x.mean()).square().sum()])
    torch.testing.assert_close(combine_moments(torch.stack(parts)), expected, rtol=1e-10, atol=0)

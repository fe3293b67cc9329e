"""The share of a device's peak."""

from __future__ import annotations

import pytest

from dist_ft.train.mfu import flops_per_token, peak_flops


@pytest.mark.parametrize(
    ("device", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA H200", "float32", 67e12),
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA L40S", "bfloat16", 362e12),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("NVIDIA A10G", "float32", 31.2e12),
        ("NVIDIA GeForce RTX 4090", "bfloat16", None),
        ("cpu", "float32", None),
    ],
)
def test_the_peak_is_known_by_the_name_of_the_device_or_not_at_all(device: str, dtype: str, peak: float | None) -> None:
    assert peak_flops(device, dtype) == peak


def test_a_frozen_weight_counts_four_and_a_trained_one_six() -> None:
    assert flops_per_token(100, 100) == 600
    assert flops_per_token(100, 10) == 4 * 90 + 6 * 10

"""Model FLOPs utilisation: which share of the devices' peak the model's own products take; pure.

Counted are the products with the weights: 2 per parameter and token forward, 2 backward to the activations, 2 to the
gradients of trained weights (Kaplan et al. 2020, appendix; without attention's own products, and without what gradient
checkpointing repeats, as in Chowdhery et al. 2022). So a frozen base counts 4, a trained weight 6.
"""

from __future__ import annotations

_PEAKS = {
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "A10G": (70e12, 31.2e12),
    "A10": (125e12, 31.2e12),
}
"""Part of a device's name → FLOPs a second, dense, in bfloat16 and in float32 without TF32, by NVIDIA's data sheets.

The first that fits holds.
"""


def peak_flops(device: str, dtype: str) -> float | None:
    """Return the peak of a device in FLOPs a second; None where it is not known.

    Args:
        device: Its name, as torch gives it, or `cpu`.
        dtype: `model.dtype`: bfloat16 or float32.
    """
    words = device.replace("-", " ").split()
    for name, peaks in _PEAKS.items():
        if all(word in words for word in name.split()):
            return peaks[dtype != "bfloat16"]
    return None


def flops_per_token(num_params: int, num_trained: int) -> int:
    """Return the FLOPs that a token takes, forward and backward."""
    return 4 * num_params + 2 * num_trained

"""A teacher for the tiny model: the same shape and tokens, other weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_ft.model.embedded import TINY, materialise


def make_teacher(directory: Path) -> Path:
    """Writes the tiny model with noise on its weights, so that it has opinions; returns the directory."""
    model = AutoModelForCausalLM.from_pretrained(materialise(TINY))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(materialise(TINY)).save_pretrained(directory)
    return directory

"""Embedded models are made on every node by the first rank there, which is seldom rank 0."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dist_ft.model import embedded


def test_a_rank_other_than_0_makes_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embedded._make_tiny(tmp_path / "alone")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 1)
    embedded._make_tiny(tmp_path / "rank-1")
    alone, rank = ({f.name: f.read_bytes() for f in (tmp_path / d).iterdir()} for d in ("alone", "rank-1"))
    assert "model.safetensors" in alone and alone == rank

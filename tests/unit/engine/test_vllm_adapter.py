"""What vLLM takes of an adapter, from its files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dist_ft.engine.vllm_adapter import vllm_adapter
from dist_ft.errors import UsageError

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def write(directory: Path, rank: int = 8, layer: str = LAYER, **settings: Any) -> Path:
    plain = {"peft_type": "LORA", "r": rank, "lora_alpha": 16, "base_model_name_or_path": "org/base", "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps({**plain, **settings}))
    a, b = np.zeros((rank, 4), np.float32), np.zeros((4, rank), np.float32)
    save_file({f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}, directory / "adapter_model.safetensors")
    return directory


@pytest.mark.parametrize(("rank", "most"), [(1, 1), (8, 8), (9, 16), (24, 32), (300, 320), (512, 512)])
def test_an_adapter_is_served_beside_its_base_with_room_for_its_rank(rank: int, most: int, tmp_path: Path) -> None:
    found = vllm_adapter(write(tmp_path, rank, use_rslora=True))
    assert (found.base, found.max_rank, found.refused) == ("org/base", most, None)
    assert found.way("my") == (
        f"`vllm serve org/base --enable-lora --max-lora-rank {most} --lora-modules my={tmp_path}`"
    )


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"use_dora": True}, "use_dora=true"),
        ({"modules_to_save": ["lm_head"]}, 'modules_to_save=["lm_head"]'),
        ({"bias": "lora_only"}, "bias=lora_only"),
        ({"alpha_pattern": {"q_proj": 4}}, 'alpha_pattern={"q_proj": 4}'),
        ({"rank_pattern": {"q_proj": 4}}, 'rank_pattern={"q_proj": 4}'),
        ({"peft_type": "IA3"}, "peft_type=IA3"),
        ({"rank": 513}, "r=513 (at most 512)"),
        ({"layer": "base_model.model.lm_head"}, "a layer lm_head"),
        ({"layer": "base_model.model.model.embed_tokens"}, "a layer embed_tokens"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_vllm_does_not_take_is_merged(changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    found = vllm_adapter(write(tmp_path, **changes))
    assert found.refused == what
    assert "--merge" in found.way("my")
    assert "vllm serve DIR --served-model-name my" in found.way("my")


def test_a_whole_model_is_served_as_it_is_and_anything_else_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a model"):
        vllm_adapter(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert vllm_adapter(tmp_path).way("my") == f"`vllm serve {tmp_path} --served-model-name my`"
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(UsageError, match="cannot be read"):
        vllm_adapter(tmp_path)

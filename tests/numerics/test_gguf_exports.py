"""Checkpoints exported in GGUF: whole models, merged ones, adapters with their base, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoConfig

from dist_ft.checkpoint.manifest import MANIFEST, Manifest
from dist_ft.config import Config
from dist_ft.errors import ModelError
from dist_ft.jobs import export, export_gguf
from dist_ft.model.gguf.gguf_file import read_model
from tests.helpers.attempts import prepare, run_path, train
from tests.helpers.configs import tiny_config
from tests.helpers.gguf_cases import make_case
from tests.helpers.ranks import RankServer


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_checkpoint_is_exported_for_llama_cpp(kind: str, tmp_path: Path, ranks: RankServer) -> None:
    make_case("llama", tmp_path / "base")
    config = tiny_config(
        tmp_path, model__name=str(tmp_path / "base"), method__kind=kind, data__eval=None, train__max_steps=2,
        cluster__num_workers=1, optimizer__eps=1e-6,
    )  # fmt: skip
    manifest = train(ranks, config, prepared=prepare(ranks, config)).manifests[2]
    arguments = (config, str(run_path(config)), f"{manifest.directory}/{MANIFEST}")
    export_gguf.run(*arguments, to=str(tmp_path / "whole"), merge=True, dtype="f32")
    whole = tmp_path / "whole"
    assert {file.name for file in whole.iterdir()} == {"model.gguf", "Modelfile", "README.md"}
    compare(whole / "model.gguf", manifest, tmp_path / "base")
    text = (whole / "Modelfile").read_text()
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """')
    assert text.endswith('PARAMETER stop "<|im_end|>"\n')
    if kind == "lora":
        check_adapters(config, arguments, tmp_path)


def check_adapters(config: Config, arguments: tuple[Any, ...], tmp_path: Path) -> None:
    export_gguf.run(*arguments, to=str(tmp_path / "adapter"), dtype="q8_0")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {
        "adapter.gguf", "base.gguf", "Modelfile", "README.md",
    }  # fmt: skip
    assert (tmp_path / "adapter" / "Modelfile").read_text().startswith("FROM ./base.gguf\nADAPTER ./adapter.gguf\n")
    names = {tensor.name for tensor in GGUFReader(tmp_path / "adapter" / "adapter.gguf").tensors}
    assert "blk.0.attn_q.weight.lora_b" in names
    export_gguf.run(*arguments, to=str(tmp_path / "named"), base_name="llama3.2:1b")
    assert not (tmp_path / "named" / "base.gguf").exists()
    assert (tmp_path / "named" / "Modelfile").read_text().startswith("FROM llama3.2:1b\n")
    export.run(*arguments, to=str(tmp_path / "hf"), base_name="org/base")
    found = json.loads((tmp_path / "hf" / "adapter_config.json").read_text())
    assert (found["base_model_name_or_path"], found["revision"]) == ("org/base", None)
    assert 'base_model: "org/base"' in (tmp_path / "hf" / "README.md").read_text()
    dora = config.model_copy(update={"method": config.method.model_copy(update={"use_dora": True})})
    with pytest.raises(ModelError, match=r"use_dora=True.*--merge"):
        export_gguf.run(dora, *arguments[1:], to=str(tmp_path / "refused"))
    assert not (tmp_path / "refused").exists()


def compare(path: Path, manifest: Manifest, base: Path) -> None:
    """Checks that a file computes the logits of training."""
    model = read_model(path, AutoConfig.from_pretrained(base)).eval()
    with torch.no_grad():
        logits = model(torch.tensor([manifest.probe.tokens])).logits[0][:, list(manifest.probe.columns)]
    torch.testing.assert_close(logits, torch.tensor(manifest.probe.logits), rtol=1e-4, atol=1e-4)

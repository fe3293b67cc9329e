"""Kinds of LoRA: trained at stage 3 as at stage 0, then loaded, merged and gone on from by stock PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dist_ft.checkpoint.manifest import MANIFEST, Manifest
from dist_ft.config import Config, with_adapter_settings
from dist_ft.jobs import export
from dist_ft.model.adapter import attach_adapter
from dist_ft.model.base import load_model
from dist_ft.model.embedded import materialise
from dist_ft.storage.store import LocalStore
from tests.helpers.attempts import Attempt, prepare, relative_l2, run_path, train
from tests.helpers.configs import tiny_config
from tests.helpers.families import make_family
from tests.helpers.ranks import RankServer

KINDS: dict[str, dict[str, Any]] = {
    "dora": {"method__use_dora": True, "method__lora_dropout": 0.2},
    "rslora": {"method__use_rslora": True, "method__target_modules": r".*\.(q_proj|up_proj)"},
}


def make_config(data: Path, kind: str, name: str, stage: int, size: int, micro: int, **changes: Any) -> Config:
    common = {"method__kind": "lora", "data__eval": None, "train__max_steps": 3, "optimizer__eps": 1e-6,
              "checkpoint__every_steps": 1, "checkpoint__keep_last": 9, **KINDS[kind]}  # fmt: skip
    shape = {"zero__stage": stage, "cluster__num_workers": size, "train__micro_batch_size": micro}
    return tiny_config(data, run__name=name, **{**common, **shape, **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_the_same_at_stage_3_and_to_stock_peft(kind: str, tmp_path: Path, ranks: RankServer) -> None:
    config = make_config(tmp_path, kind, "alone", 0, 1, 4)
    prepared = prepare(ranks, config)
    alone = train(ranks, config, prepared=prepared)
    # Recomputed layers must gather and drop again what they did the first time.
    cut = make_config(tmp_path, kind, "cut", 3, 2, 1, train__gradient_checkpointing=True)
    run = train(ranks, cut, prepared=prepared)
    assert run.losses == pytest.approx(alone.losses, rel=1e-5)
    assert relative_l2(run.weights(), alone.weights()) < 1e-5
    check_exports(cut, run, tmp_path)
    check_logits_of_slices(cut, run)


@pytest.mark.parametrize(
    "names",
    [
        {"method__target_modules": ["q_proj", "lm_head"], "method__use_dora": True},  # an odd number of parameters
        {"method__target_modules": ["q_proj", "embed_tokens"]},
        {"method__modules_to_save": ["lm_head"]},
        {"method__modules_to_save": ["embed_tokens"]},
    ],
    ids=lambda names: " ".join(map(str, names.values())),
)
def test_tied_layers_come_apart_in_a_merge(names: dict[str, Any], tmp_path: Path, ranks: RankServer) -> None:
    """The base's generation config is one that transformers refuses to write again; the export has it as it is."""
    model = make_family("qwen3", tmp_path / "base")
    (model / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6}')
    config = tiny_config(
        tmp_path, model__name=str(model), method__kind="lora", data__eval=None, train__max_steps=2, zero__stage=2,
        cluster__num_workers=1, optimizer__eps=1e-6, **names,
    )  # fmt: skip
    manifest = train(ranks, config, prepared=prepare(ranks, config)).manifests[2]
    checkpoint = f"{manifest.directory}/{MANIFEST}"
    export.run(config, str(run_path(config)), checkpoint, to=str(tmp_path / "merged"), merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    probe(merged.eval(), manifest)
    assert merged.get_output_embeddings().weight is not merged.get_input_embeddings().weight
    assert (tmp_path / "merged" / "generation_config.json").read_text() == '{"do_sample": false, "temperature": 0.6}'


def check_exports(config: Config, run: Attempt, tmp_path: Path) -> None:
    manifest = run.manifests[3]
    arguments = (config, str(run_path(config)), f"{manifest.directory}/{MANIFEST}")
    export.run(*arguments, to=str(tmp_path / "adapter"))
    export.run(*arguments, to=str(tmp_path / "merged"), merge=True)
    files = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(materialise("tiny-random"), dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    found = adapted.load_adapter(tmp_path / "adapter", adapter_name="again")
    assert not found.missing_keys
    assert not found.unexpected_keys
    assert any(key.endswith("lora_magnitude_vector") for key in files) is config.method.use_dora
    probe(adapted, manifest)
    probe(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), manifest)
    go_on(tmp_path / "adapter", files, config)


def check_logits_of_slices(config: Config, run: Attempt) -> None:
    """What an export computes for a checkpoint without logits is what the ranks computed."""
    assert [step for step, manifest in run.manifests.items() if manifest.probe is None] == [2]
    store = LocalStore(run.run_dir)
    for step in (1, 3):
        trained = run.manifests[step].probe
        found = export.probe_slices(config, store, run.manifests[step])
        assert trained is not None
        assert (found.tokens, found.columns) == (trained.tokens, trained.columns)
        np.testing.assert_allclose(found.logits, trained.logits, rtol=1e-4, atol=1e-5)
    checkpoint = f"{run.manifests[2].directory}/{MANIFEST}"
    answer = export.run(config, str(run_path(config)), checkpoint, to=str(run.run_dir / "middle"), merge=True)
    assert answer["probe_difference"] < 1e-4


def probe(model: Any, manifest: Manifest) -> None:
    assert manifest.probe is not None
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([manifest.probe.tokens])).logits[0][:, list(manifest.probe.columns)]
    trained = torch.tensor(manifest.probe.logits)
    assert float((logits - trained).abs().max() / trained.abs().max()) < 1e-5


def go_on(directory: Path, files: dict[str, torch.Tensor], config: Config) -> None:
    """A second run starts from the exported adapter and need not repeat its settings."""
    raw = config.model_dump(mode="json")
    raw["method"] = {"kind": "lora", "init_from": str(directory)}
    second = with_adapter_settings(Config.model_validate(raw))
    theirs = {**config.method.model_dump(), "init_from": str(directory)}
    theirs["target_modules"] = second.method.target_modules
    assert second.method.model_dump() == theirs
    model = attach_adapter(load_model(second), second)
    trained = {name.replace(".default", ""): p for name, p in model.named_parameters() if p.requires_grad}
    trained = {name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): p for name, p in trained.items()}
    assert trained.keys() == files.keys()
    assert all(torch.equal(trained[name], files[name]) for name in files)

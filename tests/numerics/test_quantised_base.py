"""A quantised base changes numbers once, and nothing else: every allowed stage and size equals one worker."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dist_ft.checkpoint.manifest import MANIFEST
from dist_ft.config import Config, with_model_dir
from dist_ft.config.training_sections import QuantizationConfig
from dist_ft.jobs import export
from dist_ft.model.adapter import load_adapter
from dist_ft.model.base import fingerprint, load_model, load_tokenizer, skeleton
from dist_ft.model.embedded import materialise
from dist_ft.model.trained import model_shape, select_trained
from tests.helpers.attempts import Attempt, relative_l2, run_path, train
from tests.helpers.configs import tiny_config
from tests.helpers.ranks import RankServer

pytest.importorskip("bitsandbytes")
SHAPES = [(1, 2), (2, 2), (2, 3)]
"""Stage and workers, besides stage 0 on one."""


def config(folder: Path, kind: str, name: str, **changes: Any) -> Config:
    """Return a config of the tiny model with a quantised base."""
    changes = {"zero__stage": 0, "cluster__num_workers": 1, **changes}
    return tiny_config(
        folder, run__name=name, method__kind="lora", model__quantization={"kind": kind}, train__max_steps=4, **changes
    )


@pytest.fixture(scope="module", params=["nf4", "int8"])
def undisturbed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, ranks: RankServer
) -> tuple[Path, str, Attempt]:
    folder = tmp_path_factory.mktemp(f"quantised-{request.param}")
    return folder, request.param, train(ranks, config(folder, request.param, "whole"))


def test_every_stage_and_size_gives_the_same(undisturbed: tuple[Path, str, Attempt], ranks: RankServer) -> None:
    folder, kind, first = undisturbed
    for stage, size in SHAPES:
        shape = {"zero__stage": stage, "cluster__num_workers": size}
        found = train(ranks, config(folder, kind, f"s{stage}w{size}", **shape))
        assert found.losses == pytest.approx(first.losses, rel=1e-5)
        assert relative_l2(found.weights(), first.weights()) < 1e-5


def test_a_resume_at_another_size_goes_on_the_same(undisturbed: tuple[Path, str, Attempt], ranks: RankServer) -> None:
    folder, kind, first = undisturbed
    two = {"zero__stage": 2, "cluster__num_workers": 2}
    part = train(ranks, config(folder, kind, "part", **two), stop_after=2)
    rest = train(ranks, config(folder, kind, "part"), start=part.manifests[2])
    assert {**part.losses, **rest.losses} == pytest.approx(first.losses, rel=1e-5)
    assert relative_l2(rest.weights(), first.weights()) < 1e-5


def test_the_adapter_and_the_merged_model_are_what_was_trained(undisturbed: tuple[Path, str, Attempt]) -> None:
    folder, kind, first = undisturbed
    _check_exports(config(folder, kind, "whole"), kind, folder, first)


def _check_exports(asked: Config, kind: str, folder: Path, first: Attempt) -> None:
    manifest = f"{first.manifests[4].directory}/{MANIFEST}"
    export.run(asked, str(run_path(asked)), manifest, str(folder / "adapter"))
    export.run(asked, str(run_path(asked)), manifest, str(folder / "merged"), merge=True)
    tokens = load_tokenizer(asked)("some text to look at", return_tensors="pt").input_ids
    with torch.no_grad():
        adapted = load_adapter(load_model(asked), folder / "adapter").eval()(tokens).logits
        merged = load_model(with_model_dir(asked, str(folder / "merged"))).eval()(tokens).logits
        base = load_model(asked).eval()(tokens).logits
    scale = float(adapted.abs().max())
    # int8 also rounds what goes into a layer, which the merged model does not.
    assert float((merged - adapted).abs().max()) / scale < (2e-2 if kind == "int8" else 1e-4)
    assert float((base - adapted).abs().max()) / scale > (2e-2 if kind == "int8" else 1e-3)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_estimate_is_what_the_weights_take(kind: str, tmp_path: Path) -> None:
    asked = config(tmp_path, kind, "size")
    shape = model_shape(select_trained(skeleton(asked), asked), asked)
    model, plain = (
        load_model(asked),
        load_model(
            config(tmp_path, kind, "plain").model_copy(
                update={"model": asked.model.model_copy(update={"quantization": None})}
            )
        ),
    )
    taken = sum(_held(p) for p in plain.parameters()) - sum(_held(p) for p in model.parameters())
    assert shape.saved_bytes == pytest.approx(taken, rel=0.02)
    assert fingerprint(asked) != fingerprint(with_model_dir(asked, asked.model.name))


STORED = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.bfloat16),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}  # fmt: skip
"""How the files of a base are quantised. Dtype of products and threshold for outliers are not ours."""


@pytest.mark.parametrize("kind", STORED)
def test_a_base_whose_files_are_quantised_trains_as_one_that_is_quantised_here(
    kind: str, tmp_path: Path, ranks: RankServer
) -> None:
    stored = tmp_path / "stored"
    whole = materialise("tiny-random")
    AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32, quantization_config=STORED[kind]).save_pretrained(
        stored
    )
    for file in [*whole.glob("tokenizer*"), *whole.glob("chat_template*")]:
        shutil.copy(file, stored)
    here = {"kind": kind, "double_quant": kind == "nf4"}
    wanted = train(ranks, config(tmp_path, kind, "here").model_copy(update={
        "model": config(tmp_path, kind, "here").model.model_copy(update={"quantization": QuantizationConfig(**here)})
    }))  # fmt: skip
    changes = {"model__name": str(stored), "method__kind": "lora", "train__max_steps": 4}
    asked = tiny_config(tmp_path, run__name="stored", zero__stage=0, cluster__num_workers=1, **changes)
    found = train(ranks, asked)
    assert found.losses == wanted.losses
    assert relative_l2(found.weights(), wanted.weights()) == 0
    if kind == "nf4":  # the others differ in what is packed alone
        two = tiny_config(tmp_path, run__name="two", zero__stage=2, cluster__num_workers=2, **changes)
        part = train(ranks, two, stop_after=2)
        one = asked.model_copy(update={"run": two.run})
        rest = train(ranks, one, start=part.manifests[2])
        assert {**part.losses, **rest.losses} == pytest.approx(found.losses, rel=1e-5)
        assert relative_l2(rest.weights(), found.weights()) < 1e-5
    _check_exports(asked, kind, tmp_path, found)
    shape, same = (
        model_shape(select_trained(skeleton(one), one), one)
        for one in (asked, asked.model_copy(update={"model": asked.model.model_copy(update={
            "name": "tiny-random", "quantization": QuantizationConfig(**here)})}))
    )  # fmt: skip
    assert shape == same


def _held(parameter: torch.nn.Parameter) -> int:
    """Return the bytes of a parameter with the scales beside it."""
    state = getattr(parameter, "quant_state", None)
    scales = [state.absmax, *([state.state2.absmax] if state.nested else [])] if state is not None else []
    rows = getattr(parameter, "SCB", None)
    return sum(t.numel() * t.element_size() for t in [parameter.data, *scales, *([rows] if rows is not None else [])])

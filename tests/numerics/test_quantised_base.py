"""A quantised base changes numbers once, and nothing else: every allowed stage and size equals one worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_ft.checkpoint.manifest import MANIFEST
from dist_ft.config import Config, with_model_dir
from dist_ft.jobs import export
from dist_ft.model.adapter import load_adapter
from dist_ft.model.base import fingerprint, load_model, load_tokenizer, skeleton
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
    asked = config(folder, kind, "whole")
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
    assert float((merged - adapted).abs().max()) / scale < (1e-4 if kind == "nf4" else 2e-2)
    assert float((base - adapted).abs().max()) / scale > (1e-3 if kind == "nf4" else 2e-2)


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


def _held(parameter: torch.nn.Parameter) -> int:
    """Return the bytes of a parameter with the scales beside it."""
    state = getattr(parameter, "quant_state", None)
    scales = [state.absmax, *([state.state2.absmax] if state.nested else [])] if state is not None else []
    rows = getattr(parameter, "SCB", None)
    return sum(t.numel() * t.element_size() for t in [parameter.data, *scales, *([rows] if rows is not None else [])])

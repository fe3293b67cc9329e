"""Any family of causal LM trains, resumes at another shape and exports: names and shapes come from the model.

Four families that differ where a table of names would break: untied Llama, GPT-2 (Conv1D, tied, dropout, learned
positions), Qwen 3 (norms on queries and keys, tied), Gemma 2 (scaled embedding, soft caps, sliding window, tied).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

from dist_ft.checkpoint.consolidate import consolidate
from dist_ft.checkpoint.lineage import committed
from dist_ft.checkpoint.manifest import MANIFEST, Manifest
from dist_ft.config import Config
from dist_ft.errors import ConfigError, ModelError
from dist_ft.model.dropout import check_dropout
from dist_ft.objectives.module import ObjectiveModule
from dist_ft.objectives.objective import Rows
from dist_ft.objectives.sft import SFT
from dist_ft.orchestrate.workers.processes import run_task
from dist_ft.slots import IGNORE
from dist_ft.storage.store import LocalStore
from tests.helpers.configs import tiny_config
from tests.helpers.families import FAMILIES, TIED, attention, make_family
from tests.helpers.group import Group, run_group, stop_early

Tensors = dict[str, torch.Tensor]
R, LORA_ALPHA = 4, 8


@dataclass(frozen=True)
class Shape:
    """How a part of a run is laid out."""

    stage: int
    world_size: int
    micro: int
    recompute: bool = False
    """Gradient checkpointing, which must draw the same dropout again."""


# family, method, shape until the stop, shape until the end.
CASES = [
    ("llama", "full", Shape(0, 2, 2), Shape(2, 3, 1)),
    ("llama", "lora", Shape(2, 1, 3), Shape(3, 3, 2)),
    ("llama", "full", Shape(3, 3, 1), Shape(0, 1, 4)),
    ("gpt2", "lora", Shape(0, 3, 1), Shape(3, 1, 2)),
    ("gpt2", "full", Shape(2, 2, 2), Shape(0, 3, 1)),
    ("gpt2", "full", Shape(3, 2, 1, recompute=True), Shape(2, 1, 3)),
    ("qwen3", "lora", Shape(0, 1, 8), Shape(2, 2, 2, recompute=True)),
    ("qwen3", "full", Shape(2, 3, 2), Shape(3, 2, 1)),
    ("qwen3", "lora", Shape(3, 1, 2), Shape(0, 2, 3)),
    ("gemma2", "full", Shape(0, 1, 2), Shape(3, 3, 1)),
    ("gemma2", "lora", Shape(2, 2, 1), Shape(0, 1, 3)),
    ("gemma2", "lora", Shape(3, 3, 2), Shape(2, 2, 2)),
]
IN_FEW_MINUTES = {CASES[number] for number in (1, 2, 3, 5, 6, 7, 9, 10)}
"""One case a family and method; the others are `make exactness`."""
METHODS = ("full", "lora")
STAGES = (0, 2, 3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model directory a family."""
    return {family: make_family(family, tmp_path_factory.mktemp("model") / family) for family in FAMILIES}


@dataclass
class Trained:
    """A finished run and its weights as consolidated in float32."""

    config: Config
    group: Group
    manifest: Manifest
    weights: Tensors


@pytest.fixture(scope="module")
def reference(
    tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path], starter: str
) -> Callable[[str, str], Trained]:
    """The undisturbed run of one worker at stage 0; made once a family and method."""
    found: dict[tuple[str, str], Trained] = {}

    def get(family: str, method: str) -> Trained:
        if (family, method) not in found:
            tmp_path = tmp_path_factory.mktemp(f"reference-{family}-{method}")
            config = family_config(tmp_path, models[family], family, method, Shape(0, 1, 2))
            group = run_group(config, starter)
            assert group.outcome == "completed", group.errors
            found[family, method] = trained(config, group, tmp_path)
        return found[family, method]

    return get


def family_config(tmp_path: Path, model: Path, family: str, method: str, shape: Shape, **changes: Any) -> Config:
    return tiny_config(
        tmp_path,
        model__name=str(model),
        model__attention=attention(family),
        method__kind=method,
        method__r=R,
        method__lora_alpha=LORA_ALPHA,
        method__lora_dropout=0.1,
        method__target_modules="all-linear",
        zero__stage=shape.stage,
        cluster__num_workers=shape.world_size,
        train__micro_batch_size=shape.micro,
        train__gradient_checkpointing=shape.recompute,
        # Where a gradient is zero but for rounding (the bias of GPT-2's keys, to which softmax is blind), Adam divides
        # rounding by rounding: with 1e-8 such elements differ by 1e-3 between shapes. Real gradients are far larger.
        optimizer__eps=1e-4,
        **changes,
    )


def trained(config: Config, group: Group, tmp_path: Path) -> Trained:
    store = LocalStore(group.run_dir.path)
    manifest = committed(store)[-1]
    consolidate(store, manifest, tmp_path / "consolidated", stem="w", dtype="float32")
    return Trained(config, group, manifest, load_file(tmp_path / "consolidated" / "w.safetensors"))


def export(run: Trained, to: Path, starter: str, **options: Any) -> Path:
    """Exports as `dist-ft export` does."""
    arguments = {
        "config": run.config.model_dump(mode="json"), "run_dir": str(run.group.run_dir.path),
        "checkpoint": f"{run.manifest.directory}/{MANIFEST}", "to": str(to), "merge": False, "dtype": None, **options,
    }  # fmt: skip
    return Path(run_task(starter, "export", arguments)["export_dir"])


def stock(directory: Path, family: str, dtype: torch.dtype = torch.float32) -> Any:
    """Loads a directory with transformers alone; nothing may be missing, left over or of another shape."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation=attention(family), output_loading_info=True
    )
    assert not any(info.values()), info
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= info.keys()
    assert model.dtype == dtype
    return model.eval()


def logits_of(model: Any, manifest: Manifest) -> torch.Tensor:
    """Returns the logits [T, V] of the fixed prompt."""
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=torch.tensor([manifest.probe.tokens]), use_cache=False).logits
    return logits[0].float()


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative to the largest value of `b`."""
    assert a.shape == b.shape
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max() / b.abs().max())


def relative_l2(a: Tensors, b: Tensors) -> float:
    """The largest relative distance over all tensors."""
    assert a.keys() == b.keys()
    distances = [((a[name] - b[name]).norm() / b[name].norm()).detach() for name in a]
    return max(map(float, distances), default=0.0)


def check_ties(model: Any, family: str) -> None:
    """Tied weights are one tensor, untied ones two that differ."""
    inner, outer = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert model.config.tie_word_embeddings is (family in TIED)
    assert (inner.data_ptr() == outer.data_ptr()) is (family in TIED)
    assert torch.equal(inner, outer) is (family in TIED)


def check_sidecars(directory: Path, base: Path) -> None:
    """The tokenizer came along with its template."""
    one, two = AutoTokenizer.from_pretrained(directory), AutoTokenizer.from_pretrained(base)
    assert one.chat_template == two.chat_template
    assert one("red blue").input_ids == two("red blue").input_ids


def merged_by_hand(base: Any, adapter: Tensors) -> Any:
    """Adds `alpha / r * B @ A` to the layers that an adapter names, without PEFT."""
    layers = dict(base.named_modules())
    left = set(adapter)
    for key in [key for key in adapter if key.endswith(".lora_A.weight")]:
        other = key.replace(".lora_A.", ".lora_B.")
        layer = layers[key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")]
        delta = adapter[other].double() @ adapter[key].double() * (LORA_ALPHA / R)
        with torch.no_grad():
            # Conv1D keeps its weight [in, out].
            layer.weight.add_((delta.T if isinstance(layer, Conv1D) else delta).float())
        left -= {key, other}
    assert not left, "every tensor of the adapter belongs to a pair"
    return base


def linear_layers(model: Any) -> set[str]:
    """What all-linear names: every linear layer but the output layer."""
    outer = model.get_output_embeddings()
    return {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not outer}


def test_the_table_covers_every_pair() -> None:
    for shapes in ([case[2] for case in CASES], [case[3] for case in CASES]):
        rows = [(family, method, shape) for (family, method, _, _), shape in zip(CASES, shapes, strict=True)]
        assert {(f, m) for f, m, _ in rows} == set(product(FAMILIES, METHODS))
        assert {(f, s.stage) for f, _, s in rows} == set(product(FAMILIES, STAGES))
        assert {(m, s.stage) for _, m, s in rows} == set(product(METHODS, STAGES))
        assert {(m, s.world_size) for _, m, s in rows} == set(product(METHODS, (1, 2, 3)))
    assert {(family, method) for family, method, _, _ in IN_FEW_MINUTES} == set(product(FAMILIES, METHODS))
    assert all(before.stage != after.stage and before.world_size != after.world_size for _, _, before, after in CASES)


@pytest.mark.parametrize(
    ("family", "method", "before", "after"),
    [
        pytest.param(
            *case,
            marks=[] if case in IN_FEW_MINUTES else pytest.mark.exactness,
            id=f"{case[0]}-{case[1]}-z{case[2].stage}x{case[2].world_size}-z{case[3].stage}x{case[3].world_size}",
        )
        for case in CASES
    ],
)
def test_a_run_resumed_at_another_shape_exports_what_an_undisturbed_run_trains(
    family: str,
    method: str,
    before: Shape,
    after: Shape,
    models: dict[str, Path],
    reference: Callable[[str, str], Trained],
    tmp_path: Path,
    starter: str,
) -> None:
    wanted = reference(family, method)
    run = _stopped_and_resumed(tmp_path, models[family], family, method, before, after, starter)
    assert run.group.digests == wanted.group.digests
    assert run.group.losses == pytest.approx(wanted.group.losses, rel=1e-5)
    assert relative_l2(run.weights, wanted.weights) < 1e-5
    _check_base_left_behind(models[family], family, run)
    if method == "full":
        _check_full_export(export(run, tmp_path / "export", starter), models[family], family, run)
    else:
        adapter_logits = _check_adapter_export(export(run, tmp_path / "export", starter), models[family], family, run)
        merged = export(run, tmp_path / "merged", starter, merge=True)
        _check_merged_export(merged, models[family], family, run, adapter_logits)


def _stopped_and_resumed(
    tmp_path: Path, model: Path, family: str, method: str, before: Shape, after: Shape, starter: str
) -> Trained:
    stopped = run_group(family_config(tmp_path, model, family, method, before), starter, on_message=stop_early)
    assert stopped.outcome == "stopped", stopped.errors
    checkpoint = committed(LocalStore(stopped.run_dir.path))[-1]
    assert 1 <= checkpoint.step < 6
    assert (checkpoint.zero_stage, checkpoint.world_size) == (before.stage, before.world_size)
    config = family_config(tmp_path, model, family, method, after)
    resumed = run_group(config, starter)
    assert resumed.outcome == "completed", resumed.errors
    run = trained(config, resumed, tmp_path)
    assert (run.manifest.step, run.manifest.zero_stage, run.manifest.world_size) == (6, after.stage, after.world_size)
    return run


def _check_base_left_behind(base: Path, family: str, run: Trained) -> None:
    """What follows would prove nothing if training had not moved the logits."""
    columns = logits_of(stock(base, family), run.manifest)[:, list(run.manifest.probe.columns)]
    assert largest_difference(columns, torch.tensor(run.manifest.probe.logits)) > 1e-2


def _check_probe(logits: torch.Tensor, manifest: Manifest) -> None:
    """The engine computed the probe while it trained, on another number of threads."""
    found = logits[:, list(manifest.probe.columns)]
    assert largest_difference(found, torch.tensor(manifest.probe.logits)) < 1e-5


def _check_full_export(directory: Path, base: Path, family: str, run: Trained) -> None:
    model = stock(directory, family)
    check_ties(model, family)
    check_sidecars(directory, base)
    files = load_file(directory / "model.safetensors")
    assert files.keys() == load_file(base / "model.safetensors").keys()
    assert all(torch.equal(files[name], run.weights[name]) for name in run.weights)
    logits = logits_of(model, run.manifest)
    _check_probe(logits, run.manifest)
    assert torch.equal(logits, logits_of(_in_float32(base, family, run), run.manifest))


def _check_adapter_export(directory: Path, base: Path, family: str, run: Trained) -> torch.Tensor:
    """Returns the logits [T, V] of base and adapter."""
    files = load_file(directory / "adapter_model.safetensors")
    assert all(torch.equal(files[name], run.weights[name]) for name in files)
    assert files.keys() == run.weights.keys()
    check_sidecars(directory, base)
    model = stock(base, family)
    suffixes = ("lora_A.weight", "lora_B.weight")
    assert files.keys() == {f"base_model.model.{n}.{s}" for n, s in product(linear_layers(model), suffixes)}
    adapted = PeftModel.from_pretrained(model, directory, autocast_adapter_dtype=False).eval()
    loaded = get_peft_model_state_dict(adapted)
    assert loaded.keys() == files.keys()
    assert all(torch.equal(loaded[name], files[name]) for name in files)
    again = adapted.load_adapter(directory, adapter_name="again")
    assert not again.missing_keys
    assert not again.unexpected_keys
    check_ties(adapted.get_base_model(), family)
    assert json.loads((directory / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    logits = logits_of(adapted, run.manifest)
    _check_probe(logits, run.manifest)
    assert largest_difference(logits, logits_of(_in_float32(base, family, run), run.manifest)) < 1e-5
    with adapted.disable_adapter():
        assert torch.equal(logits_of(adapted, run.manifest), logits_of(stock(base, family), run.manifest))
    return logits


def _check_merged_export(directory: Path, base: Path, family: str, run: Trained, adapted: torch.Tensor) -> None:
    assert not list(directory.glob("adapter*"))
    model = stock(directory, family)
    check_ties(model, family)
    check_sidecars(directory, base)
    logits = logits_of(model, run.manifest)
    _check_probe(logits, run.manifest)
    assert largest_difference(logits, adapted) < 1e-5
    by_hand = dict(_in_float32(base, family, run).named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == by_hand.keys()
    touched = {f"{name}.weight" for name in linear_layers(model)}
    for name, parameter in found.items():
        if name in touched:
            assert largest_difference(parameter, by_hand[name]) < 1e-6
        else:
            assert torch.equal(parameter, by_hand[name])


@pytest.mark.parametrize(("family", "method"), list(product(FAMILIES, METHODS)))
def test_an_export_in_bfloat16_computes_what_was_trained_in_float32(
    family: str,
    method: str,
    models: dict[str, Path],
    reference: Callable[[str, str], Trained],
    tmp_path: Path,
    starter: str,
) -> None:
    run = reference(family, method)
    directory = export(run, tmp_path / "export", starter, dtype="bfloat16", merge=True)
    assert json.loads((directory / "config.json").read_text())["dtype"] == "bfloat16"
    model = stock(directory, family, torch.bfloat16)
    check_ties(model, family)
    whole = _in_float32(models[family], family, run)
    found, wanted = dict(model.named_parameters()), dict(whole.named_parameters())
    touched = {f"{name}.weight" for name in linear_layers(model)} if method == "lora" else set()
    assert all(torch.equal(found[name], wanted[name].bfloat16()) for name in found.keys() - touched)
    # Half a unit of the last of bfloat16's 8 bits.
    assert relative_l2({n: found[n].float() for n in touched}, {n: wanted[n] for n in touched}) < 2**-8
    # Activations are rounded as well; the tolerance is that of the export's own check.
    assert largest_difference(logits_of(model, run.manifest), logits_of(whole, run.manifest)) < 5e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_in_bfloat16_is_the_trained_one_rounded_once(
    family: str, reference: Callable[[str, str], Trained], tmp_path: Path, starter: str
) -> None:
    run = reference(family, "lora")
    files = load_file(export(run, tmp_path / "export", starter, dtype="bfloat16") / "adapter_model.safetensors")
    assert files.keys() == run.weights.keys()
    assert all(torch.equal(files[name], run.weights[name].bfloat16()) for name in files)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_merged_export_in_bfloat16_is_rounded_once(
    family: str, models: dict[str, Path], reference: Callable[[str, str], Trained], tmp_path: Path, starter: str
) -> None:
    run = reference(family, "lora")
    merged = stock(export(run, tmp_path / "export", starter, dtype="bfloat16", merge=True), family, torch.bfloat16)
    wanted = dict(_in_float32(models[family], family, run).named_parameters())
    for name, parameter in merged.named_parameters():
        # A sum in another order may fall on the other side of a rounding border, no further.
        assert torch.allclose(parameter.float(), wanted[name], rtol=2**-8, atol=1e-7)


def _in_float32(base: Path, family: str, run: Trained) -> Any:
    """The trained model made without an export: the base's code with the consolidated weights."""
    model = stock(base, family)
    if run.config.method.kind == "lora":
        return merged_by_hand(model, run.weights)
    # Tied names are one parameter.
    parameters = dict(model.named_parameters())
    assert parameters.keys() == run.weights.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(run.weights[name])
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_row_equals_its_samples_apart(family: str, models: dict[str, Path]) -> None:
    model = stock(models[family], family)
    module = ObjectiveModule(model)

    def loss(ids: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        return module(Rows(ids, targets, positions, torch.zeros(len(ids)), torch.zeros_like(ids)), SFT.loss)[0]

    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 250, (1, length), generator=generator) for length in (50, 20, 26)]
    targets = [torch.cat([row[:, 1:], torch.full((1, 1), IGNORE)], 1) for row in rows]
    positions = torch.cat([torch.arange(row.shape[1])[None] for row in rows], 1)
    with torch.no_grad():
        apart = sum(loss(row, target, None) for row, target in zip(rows, targets, strict=True))
        packed = loss(torch.cat(rows, 1), torch.cat(targets, 1), positions)
        unmasked = loss(torch.cat(rows, 1), torch.cat(targets, 1), None)
    assert float(packed) == pytest.approx(float(apart), rel=1e-6)
    assert float(unmasked) != pytest.approx(float(apart), rel=1e-4), "samples that see one another must show"


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "gpt2",
        "qwen3",
        "gemma2",
    ],
)
def test_sequences_beyond_the_models_positions_are_refused(family: str, tmp_path: Path, starter: str) -> None:
    limit = "n_positions" if family == "gpt2" else "max_position_embeddings"
    model = make_family(family, tmp_path / "model", **{limit: 64})
    config = family_config(tmp_path, model, family, "full", Shape(0, 1, 2))
    with pytest.raises(ConfigError, match=r"data\.seq_len=96 is longer than the model allows .*64"):
        run_task(starter, "prepare", {"config": config.model_dump(mode="json")})


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0}),
            id="gpt2-summary_first_dropout",
        ),
        pytest.param(("gpt_neox", {}), id="gpt_neox-classifier_dropout"),
    ],
)
def test_dropout_of_a_head_that_a_causal_model_lacks_is_no_hindrance(changes: tuple[str, dict[str, Any]]) -> None:
    family, drops = changes
    config = AutoConfig.for_model(family, num_hidden_layers=1, attn_pdrop=0.0, **drops)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert not any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
    check_dropout(model)


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "gpt2",
        "qwen3",
        "gemma2",
    ],
)
def test_a_wrong_target_module_is_answered_with_the_right_ones(
    family: str, models: dict[str, Path], tmp_path: Path, starter: str
) -> None:
    config = family_config(tmp_path, models[family], family, "lora", Shape(0, 1, 2))
    method = config.method.model_copy(update={"target_modules": ["no_such_proj"]})
    config = config.model_copy(update={"method": method})
    with pytest.raises(ConfigError, match="no_such_proj is no module of") as caught:
        run_task(starter, "prepare", {"config": config.model_dump(mode="json")})
    listed = set(str(caught.value).rsplit("linear ones are ", 1)[1].split(", "))
    assert listed >= {name.rsplit(".", 1)[-1] for name in linear_layers(stock(models[family], family))}


def test_an_attention_that_the_family_lacks_is_a_model_error(
    models: dict[str, Path], tmp_path: Path, starter: str
) -> None:
    config = tiny_config(tmp_path, model__name=str(models["gemma2"]), model__attention="sdpa")
    with pytest.raises(ModelError, match=r"model\.attention=sdpa.*eager"):
        run_task(starter, "prepare", {"config": config.model_dump(mode="json")})

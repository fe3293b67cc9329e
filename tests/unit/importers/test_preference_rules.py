"""Files of preference tuning: which loss, which numbers, which rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_ft.config import Config
from dist_ft.importers.run_import import nested
from tests.unit.importers.test_import_command import AXOLOTL, LLAMAFACTORY, TRL, imported, refused, verdicts

PAIRS = """
base_model: Qwen/Qwen2.5-0.5B
learning_rate: 1e-5
datasets:
  - {path: org/pairs, type: chat_template.default, field_messages: conversation, field_rejected: worse}
"""


def objective(settings: dict[str, object]) -> dict[str, object]:
    return {key.removeprefix("objective."): value for key, value in settings.items() if key.startswith("objective.")}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("rl: dpo", {"kind": "dpo", "loss": "sigmoid"}),
        ("rl: dpo\nrl_beta: 0.3", {"kind": "dpo", "loss": "sigmoid", "beta": 0.3}),
        ("rl: ipo", {"kind": "dpo", "loss": "ipo"}),
        ("rl: dpo\ndpo_loss_type: [robust]\ndpo_label_smoothing: 0.1",
         {"kind": "dpo", "loss": "robust", "label_smoothing": 0.1}),
        ("rl: dpo\ndpo_loss_type: [apo_zero, sft]\ndpo_loss_weights: [1.0, 0.5]",
         {"kind": "dpo", "loss": "apo_zero", "sft_weight": 0.5}),
        ("rl: dpo\nrpo_alpha: 0.4", {"kind": "dpo", "loss": "sigmoid", "sft_weight": 0.4}),
        ("rl: orpo\norpo_alpha: 0.2", {"kind": "orpo", "beta": 0.2}),
        ("rl: simpo\nsimpo_gamma: 1.5\ncpo_alpha: 0",
         {"kind": "cpo", "loss": "simpo", "gamma": 1.5, "sft_weight": 0.0}),
        ("rl: dpo\nsimpo_gamma: 1.5", {"kind": "dpo", "loss": "sigmoid"}),
    ],
)  # fmt: skip
def test_what_axolotl_optimises(lines: str, expected: dict[str, object], tmp_path: Path) -> None:
    result = imported(tmp_path, "axolotl", f"{PAIRS}{lines}\n")
    assert not refused(result)
    assert objective(result.settings) == expected
    assert result.settings["data.packing"] is False
    (source,) = Config.model_validate(nested(result.settings)).data.train
    assert (source.format, source.columns) == ("preference", {"messages": "conversation", "rejected": "worse"})


@pytest.mark.parametrize(
    ("lines", "key"),
    [
        ("rl: grpo", "rl"),
        ("rl: dpo\ndpo_loss_type: [sigmoid, hinge]", "rl"),
        ("rl: dpo\ndpo_loss_type: [sigmoid, sft]\ndpo_loss_weights: [0.5, 0.5]", "dpo_loss_weights"),
        ("rl: dpo\ndpo_label_smoothing: 0.1", "dpo_label_smoothing"),
        ("rl: dpo\ndpo_use_weighting: true", "dpo_use_weighting"),
        ("rl: kto", "datasets"),
    ],
)
def test_what_axolotl_asks_and_is_not_there(lines: str, key: str, tmp_path: Path) -> None:
    assert key in refused(imported(tmp_path, "axolotl", f"{PAIRS}{lines}\n"))


@pytest.mark.parametrize(
    ("rl", "kind", "form", "columns"),
    [
        ("dpo", "chatml.intel", "preference", {}),
        ("dpo", "llama3.ultra", "preference", {"instruction": "prompt"}),
        ("kto", "chatml.ultra", "labelled", {"instruction": "prompt"}),
    ],
)
def test_rows_whose_type_writes_a_template_are_rendered_with_it(
    rl: str, kind: str, form: str, columns: dict[str, str], tmp_path: Path
) -> None:
    text = f"base_model: org/model\nlearning_rate: 1e-5\nrl: {rl}\ndatasets: [{{path: org/pairs, type: {kind}}}]\n"
    result = imported(tmp_path, "axolotl", text)
    assert verdicts(result)["datasets"] == "close"
    data = Config.model_validate(nested(result.settings)).data
    assert (data.chat_template, data.train[0].format, data.train[0].columns) == (kind.split(".")[0], form, columns)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("stage: dpo\ndataset: dpo", {"kind": "dpo", "loss": "sigmoid", "sft_weight": 0.0}),
        ("stage: dpo\ndataset: dpo\npref_loss: hinge\npref_beta: 0.2\npref_ftx: 0.1",
         {"kind": "dpo", "loss": "hinge", "beta": 0.2, "sft_weight": 0.1}),
        ("stage: dpo\ndataset: dpo\npref_loss: simpo\nsimpo_gamma: 1.0",
         {"kind": "cpo", "loss": "simpo", "gamma": 1.0, "sft_weight": 0.0}),
        ("stage: dpo\ndataset: dpo\npref_loss: orpo", {"kind": "orpo"}),
        ("stage: kto\ndataset: kto\nkto_rejected_weight: 2.0", {"kind": "kto", "undesirable_weight": 2.0}),
    ],
)  # fmt: skip
def test_what_llamafactory_optimises(lines: str, expected: dict[str, object], tmp_path: Path) -> None:
    text = LLAMAFACTORY.replace("dataset: chats\n", "")
    result = imported(tmp_path, "llamafactory", f"{text}{lines}\nlora_dropout: 0.1\n")
    assert not refused(result)
    assert objective(result.settings) == expected
    form = "labelled" if expected["kind"] == "kto" else "preference"
    config = Config.model_validate(nested(result.settings))
    assert config.data.train[0].format == form
    assert config.method.lora_dropout == 0.0  # all three tools turn it off for preference tuning


@pytest.mark.parametrize(
    ("method", "lines", "expected"),
    [
        ("dpo", "", {"kind": "dpo", "loss": "sigmoid"}),
        ("dpo", "loss_type: sigmoid_norm\nbeta: 5", {"kind": "dpo", "loss": "sigmoid_norm", "beta": 5.0}),
        ("dpo", "loss_type: [hinge, sft]\nloss_weights: [1, 0.3]",
         {"kind": "dpo", "loss": "hinge", "sft_weight": 0.3}),
        ("dpo", "loss_type: robust\nlabel_smoothing: 0.2", {"kind": "dpo", "loss": "robust", "label_smoothing": 0.2}),
        ("kto", "desirable_weight: 1.3", {"kind": "kto", "loss": "kto", "desirable_weight": 1.3}),
        ("kto", "loss_type: apo_zero_unpaired", {"kind": "kto", "loss": "apo_zero_unpaired"}),
    ],
)  # fmt: skip
def test_what_trl_optimises(method: str, lines: str, expected: dict[str, object], tmp_path: Path) -> None:
    result = imported(tmp_path, "trl", f"{TRL}{lines}\n", method=method)  # type: ignore[arg-type]
    assert not refused(result)
    assert objective(result.settings) == expected
    settings = result.settings
    assert (settings["optimizer.lr"], settings["data.packing"], settings["method.lora_dropout"]) == (1e-6, False, 0.0)
    config = Config.model_validate(nested(settings))
    assert config.data.train[0].format == ("preference" if method == "dpo" else "labelled")


@pytest.mark.parametrize(
    ("method", "lines", "key"),
    [
        ("dpo", "loss_type: [sigmoid, hinge]", "loss_type"),
        ("dpo", "loss_type: bco_pair", "loss_type"),
        ("kto", "loss_type: sigmoid", "loss_type"),
        ("dpo", "loss_type: [sigmoid, sft]\nloss_weights: [2, 1]", "loss_type"),
        ("dpo", "label_smoothing: 0.1", "label_smoothing"),
    ],
)
def test_what_trl_asks_and_is_not_there(method: str, lines: str, key: str, tmp_path: Path) -> None:
    assert refused(imported(tmp_path, "trl", f"{TRL}{lines}\n", method=method)) == {key}  # type: ignore[arg-type]


def test_chats_of_axolotl_are_no_pairs(tmp_path: Path) -> None:
    assert refused(imported(tmp_path, "axolotl", f"{AXOLOTL}rl: dpo\n")) == {"datasets"}

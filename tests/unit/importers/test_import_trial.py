"""Configs as users of the other tools write them, decided by those tools' rules before any import; and bad ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_ft import cli
from dist_ft.importers.run_import import Tool
from dist_ft.importers.verdicts import Imported
from tests.unit.importers.test_import_command import imported, refused

AXOLOTL = "base_model: org/Llama-3.2-1B\nlearning_rate: 0.0002\n"
CHATS = AXOLOTL + "datasets:\n  - {path: org/c, type: chat_template}\n"
LLAMAFACTORY = "model_name_or_path: Qwen/Qwen3-4B\ndataset: chats\ntemplate: chatml\noutput_dir: saves/x\n"
TRL = "model_name_or_path: Qwen/Qwen3-0.6B\ndataset_name: org/chats\n"


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        (CHATS + "max_steps: 5000\n", {"schedule.warmup_steps": 100, "schedule.warmup_ratio": None}),
        (CHATS + "save_total_limit: 0\nsave_steps: 0.2\n", {"checkpoint.keep_last": None}),
        (CHATS + "max_steps: 500\n", {"schedule.warmup_ratio": 0.03}),
        (CHATS + "warmup_steps: 0\n", {"schedule.warmup_ratio": 0.0}),
        (CHATS + "max_steps: -1\nnum_epochs: 2\n", {"train.epochs": 2.0, "train.max_steps": None}),
        (CHATS + "lr_scheduler: linear\ncosine_min_lr_ratio: 0.1\n", {"schedule.min_lr_ratio": None}),
        (CHATS + "lr_scheduler: cosine_with_restarts\nlr_scheduler_kwargs: {num_cycles: 3}\n",
         {"schedule.kind": "cosine", "schedule.num_cycles": 3}),
        (CHATS + "batch_size: 16\nmicro_batch_size: 4\n", {"train.global_batch_size": 16}),
        (CHATS + "gradient_checkpointing: unsloth\n", {"train.gradient_checkpointing": True}),
        (CHATS + "fp16: no\ngroup_by_length: off\nload_in_4bit: 'false'\n", {"model.dtype": "bfloat16"}),
        (CHATS.replace("chat_template}", "chat_template, roles_to_train: [gpt, assistant]}"), {"method.kind": "full"}),
        (CHATS.replace("chat_template}", "chat_template, message_property_mappings: {tool_calls: tool_calls}}"),
         {"method.kind": "full"}),
        (CHATS + "noisy_embedding_alpha: 5\n", {"method.neftune_alpha": 5.0}),
        (CHATS.replace("chat_template}", "chat_template, chat_template: chatml}") + "chat_template: llama3\n",
         {"data.chat_template": "chatml"}),
        (CHATS.replace("chat_template}", "chat_template, chat_template_jinja: '{{ messages }}'}"),
         {"data.chat_template": "{{ messages }}"}),
        (CHATS.replace("chat_template}", "chat_template, chat_template: tokenizer_default}\nchat_template: llama3"),
         {"data.chat_template": "llama3"}),
    ],
)  # fmt: skip
def test_axolotl_trains_the_same(text: str, settings: dict[str, object], tmp_path: Path) -> None:
    result = imported(tmp_path, "axolotl", text)
    assert (refused(result), result.unknown) == (set(), [])
    assert {key: result.settings.get(key) for key in settings} == settings


@pytest.mark.parametrize(
    ("tool", "text", "keys"),
    [
        ("axolotl", CHATS.replace("chat_template}", "chat_template, roles_to_train: []}"), {"datasets"}),
        ("axolotl", CHATS.replace("chat_template}", "chat_template, chat_template: jinja}"), {"datasets"}),
        ("axolotl", CHATS + "  - {path: b, type: chat_template, chat_template: chatml}\n", {"datasets"}),
        ("axolotl", CHATS.replace("chat_template}", "alpaca, shards: 4}"), {"datasets"}),
        ("axolotl", CHATS + "batch_size: 8\nmicro_batch_size: 2\ngradient_accumulation_steps: 2\n",
         {"batch_size", "gradient_accumulation_steps"}),
        ("axolotl", CHATS + "adapter: lora\nlora_target_linear: true\nlora_target_modules: [embed_tokens]\n",
         {"lora_target_modules"}),
        ("axolotl", CHATS + "chat_template_kwargs: {enable_thinking: false}\n", {"chat_template_kwargs"}),
        ("axolotl", CHATS + "use_pose: true\ntrainer_cls: mine.Trainer\n", {"use_pose", "trainer_cls"}),
        ("axolotl", CHATS + "fix_untrained_tokens: [3]\nscaling_softmax: true\n",
         {"fix_untrained_tokens", "scaling_softmax"}),
        ("llamafactory", LLAMAFACTORY + "stage: pt\n", {"stage"}),
        ("llamafactory", LLAMAFACTORY + "finetuning_type: freeze\nfreeze_trainable_layers: 3\n", {"finetuning_type"}),
        ("llamafactory", LLAMAFACTORY.replace("chatml", "qwen3") + "enable_thinking: false\n", {"enable_thinking"}),
        ("llamafactory", LLAMAFACTORY + "split_special_tokens: true\nuse_galore: true\ngalore_rank: 64\n",
         {"split_special_tokens", "use_galore"}),
        ("llamafactory", LLAMAFACTORY + "ignore_pad_token_for_loss: false\n", {"ignore_pad_token_for_loss"}),
        ("llamafactory", LLAMAFACTORY + "warmup_steps: 0.1\nwarmup_ratio: 0.2\n", {"warmup_steps"}),
        ("trl", TRL + "max_length: null\n", {"max_length"}),
        ("trl", TRL + "dataset_text_field: body\n", {"dataset_text_field"}),
        ("trl", TRL + "truncation_mode: keep_end\n", {"truncation_mode"}),
        ("trl", TRL + "train_sampling_strategy: group_by_length\n", {"train_sampling_strategy"}),
        ("trl", TRL + "dataset_kwargs: {add_special_tokens: false}\n", {"dataset_kwargs"}),
        ("trl", "model_name_or_path: org/m\ndatasets: [{path: org/a, fraction: 0.5}]\n", {"datasets"}),
    ],
)  # fmt: skip
def test_what_would_train_something_else_stops(tool: Tool, text: str, keys: set[str], tmp_path: Path) -> None:
    result = imported(tmp_path, tool, text)
    assert (refused(result), result.unknown) == (keys, [])


@pytest.mark.parametrize(
    ("entry", "source"),
    [
        ({"file_name": "a.json"}, {"format": "alpaca", "ignore": ["history", "system", "tools"]}),
        ({"file_name": "a.json", "columns": {"prompt": "q", "response": "a"}},
         {"format": "alpaca", "columns": {"instruction": "q", "output": "a"},
          "ignore": ["input", "history", "system", "tools"]}),
        ({"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "turns", "system": "system"}},
         {"format": "sharegpt", "columns": {"conversations": "turns"}, "ignore": ["tools"]}),
    ],
)  # fmt: skip
def test_columns_that_llamafactory_does_not_read_are_not_read(
    entry: dict[str, object], source: dict[str, object], tmp_path: Path
) -> None:
    info = tmp_path / "info"
    info.mkdir()
    (info / "dataset_info.json").write_text(json.dumps({"chats": entry}))
    result = imported(tmp_path, "llamafactory", LLAMAFACTORY, dataset_dir=info)
    assert result.settings["data.train"] == [{"source": str(info / "a.json"), **source}]


def test_a_warm_up_below_one_is_a_share_for_the_trainer(tmp_path: Path) -> None:
    result = imported(tmp_path, "llamafactory", LLAMAFACTORY + "warmup_steps: 0.1\n")
    assert result.settings["schedule.warmup_ratio"] == 0.1


def test_a_file_without_a_template_takes_the_tokenizers(tmp_path: Path) -> None:
    result = imported(tmp_path, "llamafactory", LLAMAFACTORY.replace("template: chatml\n", ""))
    assert (refused(result), "data.chat_template" in result.settings) == (set(), False)


def test_words_of_yaml_1_1_are_flags(tmp_path: Path) -> None:
    result = imported(tmp_path, "trl", TRL + "use_peft: yes\nlora_r: 4\nload_in_8bit: off\n")
    assert (result.settings["method.kind"], result.settings["method.r"]) == ("lora", 4)


def test_kto_of_trl_keeps_the_order_of_rows(tmp_path: Path) -> None:
    def shuffle(result: Imported) -> object:
        return result.settings.get("data.shuffle")

    assert shuffle(imported(tmp_path, "trl", TRL, method="kto")) is False
    assert shuffle(imported(tmp_path, "trl", TRL, method="dpo")) is None


def with_line(text: str, line: str) -> bytes:
    """Return a config with a line in place of the one of its key."""
    key = line.split(":")[0]
    kept = [one for one in text.splitlines() if not one.startswith(f"{key}:")]
    return "\n".join([*kept, line, ""]).encode()


ROW = "datasets: [{path: org/c, type: alpaca}]"
PLAIN = f"{AXOLOTL}{ROW}\n"


@pytest.mark.parametrize(
    ("tool", "content", "words"),
    [
        ("axolotl", LLAMAFACTORY.encode(), "dist-ft import llamafactory"),
        ("axolotl", TRL.encode(), "dist-ft import trl"),
        ("llamafactory", PLAIN.encode(), "dist-ft import axolotl"),
        ("llamafactory", TRL.encode(), "dist-ft import trl"),
        ("trl", PLAIN.encode(), "dist-ft import axolotl"),
        ("trl", LLAMAFACTORY.encode(), "dist-ft import llamafactory"),
        ("axolotl", with_line(PLAIN, "lora:\n\t- a"), ":5: not valid YAML"),
        ("axolotl", b"- a\n- b\n", "holds list"),
        ("axolotl", b"hello\n", "holds str"),
        ("axolotl", b"", "holds nothing"),
        ("axolotl", b"# a comment\n", "holds nothing"),
        ("axolotl", with_line(PLAIN, "seed: &s 1"), ":4: anchors (&s"),
        ("axolotl", with_line(PLAIN, "x: {<<: {a: 1}}"), ":4: merge keys"),
        ("axolotl", with_line(PLAIN, "output_dir: ${HOME}/x"), "output_dir holds a placeholder"),
        ("axolotl", with_line(PLAIN, "x: " + "y" * 5_000_000), "more than a config"),
        ("axolotl", with_line(PLAIN, "seed: 1\nseed: 2"), "'seed' stands twice (line 5)"),
        ("axolotl", with_line(PLAIN, "model_config: {a: 1, a: 2}"), "'a' stands twice (line 4)"),
        ("axolotl", with_line(PLAIN, "sequence_len: abc"), "sequence_len='abc' (str): expected a number"),
        ("axolotl", with_line(PLAIN, "num_epochs: [1, 2]"), "num_epochs=[1, 2] (list)"),
        ("axolotl", with_line(PLAIN, "sample_packing: maybe"), "sample_packing='maybe' (str): expected true or"),
        ("axolotl", with_line(PLAIN, "output_dir: 3"), "output_dir=3 (int): expected a text"),
        ("axolotl", with_line(PLAIN, "base_model: {a: b}"), "base_model={'a': 'b'} (dict): expected a text"),
        ("axolotl", with_line(PLAIN, "datasets: org/a"), "datasets='org/a' (str): expected a list of mappings"),
        ("axolotl", with_line(PLAIN, "datasets: [org/a]"), "datasets.0='org/a' (str): expected a mapping"),
        ("axolotl", with_line(PLAIN, "warmup_steps: .nan"), "warmup_steps=nan (float): expected a finite number"),
        ("axolotl", with_line(PLAIN, "num_epochs: 1e400"), "num_epochs=inf (float): expected a finite number"),
        ("axolotl", with_line(PLAIN, "micro_batch_size: -2"), "micro_batch_size: train.micro_batch_size=-2"),
        ("axolotl", with_line(PLAIN, "x: \0"), "not valid YAML"),
        ("axolotl", PLAIN.encode() + b"x: \xe9\n", "cannot be read"),
        ("axolotl", PLAIN.encode("utf-16"), "cannot be read"),
        ("axolotl", with_line(PLAIN, "1: 2"), "key 1 is no word"),
        ("axolotl", with_line(PLAIN, "x: " + "[" * 3000), "not valid YAML"),
        ("llamafactory", with_line(LLAMAFACTORY, "lora_rank: x"), "lora_rank='x' (str): expected a number"),
        ("llamafactory", with_line(LLAMAFACTORY, "packing: [1]"), "packing=[1] (list): expected true or false"),
        ("llamafactory", with_line(LLAMAFACTORY, "dataset: {a: 1}"), "dataset={'a': 1} (dict): expected a text"),
        ("trl", with_line(TRL, "max_length: .inf"), "max_length=inf (float): expected a finite number"),
        ("trl", with_line(TRL, "packing: '1e-4'"), "packing='1e-4' (str): expected true or false"),
        ("trl", with_line(TRL, "model_init_kwargs: 3"), "model_init_kwargs=3 (int): expected a mapping"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(
    tool: str, content: bytes, words: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    theirs, ours = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    theirs.write_bytes(content)
    ours.write_text("mine\n")
    assert words in _only_line(["import", tool, theirs, "--to", ours], monkeypatch, capsys)
    assert ours.read_text() == "mine\n"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("none.yaml", [], "does not exist"),
        (".", [], "cannot be read"),
        ("good.yaml", ["--method", "dpo"], "--method dpo is for trl"),
        ("good.yaml", ["--templates", "nowhere"], "no such folder"),
        ("good.yaml", ["--dataset-dir", "nowhere"], "there is no dataset_info.json"),
        ("good.yaml", ["--of-tomorrow"], "No such option: --of-tomorrow"),
        ("good.yaml", ["--gpus", "0"], "'--gpus'"),
    ],
)
def test_a_bad_command_writes_nothing(
    name: str, options: list[str], words: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "good.yaml").write_text(PLAIN)
    ours = tmp_path / "ours.yaml"
    ours.write_text("mine\n")
    assert words in _only_line(["import", "axolotl", tmp_path / name, "--to", ours, *options], monkeypatch, capsys)
    assert ours.read_text() == "mine\n"


def _only_line(words: list[str | Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail with exit code 2, and return its only line of errors."""
    monkeypatch.setattr("sys.argv", ["dist-ft", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.lower().startswith("error:")]
    assert (caught.value.code, len(lines)) == (2, 1), lines
    return lines[0]

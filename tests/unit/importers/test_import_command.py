"""`dist-ft import`: what becomes of each key, what is written, and what stops it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dist_ft import cli
from dist_ft.config import load_config
from dist_ft.config.yaml_file import dump, read_yaml
from dist_ft.errors import ConfigError, UserError
from dist_ft.importers.run_import import Tool, import_file
from dist_ft.importers.verdicts import Imported, Options
from dist_ft.importers.written import config_text, report_json, report_text

AXOLOTL = """
base_model: meta-llama/Llama-3.2-1B
learning_rate: 2e-5
datasets:
  - {path: chats.jsonl, type: chat_template, field_messages: conversations,
     message_property_mappings: {role: from, content: value}}
"""
LLAMAFACTORY = """
model_name_or_path: Qwen/Qwen3-4B
dataset: chats
template: chatml
output_dir: saves/mine
finetuning_type: lora
"""
TRL = """
model_name_or_path: Qwen/Qwen3-4B
dataset_name: org/chats
use_peft: true
lora_target_modules: all-linear
"""
INFO = {"chats": {"file_name": "chats.json", "formatting": "sharegpt"}, "dpo": {"file_name": "x.json", "ranking": True},
        "kto": {"file_name": "y.json", "columns": {"prompt": "q", "response": "a", "kto_tag": "good"}}}  # fmt: skip


def imported(folder: Path, tool: Tool, text: str, **options: int | bool | str | Path) -> Imported:
    path = folder / "theirs.yaml"
    path.write_text(text)
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "dataset_info.json").write_text(json.dumps(INFO))
    return import_file(tool, path, Options(**options))  # type: ignore[arg-type]


def verdicts(result: Imported) -> dict[str, str]:
    return {finding.key: finding.outcome.verdict for finding in result.findings if not finding.is_left_out}


def refused(result: Imported) -> set[str]:
    return {finding.key for finding in result.refused}


@pytest.mark.parametrize(
    ("tool", "text", "expected"),
    [
        (
            "axolotl",
            AXOLOTL,
            {
                "model.name": "meta-llama/Llama-3.2-1B", "optimizer.lr": 2e-5, "data.seq_len": 512,
                "data.packing": False, "data.long_samples": "drop", "schedule.warmup_ratio": 0.03,
                "method.kind": "full", "run.seed": 42, "train.epochs": 1.0, "monitor.wandb": "disabled",
                "model.dtype": "bfloat16", "run.output_dir": "runs", "run.name": "model-out",
                "data.train": [
                    {"source": "chats.jsonl", "format": "messages", "columns": {"messages": "conversations"}}
                ],
            },
        ),
        (
            "llamafactory",
            LLAMAFACTORY,
            {
                "method.r": 8, "method.lora_alpha": 16.0, "method.target_modules": "all-linear", "optimizer.lr": 5e-5,
                "train.epochs": 3.0, "train.micro_batch_size": 8, "schedule.kind": "linear", "model.dtype": "float32",
                "train.gradient_checkpointing": True, "data.packing": False, "data.chat_template": "chatml",
                "run.output_dir": "saves", "run.name": "mine",
            },
        ),
        (
            "trl",
            TRL,
            {
                "method.r": 16, "method.lora_alpha": 32.0, "method.lora_dropout": 0.05, "data.seq_len": 1024,
                "data.train_on": "completion", "optimizer.lr": 2e-5, "method.target_modules": "all-linear",
                "data.train": [{"source": "org/chats"}], "data.long_samples": "truncate",
            },
        ),
    ],
)  # fmt: skip
def test_defaults_that_differ_are_written_out(
    tool: Tool, text: str, expected: dict[str, object], tmp_path: Path
) -> None:
    settings = imported(tmp_path, tool, text).settings
    assert {key: settings[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("line", "verdict", "settings"),
    [
        ("bf16: false", "same", {"model.dtype": "float32"}),
        ("adapter: lora", "same", {"method.kind": "lora", "method.r": 8, "method.lora_alpha": 8.0}),
        ("sequence_len: 4_096", "same", {"data.seq_len": 4096}),
        ("sample_packing: yes", "same", {"data.packing": True}),
        ("warmup_steps: 10", "close", {"schedule.warmup_steps": 10}),
        ("lr_scheduler: constant", "same", {"schedule.kind": "constant", "schedule.warmup_ratio": 0.0}),
        ("cosine_min_lr_ratio: 0.1", "same", {"schedule.min_lr_ratio": 0.1}),
        ("val_set_size: 0.05", "close", {"data.eval": 0.05}),
        ("val_set_size: 200", "close", {"data.eval": 200}),
        ("test_datasets: [{path: data/a.jsonl, type: chat_template}, {path: org/b, type: chat_template}]", "same",
         {"data.eval": {"sources": {"data-a.jsonl": {"source": "data/a.jsonl", "format": "messages"},
                                    "org-b": {"source": "org/b", "format": "messages"}}}}),
        ("optimizer: paged_adamw_8bit", "close", {"optimizer.kind": "adamw"}),
        ("adam_beta2: 0.95", "same", {"optimizer.betas": [0.9, 0.95]}),
        ("chat_template: chatml", "same", {"data.chat_template": "chatml"}),
        ("chat_template: qwen3", "close", {}),
        ("unfrozen_parameters: ['^lm_head.weight$', 'model.layers.4.*']", "same",
         {"method.freeze": [r"^(?!(?:lm_head\.weight$|model\.layers\.4))"]}),
        ("output_dir: ./outputs/my run", "same", {"run.output_dir": "outputs", "run.name": "my-run"}),
        ("shuffle_merged_datasets: false", "same", {"data.shuffle": False}),
        ("ray_num_workers: 4", "same", {"cluster.num_workers": 4, "train.global_batch_size": 4}),
        ("special_tokens: {pad_token: <pad>}", "no effect", {}),
        ("liger_rope: true", "no effect", {}),
        ("strict:", "no effect", {}),
        ("evals_per_epoch: 4", "no effect", {}),
        ("deepspeed: {zero_optimization: {stage: 3, offload_param: {device: cpu}}}", "no effect",
         {"zero.stage": 3, "zero.offload": True}),
        ("fsdp_config: {reshard_after_forward: false}", "no effect", {"zero.stage": 2}),
        ("fp16: true", "refused", {}),
        ("rl: grpo", "refused", {}),
        ("optimizer: muon", "refused", {}),
        ("warmup_steps: 0.1", "refused", {}),
        ("special_tokens: {eos_token: <|im_end|>, pad_token: <pad>}", "close",
         {"model.special_tokens.eos": "<|im_end|>"}),
        ("special_tokens: {additional_special_tokens: [<a>, <b>]}", "close",
         {"model.special_tokens.additional": ["<a>", "<b>"]}),
        ("special_tokens: {mask_token: <m>}", "refused", {}),
        ("tokenizer_use_mistral_common: true", "close", {}),
        ("load_in_8bit: true", "close", {"model.quantization": {"kind": "int8"}}),
        ("unfrozen_parameters: ['model.embed_tokens.weight[:32000]']", "refused", {}),
        ("trust_remote_code: true", "refused", {}),
        ("plugins: [axolotl.integrations.kd.KDPlugin]", "refused", {}),
        ("model_config: {output_router_logits: true}", "refused", {}),
        ("bfloat16: true\nfloat32: true", "same", {"model.dtype": "bfloat16"}),
    ],
)  # fmt: skip
def test_a_key_of_axolotl_becomes(line: str, verdict: str, settings: dict[str, object], tmp_path: Path) -> None:
    result = imported(tmp_path, "axolotl", f"{AXOLOTL}{line}\n")
    assert verdicts(result)[line.split(":")[0]] == verdict
    assert {key: result.settings.get(key) for key in settings} == settings


def test_two_keys_that_contradict_one_another_are_refused(tmp_path: Path) -> None:
    assert refused(imported(tmp_path, "axolotl", f"{AXOLOTL}bfloat16: true\nfloat32: true\n")) == {"float32"}


@pytest.mark.parametrize(
    "row",
    [
        "{path: a.jsonl, type: 'alpaca:other'}",
        "{path: a.jsonl, type: alpaca, field_instruction: question}",
        "{path: a.jsonl, type: chat_template, roles_to_train: [user]}",
        "{path: a.jsonl, type: chat_template, train_on_eos: all}",
        "{path: a.jsonl, type: chat_template, message_field_training: train}",
        "{path: a.jsonl, type: chat_template, roles: {user: [customer]}}",
        "{path: org/name, type: chat_template, split: 'train+test'}",
        "{path: a.jsonl, type: my.module}",
        "{path: a.jsonl, type: chat_template, of_tomorrow: 1}",
        "{type: chat_template}",
    ],
)
def test_rows_that_would_train_something_else_are_refused(row: str, tmp_path: Path) -> None:
    text = f"base_model: org/m\nlearning_rate: 1e-4\ndatasets:\n  - {row}\n"
    assert refused(imported(tmp_path, "axolotl", text)) == {"datasets"}


def test_rows_of_alpaca_become_text_with_headings(tmp_path: Path) -> None:
    text = "base_model: org/m\nlearning_rate: 1e-4\ntrain_on_inputs: true\ndatasets: [{path: org/a, type: alpaca}]\n"
    result = imported(tmp_path, "axolotl", text)
    assert result.settings["data.train"] == [{"source": "org/a", "format": "alpaca", "prompt": "alpaca"}]
    assert (result.settings["data.train_on"], verdicts(result)["train_on_inputs"]) == ("all", "same")


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:1%]", {"rows": [0, "1%"]}),
        ("test[100:500]", {"split": "test", "rows": [100, 500]}),
        ("train[95%:]", {"rows": ["95%", None]}),
    ],
)
def test_a_range_of_rows_is_taken_over(split: str, expected: dict[str, object], tmp_path: Path) -> None:
    text = f"base_model: org/m\nlearning_rate: 1e-4\ndatasets: [{{path: org/a, type: alpaca, split: '{split}'}}]\n"
    found = imported(tmp_path, "axolotl", text).settings["data.train"]
    assert found == [{"source": "org/a", **expected, "format": "alpaca", "prompt": "alpaca"}]
    of_trl = imported(tmp_path, "trl", f"{TRL}dataset_train_split: '{split}'\n").settings["data.train"]
    assert of_trl == [{"source": "org/chats", **expected}]


def test_files_of_a_data_set_become_a_source_each(tmp_path: Path) -> None:
    row = "{path: org/name, revision: abc, data_files: [a.json, b.json], type: completion, field: body}"
    result = imported(tmp_path, "axolotl", f"base_model: org/m\nlearning_rate: 1e-4\ndatasets:\n  - {row}\n")
    assert result.settings["data.train"] == [
        {"source": f"hf://datasets/org/name@abc/{name}.json", "format": "text", "columns": {"text": "body"}}
        for name in "ab"
    ]
    assert result.settings["data.long_samples"] == "split"


def test_a_quantised_base_is_taken_over_or_left_as_it_is(tmp_path: Path) -> None:
    text = f"{AXOLOTL}adapter: qlora\nload_in_4bit: true\nlora_target_linear: true\nfsdp: [full_shard]\n"
    result = imported(tmp_path, "axolotl", text)
    assert result.settings["model.quantization"] == {"kind": "nf4", "double_quant": True}
    other = imported(tmp_path, "axolotl", f"{text}bnb_config_kwargs: {{bnb_4bit_quant_type: fp4}}\n")
    assert other.settings["model.quantization"] == {"kind": "fp4", "double_quant": True}
    assert result.settings["method.kind"] == "lora"
    assert result.settings["zero.stage"] == 2  # stage 3 would cut the scales off
    plain = imported(tmp_path, "axolotl", text, unquantised=True)
    assert "model.quantization" not in plain.settings
    assert plain.settings["zero.stage"] == 3
    assert verdicts(plain)["load_in_4bit"] == "close"


def test_a_base_whose_files_are_quantised_by_bitsandbytes_is_taken_as_it_is(tmp_path: Path) -> None:
    text = (
        AXOLOTL.replace("base_model: ", "base_model: unsloth/Qwen3-4B-bnb-4bit # ")
        + "adapter: lora\nfsdp: [full_shard]\n"
    )
    found = imported(tmp_path, "axolotl", text)
    assert (found.settings["model.name"], found.settings["zero.stage"]) == ("unsloth/Qwen3-4B-bnb-4bit", 2)
    plain = imported(tmp_path, "axolotl", text, unquantised=True)
    assert (plain.settings["model.name"], plain.settings["zero.stage"]) == ("Qwen/Qwen3-4B", 3)
    assert refused(imported(tmp_path, "axolotl", text.replace("bnb-4bit", "GPTQ"))) == {"base_model"}


def test_the_batch_is_that_of_all_gpus(tmp_path: Path) -> None:
    text = f"{AXOLOTL}micro_batch_size: 2\ngradient_accumulation_steps: 4\n"
    alone, of_eight = (imported(tmp_path, "axolotl", text, **options) for options in ({}, {"gpus": 8}))
    assert (alone.settings["train.global_batch_size"], of_eight.settings["train.global_batch_size"]) == (8, 64)
    assert (verdicts(alone)["micro_batch_size"], verdicts(of_eight)["micro_batch_size"]) == ("close", "same")


@pytest.mark.parametrize(
    ("line", "keys"),
    [
        ("max_samples: 1000", set()),
        ("stage: ppo", {"stage"}),
        ("stage: dpo", {"dataset"}),
        ("packing: true", {"packing"}),
        ("quantization_bit: 4", set()),
        ("quantization_bit: 4\nquantization_type: nf3", {"quantization_bit"}),
        ("quantization_bit: 4\nquantization_method: hqq", {"quantization_bit"}),
        ("neftune_noise_alpha: 5", set()),
        ("mix_strategy: interleave_under", {"mix_strategy", "dataset"}),
        ("eval_dataset: dpo", {"eval_dataset"}),
        ("eval_dataset: 'chats,dpo'", {"eval_dataset"}),
        ("eval_dataset: 'chats, chats'", set()),
        ("val_size: 100", set()),
        ("packing: true\nneat_packing: true", set()),
    ],
)
def test_llamafactory_refuses(line: str, keys: set[str], tmp_path: Path) -> None:
    assert refused(imported(tmp_path, "llamafactory", f"{LLAMAFACTORY}{line}\n")) == keys


@pytest.mark.parametrize(
    ("line", "keys"),
    [
        ("packing_strategy: wrapped", {"packing_strategy"}),
        ("loss_type: dft", {"loss_type"}),
        ("loss_type: [sigmoid]", {"loss_type"}),
        ("beta: 0.1", {"beta"}),
        ("eos_token: <end>", set()),
        ("load_in_4bit: true", set()),
        ("load_in_4bit: true\nbnb_4bit_quant_type: nf3", {"load_in_4bit"}),
        ("dataset_train_split: 'train+test'", {"dataset_name"}),
        ("assistant_only_loss: true", set()),
    ],
)
def test_trl_refuses(line: str, keys: set[str], tmp_path: Path) -> None:
    assert refused(imported(tmp_path, "trl", f"{TRL}{line}\n")) == keys


def test_every_key_is_named_once_and_unknown_ones_apart(tmp_path: Path) -> None:
    result = imported(tmp_path, "axolotl", f"{AXOLOTL}strict: null\nrl: dpo\neta_min: 1e-7\nseed: 1\n")
    keys = list(read_yaml(tmp_path / "theirs.yaml"))
    words = [line.split()[0].rstrip(":") for line in report_text(result).splitlines() if line.startswith("  ")]
    assert [words.count(key) for key in keys] == [1] * len(keys)
    found = json.loads(report_json(result))
    assert (sorted([*found["classes"], *found["unknown"]]), found["unknown"]) == (sorted(keys), ["eta_min"])


@pytest.mark.parametrize(("tool", "text"), [("axolotl", AXOLOTL), ("llamafactory", LLAMAFACTORY), ("trl", TRL)])
def test_the_written_config_says_what_was_found(tool: Tool, text: str, tmp_path: Path) -> None:
    result = imported(tmp_path, tool, text)
    path = tmp_path / "ours.yaml"
    path.write_text(config_text(result))
    assert not result.refused
    config = load_config(path)
    written = dump(config.model_dump(mode="json", exclude_unset=True))
    assert str(result.settings["model.name"]) in written
    assert f"seed: {result.settings['run.seed']}" in written
    assert all(line.startswith("#") or "#" in line or line.strip().endswith(("{", "}", ":")) or "- {" in line
               for line in path.read_text().splitlines())  # fmt: skip


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (LLAMAFACTORY, "llamafactory"),
        ("model: {name: tiny-random}\ndata: {train: [{source: a.jsonl}]}\n", "needs no import"),
        ("base_model: a\n\tlearning_rate: 1\n", "not valid YAML"),
        ("- base_model: a\n", "list"),
        ("base_model: &m org/m\nbase_model_config: *m\n", "anchors"),
        ("<<: {base_model: org/m}\n", ":1: merge keys"),
        (f"{AXOLOTL}output_dir: ${{OUT}}\n", "output_dir holds a placeholder"),
        (f"{AXOLOTL}output_dir: <your-folder>\n", "output_dir holds a placeholder"),
        (f"{AXOLOTL}seed: 1\nseed: 2\n", "seed"),
        (f"{AXOLOTL}sequence_len: long\n", "sequence_len"),
        (f"{AXOLOTL}sample_packing: maybe\nnum_epochs: [1]\n", "num_epochs=[1] (list)"),
        (f"{AXOLOTL}micro_batch_size: -1\n", "train.micro_batch_size"),
        (f"{AXOLOTL}datasets_of: {'x' * (1 << 20)}\n", "bytes, more than a config"),
        ("name: x\nversion: 3\n", "no key of axolotl"),
        ("", "holds nothing"),
    ],
)
def test_bad_input_is_one_clear_error(content: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        imported(tmp_path, "axolotl", content)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(("tool", "text"), [("axolotl", AXOLOTL), ("llamafactory", LLAMAFACTORY), ("trl", TRL)])
def test_a_run_on_such_a_file_is_told_the_importer(tool: Tool, text: str, tmp_path: Path) -> None:
    path = tmp_path / "theirs.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"dist-ft import {tool} {path}"):
        load_config(path)


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def invoke(*words: str | Path) -> Done:
        monkeypatch.setattr("sys.argv", ["dist-ft", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return Done(int(caught.value.code or 0), *capsys.readouterr())

    return invoke


def test_a_refused_import_writes_nothing_unless_it_may_be_partial(call: Callable[..., Done], tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    theirs.write_text(f"{AXOLOTL}reinit_weights: true\nfp16: true\n")
    done = call("import", "axolotl", theirs, "--to", ours)
    assert (done.code, ours.exists()) == (2, False)
    assert "reinit_weights:" in done.err and "fp16:" in done.err
    assert call("import", "axolotl", theirs, "--to", ours, "--partial").code == 0
    assert load_config(ours).optimizer.lr == 2e-5


def test_an_imported_file_passes_plan(call: Callable[..., Done], tmp_path: Path) -> None:
    rows, theirs, ours = tmp_path / "chats.jsonl", tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    turns = [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Four."}]
    rows.write_text("".join(json.dumps({"conversations": turns, "n": n}) + "\n" for n in range(8)))
    theirs.write_text(AXOLOTL.replace("chats.jsonl", str(rows)) + "chat_template: chatml\n")
    assert call("import", "axolotl", theirs, "--to", ours).code == 0
    done = call("plan", ours, "model.name=tiny-random", f"run.output_dir={tmp_path / 'runs'}", "--json")
    assert (done.code, json.loads(done.out)["method"]) == (0, "full")

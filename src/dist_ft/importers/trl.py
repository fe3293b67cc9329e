"""The table of TRL's keys (`trl sft --config FILE`): what becomes of each."""

from __future__ import annotations

from dist_ft.config.yaml_file import Yaml
from dist_ft.importers.axolotl_data import split_range
from dist_ft.importers.hf_trainer import BF16, TRAINER_DEFAULTS, TRAINER_TABLE
from dist_ft.importers.rule_kinds import (
    FLOAT16,
    deepspeed,
    family_targets,
    find_beside,
    lora_only,
    model_name,
    no_effect,
    quantised,
    refuse,
    to,
    trust_remote_code,
)
from dist_ft.importers.verdicts import (
    Outcome,
    Rule,
    Source,
    as_flag,
    as_mapping,
    as_mappings,
    as_number,
    as_text,
    as_texts,
    is_set,
)

NOTES = (
    "Order, dropout and adapter matrices come from other random numbers.",
    "Rows of prompt and completion train the completion, in both.",
)
DEFAULTS: dict[str, Yaml] = {
    **TRAINER_DEFAULTS, "learning_rate": 2e-5, "bf16": True, "max_length": 1024, "packing": False, "use_peft": False,
    "gradient_checkpointing": True, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "lora_target_modules": "",
    "assistant_only_loss": False, "output_dir": "trainer_output",
}  # fmt: skip
"""What `trl sft` takes for keys that a file leaves out."""
REQUIRED = ("model_name_or_path",)


def _source(source: Source, entry: dict[str, Yaml], keys: tuple[str, str, str]) -> dict[str, Yaml]:
    path, name, split = (as_text(key, entry[key]) if is_set(entry.get(key)) else "" for key in keys)
    found: dict[str, Yaml] = {"source": path}
    return found | ({"name": name} if name else {}) | ({"split": split} if split not in ("", "train") else {})


def _dataset(source: Source, value: Yaml) -> Outcome:
    one = _source(source, source.values, ("dataset_name", "dataset_config", "dataset_train_split"))
    if problem := _range(one):
        return Outcome("refused", problem)
    return Outcome("same", "", {"data.train": [one]})


def _datasets(source: Source, value: Yaml) -> Outcome:
    found = [_source(source, entry, ("path", "name", "split")) for entry in as_mappings("datasets", value)]
    known = {"path", "name", "split", "data_files", "columns", "data_dir"}
    for entry in as_mappings("datasets", value):
        if extra := sorted(
            key for key in entry if is_set(entry[key]) and key not in known - {"data_files", "columns", "data_dir"}
        ):
            return Outcome("refused", f"{', '.join(extra)} of a data set is not read here; write the rows to a file")
    if problems := [problem for one in found if (problem := _range(one))]:
        return Outcome("refused", "; ".join(problems))
    sources: list[Yaml] = list(found)
    return Outcome("same", "one after the other", {"data.train": sources})


def _range(one: dict[str, Yaml]) -> str:
    """Put the range of rows of a split under a key of its own, and return what is wrong with it."""
    rows, problem = split_range(one)
    one |= rows
    return problem


def _test_split(source: Source, value: Yaml) -> Outcome:
    if source.values.get("eval_strategy", "no") == "no" or "dataset_name" not in source.values:
        return Outcome("no effect", "nothing is measured there either")
    one = _source(source, source.values, ("dataset_name", "dataset_config", "dataset_test_split"))
    if problem := _range(one):
        return Outcome("refused", problem)
    return Outcome("same", "", {"data.eval": one})


def _peft(source: Source, value: Yaml) -> Outcome:
    return Outcome("same", "", {"method.kind": "lora" if as_flag("use_peft", value) else "full"})


def _on_lora(rule: Rule) -> Rule:
    return lora_only(rule, True, key="use_peft")


def _targets(source: Source, value: Yaml) -> Outcome:
    if value == "":
        modules = family_targets(source.text("model_name_or_path"))
        if modules is None:
            return Outcome("refused", "which modules PEFT adapts when none are named is not known here; name them")
        return Outcome("close", "PEFT's own for the family, by the model's name", {"method.target_modules": modules})
    names = list(as_texts("lora_target_modules", value))
    all_linear = names == ["all-linear"]
    return Outcome("same", "", {"method.target_modules": "all-linear" if all_linear else list(names)})


def _assistant_only(source: Source, value: Yaml) -> Outcome:
    if as_flag("assistant_only_loss", value):
        return Outcome("same", "", {"data.train_on": "assistant"})
    if source.flag("completion_only_loss"):
        return Outcome("same", "see completion_only_loss")
    return Outcome("close", "rows of messages train every token; rows of prompt and completion would, too",
                   {"data.train_on": "all"})  # fmt: skip


def _completion_only(source: Source, value: Yaml) -> Outcome:
    if as_flag("completion_only_loss", value):
        return Outcome("same", "", {"data.train_on": "assistant"})
    return Outcome("same", "", {"data.train_on": "all"})


def _loss(source: Source, value: Yaml) -> Outcome:
    if as_text("loss_type", value) in ("nll", "chunked_nll"):
        return Outcome("same", "cross entropy of the trained tokens")
    return Outcome("refused", f"loss_type={value} is another loss; use nll")


def _strategy(source: Source, value: Yaml) -> Outcome:
    if as_text("packing_strategy", value) in ("bfd", "ffd"):
        return Outcome("same", "samples do not see one another")
    return Outcome("refused", f"packing_strategy={value} lets samples see one another or cuts them; use bfd")


def _template(source: Source, value: Yaml) -> Outcome:
    path = as_text("chat_template_path", value)
    file = find_beside(source, path)
    if file is None or not path.endswith((".jinja", ".j2")):
        return Outcome("refused", f"{path} is no Jinja file that is here; save the template to a file and name it")
    return Outcome("same", "", {"data.chat_template": str(file)})


def _dtype(source: Source, value: Yaml) -> Outcome:
    name = as_text("dtype", value)
    if name in ("float16", "fp16"):
        return Outcome("refused", FLOAT16)
    if name in ("bfloat16", "float32", "auto"):
        return Outcome("no effect", "masters are float32 here; see bf16")
    return Outcome("refused", f"{name} is no dtype that trains here; write bfloat16 or float32")


def _init(source: Source, value: Yaml) -> Outcome:
    extra = as_mapping("model_init_kwargs", value).keys() - {"dtype", "torch_dtype", "attn_implementation", "use_cache"}
    if extra:
        return Outcome("refused", f"{', '.join(sorted(extra))} would change the model; set them in the dist-ft config")
    return Outcome("no effect", "masters are float32 here; see bf16")


def _length(source: Source, value: Yaml) -> Outcome:
    return Outcome("same", "", {"data.seq_len": int(as_number("max_length", value)), "data.long_samples": "truncate"})


def _switch(source: Source, value: Yaml) -> Outcome:
    return Outcome("same", "", {"train.gradient_checkpointing": as_flag("gradient_checkpointing", value)})


TABLE: dict[str, Rule] = {
    **TRAINER_TABLE,
    "model_name_or_path": model_name, "model_revision": to("model.revision", "text"),
    "trust_remote_code": trust_remote_code, "bf16": BF16, "dtype": _dtype, "torch_dtype": _dtype,
    "model_init_kwargs": _init, "use_peft": _peft,
    "lora_r": _on_lora(to("method.r", "whole")), "lora_alpha": _on_lora(to("method.lora_alpha", "number")),
    "lora_dropout": _on_lora(to("method.lora_dropout", "number")), "lora_target_modules": _on_lora(_targets),
    "lora_modules_to_save": _on_lora(to("method.modules_to_save", "texts")),
    "use_rslora": _on_lora(to("method.use_rslora", "flag")), "use_dora": _on_lora(to("method.use_dora", "flag")),
    "dataset_name": _dataset, "datasets": _datasets, "dataset_test_split": _test_split,
    "dataset_config": no_effect("in data.train"), "dataset_train_split": no_effect("in data.train"),
    "max_length": _length, "max_seq_length": _length, "packing": to("data.packing", "flag"),
    "packing_strategy": _strategy, "assistant_only_loss": _assistant_only, "completion_only_loss": _completion_only,
    "loss_type": _loss, "chat_template_path": _template, "gradient_checkpointing": _switch, "deepspeed": deepspeed,
    "load_in_4bit": quantised("4-bit base"), "load_in_8bit": quantised("8-bit base"),
}  # fmt: skip
for _keys, _rule in (
    (
        "attn_implementation dataset_num_proc pad_to_multiple_of padding_free eval_packing use_bnb_nested_quant "
        "bnb_4bit_quant_type activation_offloading lora_task_type",
        no_effect("nothing of the result depends on it here"),
    ),
    (
        "eos_token pad_token dataset_text_field dataset_streaming lora_target_parameters dft loss_weights "
        "shuffle_dataset truncation_mode beta rpo_alpha max_prompt_length ref_model_name_or_path desirable_weight "
        "undesirable_weight label_smoothing precompute_ref_log_probs sync_ref_model",
        refuse("changes what is trained, and is not supported; leave it out"),
    ),
):
    TABLE |= dict.fromkeys(_keys.split(), _rule)

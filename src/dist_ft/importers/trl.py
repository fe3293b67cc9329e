"""The tables of TRL's keys (`trl sft --config FILE`, `trl dpo`, `trl kto`): what becomes of each."""

from __future__ import annotations

from dist_ft.config.yaml_file import Yaml
from dist_ft.importers.axolotl_data import split_range
from dist_ft.importers.hf_trainer import BF16, TRAINER_DEFAULTS, TRAINER_TABLE
from dist_ft.importers.preference_rules import (
    DPO_LOSSES,
    STEP_MEAN,
    TOKEN_MEAN,
    dropout,
    has_reference,
    loss_of,
    number,
    smoothing,
    unknown_loss,
)
from dist_ft.importers.rule_kinds import (
    FLOAT16,
    deepspeed,
    family_targets,
    find_beside,
    model_name,
    no_effect,
    quantised_base,
    refuse,
    to,
    trust_remote_code,
    unless,
)
from dist_ft.importers.verdicts import (
    Outcome,
    Rule,
    Source,
    as_flag,
    as_mapping,
    as_mappings,
    as_number,
    as_numbers,
    as_text,
    as_texts,
    as_whole,
    is_set,
)

NOTES = (
    "Order, dropout and adapter matrices come from other random numbers.",
    "Rows of prompt and completion train the completion, in both.",
)
PREFERENCE_NOTES = ("Order, dropout and adapter matrices come from other random numbers.",)
DEFAULTS: dict[str, Yaml] = {
    **TRAINER_DEFAULTS, "learning_rate": 2e-5, "bf16": True, "max_length": 1024, "packing": False, "use_peft": False,
    "gradient_checkpointing": True, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "lora_target_modules": "",
    "assistant_only_loss": False, "output_dir": "trainer_output",
}  # fmt: skip
"""What `trl sft` takes for keys that a file leaves out."""
_OF_SFT = ("packing", "assistant_only_loss")
PREFERENCE_DEFAULTS: dict[str, Yaml] = {
    **{key: value for key, value in DEFAULTS.items() if key not in _OF_SFT}, "learning_rate": 1e-6, "loss_type": None,
}  # fmt: skip
"""What `trl dpo` and `trl kto` take for keys that a file leaves out."""
REQUIRED = ("model_name_or_path",)
NULLS = {"max_length": "null means samples of any length there; write the length of the longest"}
"""Keys whose null says something else than to leave them out."""


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
    for entry in as_mappings("datasets", value):
        if not is_set(entry.get("path")):
            return Outcome("refused", "a data set without a path; name a data set or a file")
        if extra := sorted(key for key in entry if is_set(entry[key]) and key not in ("path", "name", "split")):
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
    def checked(source: Source, value: Yaml) -> Outcome:
        return rule(source, value) if source.flag("use_peft") else Outcome("no effect", "there is no adapter")

    return checked


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
    if "completion_only_loss" in source.values:
        return Outcome("same", "see completion_only_loss")
    why = "rows of prompt and completion train the completion, others every token"
    return Outcome("same", why, {"data.train_on": "completion"})


def _completion_only(source: Source, value: Yaml) -> Outcome:
    if source.flag("assistant_only_loss"):
        return Outcome("no effect", "assistant_only_loss trains less")
    which = "completion" if as_flag("completion_only_loss", value) else "all"
    return Outcome("same", "", {"data.train_on": which})


def _preference_loss(source: Source, value: Yaml) -> Outcome:
    """Take over `loss_type` of `trl dpo`, which may be a list that ends with sft, and of `trl kto`."""
    method = source.options.method
    names = as_texts("loss_type", value) if value is not None else ["sigmoid" if method == "dpo" else "kto"]
    if names[1:] == ["sft"] and method == "dpo":
        return _with_sft(source, names[0])
    if len(names) > 1:
        return Outcome("refused", f"{names}: losses are not mixed here, save with sft; name one")
    if method == "kto":
        if names[0] not in ("kto", "apo_zero_unpaired"):
            return Outcome("refused", f"{names[0]} is a loss that is not there; use kto or apo_zero_unpaired")
        settings: dict[str, Yaml] = {"objective.kind": "kto", "objective.loss": names[0]}
        return Outcome("close", STEP_MEAN, settings) if names[0] == "kto" else Outcome("same", "", settings)
    return loss_of(names[0]) or unknown_loss(names[0]) if names[0] in DPO_LOSSES else unknown_loss(names[0])


def _with_sft(source: Source, name: str) -> Outcome:
    found = as_numbers("loss_weights", source.values.get("loss_weights", [1.0, 1.0]))
    if len(found) != 2 or found[0] != 1 or name not in DPO_LOSSES:
        return Outcome("refused", "beside sft there must be one loss of weight 1; scale learning_rate by hand")
    settings: dict[str, Yaml] = {"objective.kind": "dpo", "objective.loss": name, "objective.sft_weight": found[1]}
    return Outcome("close", TOKEN_MEAN, settings)


def _objective(source: Source, value: Yaml) -> Outcome:
    return _preference_loss(source, source.values.get("loss_type"))


def _loss_of_pairs(source: Source, value: Yaml) -> Outcome:
    """Take over the loss; pairs and labelled answers are not packed there."""
    found = _preference_loss(source, value)
    settings: dict[str, Yaml] = found.settings and found.settings | {"data.packing": False, "data.train_on": "turns"}
    if settings and source.options.method == "kto" and "train_sampling_strategy" not in source.values:
        settings |= {"data.shuffle": False}  # its default, for the sake of pairs that the loss makes of neighbours
    return Outcome(found.verdict, found.why, settings)


def _rows(rule: Rule) -> Rule:
    """Name the format of the rows that the command learns from."""

    def with_format(source: Source, value: Yaml) -> Outcome:
        found = rule(source, value)
        form = "preference" if source.options.method == "dpo" else "labelled"
        sources = as_mappings("sources", found.settings.get("data.train", []))
        named: list[Yaml] = [{**one, "format": form} for one in sources]
        held_out = found.settings.get("data.eval")
        settings: dict[str, Yaml] = {"data.train": named} if named else {}
        settings |= {"data.eval": {**as_mapping("data.eval", held_out), "format": form}} if held_out else {}
        return Outcome(found.verdict, found.why, found.settings | settings)

    return with_format


def _loss(source: Source, value: Yaml) -> Outcome:
    if isinstance(value, list) or as_text("loss_type", value) in (*DPO_LOSSES, "kto"):
        return Outcome(
            "refused", f"loss_type={value} is of preference tuning; import with --method dpo or --method kto"
        )
    if as_text("loss_type", value) in ("nll", "chunked_nll"):
        return Outcome("same", "cross entropy of the trained tokens")
    return Outcome("refused", f"loss_type={value} is another loss; use nll")


def _text_column(source: Source, value: Yaml) -> Outcome:
    if as_text("dataset_text_field", value) == "text":
        return Outcome("no effect", "the default, as here")
    return Outcome("refused", f"text is read from `text`, not from {value}; write data.train[].columns by hand")


def _order(source: Source, value: Yaml) -> Outcome:
    name = as_text("train_sampling_strategy", value)
    if name == "random":
        return Outcome("same", "", {"data.shuffle": True})
    if name == "sequential":
        return Outcome("same", "", {"data.shuffle": False})
    return Outcome("refused", f"{name} orders rows in a way that is not there; use random or sequential")


def _held_out_share(source: Source, value: Yaml) -> Outcome:
    share = float(as_number("test_split_size", value))
    if not 0 < share < 1:
        return Outcome("refused", f"a number of held-out rows ({share:g}) is not supported; write a share of the rows")
    return Outcome("close", "the same share, other rows", {"data.eval": share})


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
    return Outcome("same", "", {"data.seq_len": as_whole("max_length", value), "data.long_samples": "truncate"})


def _switch(source: Source, value: Yaml) -> Outcome:
    return Outcome("same", "", {"train.gradient_checkpointing": as_flag("gradient_checkpointing", value)})


def _load_in_4bit(source: Source, value: Yaml) -> Outcome:
    if not as_flag("load_in_4bit", value):
        return Outcome("no effect", "off")
    return quantised_base(source, source.text("bnb_4bit_quant_type", "nf4"), source.flag("use_bnb_nested_quant"))


def _load_in_8bit(source: Source, value: Yaml) -> Outcome:
    return quantised_base(source, "int8") if as_flag("load_in_8bit", value) else Outcome("no effect", "off")


def _nested(source: Source, value: Yaml) -> Outcome:
    return Outcome("same", "see load_in_4bit") if source.flag("load_in_4bit") else Outcome("no effect", "no 4-bit base")


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
    "load_in_4bit": _load_in_4bit, "load_in_8bit": _load_in_8bit, "use_bnb_nested_quant": _nested,
    "bnb_4bit_quant_type": _nested,
    "dataset_text_field": _text_column, "train_sampling_strategy": _order, "test_split_size": _held_out_share,
    "truncation_mode": unless("keep_start", refuse("keeps the end of long samples; cut them before, or leave it out")),
    "env": no_effect("variables of the environment; set them yourself"),
    "eos_token": to("model.special_tokens.eos", "text"), "pad_token": no_effect("padding carries no loss"),
}  # fmt: skip
for _keys, _rule in (
    (
        "attn_implementation dataset_num_proc pad_to_multiple_of padding_free eval_packing activation_offloading "
        "lora_task_type bnb_4bit_quant_storage ignore_bias_buffers shuffle_dataset dataset_batch_size sanity_check "
        "model_adapter_name ref_adapter_name force_use_ref_model label_pad_token_id generate_during_eval "
        "gradient_checkpointing_use_reentrant use_liger_loss",
        no_effect("nothing of the result depends on it here"),
    ),
    (
        "dataset_streaming streaming lora_target_parameters dft dataset_kwargs formatting_func rpo_alpha "
        "max_prompt_length max_completion_length sync_ref_model",
        refuse("changes what is trained, and is not supported; leave it out"),
    ),
    (
        "loss_weights beta ref_model_name_or_path desirable_weight undesirable_weight label_smoothing "
        "precompute_ref_log_probs",
        refuse("belongs to preference tuning; import with --method dpo or --method kto"),
    ),
):
    TABLE |= dict.fromkeys(_keys.split(), _rule)

PREFERENCE_TABLE: dict[str, Rule] = {
    **{key: rule for key, rule in TABLE.items() if key not in (*_OF_SFT, "completion_only_loss", "packing_strategy")},
    "loss_type": _loss_of_pairs, "loss_weights": no_effect("see loss_type"),
    "beta": number("beta", ("dpo", "kto"), _objective), "label_smoothing": smoothing(_objective),
    "desirable_weight": number("desirable_weight", ("kto",), _objective),
    "undesirable_weight": number("undesirable_weight", ("kto",), _objective),
    "lora_dropout": _on_lora(dropout(_objective)),
    "precompute_ref_log_probs": no_effect("always, here"), "disable_dropout": no_effect("see lora_dropout"),
    "precompute_ref_batch_size": no_effect("speed alone"),
    "f_divergence_type": unless("reverse_kl", refuse("another divergence than of DPO; leave it out")),
    "use_weighting": refuse("weighs pairs by their likelihood, which is not supported; leave it out"),
    "ld_alpha": refuse("weighs the longer answer's end less, which is not supported; leave it out"),
    "reference_free": refuse("a loss without a reference; use cpo or simpo by hand"),
    **dict.fromkeys(
        ("f_alpha_divergence_coef", "discopop_tau", "ref_model_mixup_alpha", "ref_model_sync_steps"),
        no_effect("a number of a method that another key turns on"),
    ),
    "ref_model_name_or_path": has_reference,
    **{key: _rows(TABLE[key]) for key in ("dataset_name", "datasets", "dataset_test_split")},
}  # fmt: skip
"""The keys of `trl dpo` and `trl kto`."""

"""The table of LLaMA-Factory's keys (its first engine, with `stage` and `finetuning_type`): what becomes of each."""

from __future__ import annotations

import json
from pathlib import Path

from dist_ft.config.yaml_file import Yaml
from dist_ft.errors import ConfigError
from dist_ft.importers import their_templates
from dist_ft.importers.hf_trainer import BF16, TRAINER_DEFAULTS, TRAINER_TABLE, batch
from dist_ft.importers.preference_rules import dropout, has_reference, loss_of, number, smoothing, unknown_loss
from dist_ft.importers.rule_kinds import (
    close_if_true,
    deepspeed,
    early_stopping,
    find_beside,
    held_out_rows,
    held_out_sets,
    lora_only,
    lora_plus,
    model_name,
    no_effect,
    quantised,
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
    as_number,
    as_text,
    as_texts,
    as_whole,
    is_set,
)

V1_KEYS = frozenset({"model_class", "dist_config", "kernel_config", "peft_config", "train_dataset", "sample_backend"})
"""Keys of the second engine (`examples/v1`), which has a table of its own there and none here."""
NOTES = (
    "The held-out split, order, dropout and adapter matrices come from other random numbers.",
    "Rows whose turns are out of order are left out there, with a warning; here each is read, or an error names it.",
    "A sample that is too long loses its end here; there prompt and answer are shortened in proportion.",
)
DEFAULTS: dict[str, Yaml] = {
    **TRAINER_DEFAULTS, "cutoff_len": 2048, "packing": False, "lora_rank": 8, "lora_alpha": 0, "lora_target": "all",
    "lora_dropout": 0.0, "finetuning_type": "lora", "stage": "sft", "disable_gradient_checkpointing": False,
    "pref_ftx": 0.0, "mask_history": False, "template": "",
}  # fmt: skip
"""What LLaMA-Factory takes for keys that a file leaves out."""
REQUIRED = ("model_name_or_path", "dataset", "output_dir")

_MEDIA = {"images", "videos", "audios"}
_ANSWERS = {"chosen": "chosen", "rejected": "rejected", "kto_tag": "label"}
_COLUMNS = {
    "alpaca": {
        "prompt": "instruction", "query": "input", "response": "output", "history": "history", "system": "system",
        **_ANSWERS,
    },
    "sharegpt": {"messages": "conversations", "system": "system", "tools": "tools", **_ANSWERS},
    "openai": {"messages": "messages", "system": "system", "tools": "tools", **_ANSWERS},
}  # fmt: skip
"""Columns of a format there, and the keys of ours that they become."""
_OPTIONAL = {"alpaca": ("input", "history", "system", "tools"), "sharegpt": ("system", "tools")}
"""Columns that are read here wherever a row has them, and there only if they are named."""
_ROWS = {"": "chats", "preference": "pairs of answers (ranking)", "labelled": "answers with a label (kto_tag)"}


def _rows_of(source: Source) -> str:
    """Return the format of the rows that the stage learns from, if they are preferences."""
    return {"dpo": "preference", "kto": "labelled"}.get(source.text("stage", "sft"), "")


def _data_info(source: Source) -> tuple[Path, dict[str, Yaml]] | str:
    """Return the folder and the content of dataset_info.json, or why there is none."""
    given = source.options.dataset_dir
    folder = source.text("dataset_dir", "data") if given is None else str(given)
    if folder.startswith(("ONLINE", "REMOTE:")):
        return f"dataset_dir={folder} is fetched from a hub; download it and name the folder: --dataset-dir DIR"
    path = find_beside(source, f"{folder}/dataset_info.json")
    if path is None:
        return (
            f"{folder}/dataset_info.json is not there, which says what a data set's name means; name its folder: "
            "--dataset-dir DIR"
        )
    try:
        return path.parent, as_mapping(str(path), json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, ConfigError) as error:
        return f"{path} cannot be read: {error}; correct it"


def _datasets(source: Source, value: Yaml) -> Outcome:
    """Take over `dataset`: names that dataset_info.json explains."""
    names = value if isinstance(value, list) else as_text("dataset", value).split(",")
    found = _data_info(source)
    if isinstance(found, str):
        return Outcome("refused", found)
    wanted = _rows_of(source)
    read = [_dataset(found[0], found[1], as_text("dataset", name).strip(), wanted) for name in names]
    if problems := [problem for _, problem in read if problem]:
        return Outcome("refused", "; ".join(problems))
    most = source.values.get("max_samples")
    rows: dict[str, Yaml] = {} if most is None else {"rows": [0, as_whole("max_samples", most)]}
    sources: list[Yaml] = [one | rows for one, _ in read]
    if source.values.get("mix_strategy", "concat") != "concat":
        return Outcome("refused", "data sets that alternate are not imported; set data.train[].weight by hand")
    return Outcome("same", "", {"data.train": sources})


def _dataset(folder: Path, info: dict[str, Yaml], name: str, wanted: str) -> tuple[dict[str, Yaml], str]:
    """Return the source that a name means, and why it cannot be taken over.

    Args:
        folder: Where dataset_info.json is.
        info: Its content.
        name: The name.
        wanted: Format of the rows that the stage learns from, if they are preferences.
    """
    if name not in info:
        return {}, f"{name} is not in {folder}/dataset_info.json"
    entry = as_mapping(name, info[name])
    layout = as_text(f"{name}.formatting", entry.get("formatting", "alpaca"))
    columns = {k: v for k, v in as_mapping(f"{name}.columns", entry.get("columns", {})).items() if is_set(v)}
    if media := sorted(columns.keys() & _MEDIA):
        return {}, f"{name} has {', '.join(media)}; only text is trained here"
    form = "preference" if entry.get("ranking") is True else "labelled" if "kto_tag" in columns else ""
    if form != wanted:
        return {}, f"{name} holds {_ROWS[form]}, and the stage learns from {_ROWS[wanted]}; name another data set"
    if layout == "openai":
        why = "writes `detailed thinking off` into every system prompt there (as of 0.9.5); set sharegpt with its tags"
        return {}, f"{name}.formatting=openai {why}"
    if layout not in _COLUMNS or (extra := sorted(columns.keys() - _COLUMNS[layout].keys())):
        what = f"formatting={layout}" if layout not in _COLUMNS else f"columns {', '.join(extra)}"
        return {}, f"{name}: {what} is not supported; write the rows as messages"
    needed = {"alpaca": "prompt", "sharegpt": "messages"}[layout]
    if columns and needed not in columns:
        return {}, f"{name}.columns names no {needed}, so that none is read there; name its column"
    tags = {"role": "from", "content": "value"}
    for key, tag in as_mapping(f"{name}.tags", entry.get("tags", {})).items():
        ours = {"role_tag": {"role", "from"}, "content_tag": {"content", "value"}, "user_tag": {"user", "human"},
                "assistant_tag": {"assistant", "gpt"}, "system_tag": {"system"},
                "observation_tag": {"observation", "tool"},
                "function_tag": {"function_call"}}.get(key, set())  # fmt: skip
        if tag not in ours:
            return {}, f"{name}.tags.{key}={tag} is not read here; rename it in the rows"
        tags[key] = str(tag)
    if is_set(entry.get("num_samples")):
        return {}, f"{name}.num_samples draws rows at random; write them to a file and name it"
    ours_columns: dict[str, Yaml] = {_COLUMNS[layout][k]: v for k, v in columns.items()}
    # Columns that are not named are not read there: with `columns`, none has a default.
    read = set(ours_columns) if columns else {"instruction", "input", "output", "conversations"}
    unread: list[Yaml] = [key for key in _OPTIONAL[layout] if key not in read]
    renamed: dict[str, Yaml] = {ours: theirs for ours, theirs in ours_columns.items() if ours != theirs}
    layouts = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}
    found: dict[str, Yaml] = {"format": form or layouts[layout]}
    if is_set(entry.get("hf_hub_url")):
        found["source"] = as_text(name, entry["hf_hub_url"])
        found |= {ours: entry[key] for key, ours in (("subset", "name"), ("split", "split")) if is_set(entry.get(key))}
    elif is_set(entry.get("file_name")):
        found["source"] = str(folder / as_text(name, entry["file_name"]))
    else:
        return {}, f"{name}: only hf_hub_url and file_name are read here; name one"
    if entry.get("folder") is not None:
        return {}, f"{name}.folder is not read here; name the file as hf://datasets/..."
    return {"source": found.pop("source"), **found, **({"columns": renamed} if renamed else {}), "ignore": unread}, ""


def _stage(source: Source, value: Yaml) -> Outcome:
    stage = as_text("stage", value)
    if stage == "sft":
        return Outcome("same", "supervised fine-tuning")
    if stage == "pt":
        why = "raw text is cut at every cutoff_len tokens of all texts together; write data with format: text by hand"
        return Outcome("refused", why)
    name = source.text("pref_loss", "sigmoid") if stage == "dpo" else stage
    if stage not in ("dpo", "kto") or (found := loss_of(name)) is None:
        return unknown_loss(name)
    if name == "orpo":
        return Outcome("close", "its cross entropy covers the answer there, and prompt and answer here", found.settings)
    # There, as here, the cross entropy beside a loss is a mean per token of each answer.
    return Outcome("close" if stage == "kto" else "same", found.why if stage == "kto" else "", found.settings)


def _objective(source: Source, value: Yaml) -> Outcome:
    return _stage(source, source.text("stage", "sft"))


def _loss(source: Source, value: Yaml) -> Outcome:
    as_text("pref_loss", value)
    return Outcome("same" if source.text("stage", "sft") == "dpo" else "no effect", "see stage")


def _sft_weight(source: Source, value: Yaml) -> Outcome:
    weight = float(as_number("pref_ftx", value))
    kind = _stage(source, source.text("stage", "sft")).settings.get("objective.kind")
    if kind in ("dpo", "cpo"):
        return Outcome("same", "", {"objective.sft_weight": weight})
    if weight == 0 or kind is None:
        return Outcome("no effect", "off")
    return Outcome("refused", f"cross entropy beside {kind} is not supported; leave it out")


def _kind(source: Source, value: Yaml) -> Outcome:
    kind = as_text("finetuning_type", value)
    if kind in ("lora", "full"):
        return Outcome("same", "", {"method.kind": kind})
    way = (
        "; for some layers alone, use full here and name what stays as it is in method.freeze"
        if kind == "freeze"
        else ""
    )
    return Outcome("refused", f"{kind} is a method that is not there; use lora or full{way}")


def _on_lora(rule: Rule) -> Rule:
    return lora_only(rule, "lora", None, key="finetuning_type")


def _alpha(source: Source, value: Yaml) -> Outcome:
    alpha = as_number("lora_alpha", value) or 2 * source.whole("lora_rank", 8)
    return Outcome("same", "", {"method.lora_alpha": float(alpha)})


def _targets(source: Source, value: Yaml) -> Outcome:
    names = value if isinstance(value, list) else as_text("lora_target", value).split(",")
    modules: list[Yaml] = [as_text("lora_target", name).strip() for name in names]
    return Outcome("same", "", {"method.target_modules": "all-linear" if modules == ["all"] else modules})


def _saved(source: Source, value: Yaml) -> Outcome:
    names = value if isinstance(value, list) else as_text("additional_target", value).split(",")
    modules: list[Yaml] = [as_text("additional_target", name).strip() for name in names]
    return Outcome("same", "", {"method.modules_to_save": modules})


def _template(source: Source, value: Yaml) -> Outcome:
    name = as_text("template", value)
    if not name:
        return Outcome("close", "the tokenizer's own, which is taken apart there; one without a template has no marks")
    if name in ("default", "alpaca", "vanilla", "empty"):
        return Outcome(
            "refused", f"{name} writes plain text with headings, which is not supported; use a chat template"
        )
    return their_templates.chat_template(source, "llamafactory", name)


def _packing(source: Source, value: Yaml) -> Outcome:
    if as_flag("packing", value) and not source.flag("neat_packing"):
        return Outcome("refused", "packed samples see one another there; set neat_packing: true, or packing: false")
    return Outcome("same", "", {"data.packing": as_flag("packing", value) or source.flag("neat_packing")})


def _neat_packing(source: Source, value: Yaml) -> Outcome:
    return (
        Outcome("same", "", {"data.packing": True}) if as_flag("neat_packing", value) else Outcome("no effect", "off")
    )


def _history(source: Source, value: Yaml) -> Outcome:
    which = "last_turn" if as_flag("mask_history", value) else "turns"
    if source.flag("train_on_prompt"):
        return Outcome("no effect", "see train_on_prompt")
    return Outcome("same", "", {"data.train_on": which})


def _prompt_too(source: Source, value: Yaml) -> Outcome:
    if not as_flag("train_on_prompt", value):
        return Outcome("no effect", "off")
    return Outcome("close", "every token is trained here", {"data.train_on": "all"})


def _adapter_path(source: Source, value: Yaml) -> Outcome:
    paths = as_text("adapter_name_or_path", value).split(",")
    if len(paths) > 1:
        return Outcome("refused", "several adapters; merge all but the last into the model, and name that")
    if source.flag("create_new_adapter"):
        return Outcome("refused", "create_new_adapter trains a second adapter; merge the first into the model")
    return Outcome("same", "", {"method.init_from": paths[0]})


def _checkpointing(source: Source, value: Yaml) -> Outcome:
    return Outcome("same", "", {"train.gradient_checkpointing": not as_flag("disable_gradient_checkpointing", value)})


def _held_out(source: Source, value: Yaml) -> Outcome:
    names = value if isinstance(value, list) else as_text("eval_dataset", value).split(",")
    found = _data_info(source)
    if isinstance(found, str):
        return Outcome("refused", found)
    wanted, plain = _rows_of(source), [as_text("eval_dataset", name).strip() for name in names]
    read = [_dataset(found[0], found[1], name, wanted) for name in plain]
    if problems := [problem for _, problem in read if problem]:
        return Outcome("refused", "; ".join(problems))
    rows: dict[str, Yaml] = {"rows": [0, source.whole("max_samples", 1)]} if "max_samples" in source.values else {}
    return held_out_sets([(name, one | rows) for name, (one, _) in zip(plain, read, strict=True)])


def _folder(source: Source, value: Yaml) -> Outcome:
    folder = as_text("dataset_dir", value)
    if source.options.dataset_dir is not None:
        return Outcome("close", f"{source.options.dataset_dir} is read in place of {folder}")
    return Outcome("no effect", "where dataset_info.json is")


def _quantised_bits(source: Source, value: Yaml) -> Outcome:
    bits, how = as_whole("quantization_bit", value), str(source.values.get("quantization_method", "bnb")).lower()
    if how not in ("bnb", "bitsandbytes") or bits not in (4, 8):
        return quantised(f"{bits}-bit base by {how}")(source, value)
    kind = source.text("quantization_type", "nf4") if bits == 4 else "int8"
    return quantised_base(source, kind, source.flag("double_quantization", True))


def _of_quantisation(source: Source, value: Yaml) -> Outcome:
    if "quantization_bit" not in source.values:
        return Outcome("no effect", "needs quantization_bit")
    return Outcome("same", "see quantization_bit")


def _order(source: Source, value: Yaml) -> Outcome:
    is_off = as_flag("disable_shuffling", value)
    return Outcome("same", "", {"data.shuffle": False}) if is_off else Outcome("no effect", "off")


def _most(source: Source, value: Yaml) -> Outcome:
    return Outcome("same", f"the first {as_whole('max_samples', value)} rows of each data set, in data.train[].rows")


def _thinking(key: str, default: bool) -> Rule:
    """Judges what becomes of thoughts, which templates without them do not ask."""

    def rule(source: Source, value: Yaml) -> Outcome:
        is_plain = source.text("template") in their_templates.OURS["llamafactory"]
        if as_flag(key, value) == default or is_plain:
            return Outcome("no effect", "the default there, or a template without thoughts")
        return Outcome("refused", "changes the thoughts of the rows; leave it out, and change the rows")

    return rule


def _mixing(source: Source, value: Yaml) -> Outcome:
    if as_text("mix_strategy", value) == "concat":
        return Outcome("same", "one after the other")
    return Outcome("refused", "data sets that alternate are not imported; set data.train[].weight and data.exhaust")


def _plain_pair(source: Source, value: Yaml) -> Outcome:
    texts = as_texts("flash_attn", value)
    return Outcome("no effect", f"{texts[0]}: the same attention in another kernel; see model.attention")


_METHOD = refuse("changes what is trained, and is not supported; leave it out")
_QUIET = no_effect("nothing here depends on it")

TABLE: dict[str, Rule] = {
    **TRAINER_TABLE,
    "model_name_or_path": model_name, "model_revision": to("model.revision", "text"),
    "trust_remote_code": trust_remote_code, "bf16": BF16, "pure_bf16": BF16,
    "flash_attn": _plain_pair, "adapter_name_or_path": _adapter_path,
    "create_new_adapter": refuse("trains a second adapter; merge the first into the model"),
    "stage": _stage, "pref_loss": _loss, "pref_ftx": _sft_weight,
    "pref_beta": number("beta", ("dpo", "cpo", "orpo", "kto"), _objective),
    "simpo_gamma": number("gamma", ("cpo",), _objective), "dpo_label_smoothing": smoothing(_objective),
    "kto_chosen_weight": number("desirable_weight", ("kto",), _objective),
    "kto_rejected_weight": number("undesirable_weight", ("kto",), _objective), "ref_model": has_reference,
    "finetuning_type": _kind,
    "lora_rank": _on_lora(to("method.r", "whole")), "lora_alpha": _on_lora(_alpha),
    "lora_dropout": _on_lora(dropout(_objective)), "lora_target": _on_lora(_targets),
    "additional_target": _on_lora(_saved), "use_rslora": _on_lora(to("method.use_rslora", "flag")),
    "use_dora": _on_lora(to("method.use_dora", "flag")), "loraplus_lr_ratio": _on_lora(lora_plus),
    "dataset": _datasets, "eval_dataset": _held_out, "dataset_dir": _folder,
    "template": _template, "cutoff_len": to("data.seq_len", "whole", "samples are cut in proportion there", "close"),
    "packing": _packing, "neat_packing": _neat_packing, "mask_history": _history, "train_on_prompt": _prompt_too,
    "mix_strategy": _mixing, "interleave_probs": refuse("see mix_strategy"), "val_size": held_out_rows("val_size"),
    "max_samples": _most, "disable_shuffling": _order,
    "disable_gradient_checkpointing": _checkpointing, "deepspeed": deepspeed,
    "enable_thinking": _thinking("enable_thinking", default=True),
    "preserve_thinking": _thinking("preserve_thinking", default=False),
    "early_stopping_steps": early_stopping, "pref_bco_weight": refuse("another loss beside it; leave it out"),
    "tokenized_path": lambda source, value: Outcome("close", "rows are read from dataset, not as they were prepared"),
    "split_special_tokens": refuse("marks within texts become letters there; leave it out"),
    "ignore_pad_token_for_loss": unless(True, lambda source, value: Outcome("refused", "trains padding; leave it out")),
    "compute_dtype": no_effect("see bf16"), "model_max_length": no_effect("see cutoff_len"),
    "block_diag_attn": no_effect("see neat_packing"),
    "loraplus_lr_embedding": unless(1e-6, refuse("a rate for embeddings alone; see optimizer.groups")),
    "use_hyper_parallel": refuse("another engine; leave it out"), "hyper_parallel_args": refuse("another engine"),
    "quantization_bit": _quantised_bits, "quantization_method": _of_quantisation,
    "double_quantization": _of_quantisation, "quantization_type": _of_quantisation,
    "per_device_train_batch_size": batch,
}  # fmt: skip
for _keys, _rule in (
    (
        "overwrite_cache preprocessing_num_workers preprocessing_batch_size plot_loss cache_dir low_cpu_mem_usage "
        "use_fast_tokenizer enable_liger_kernel use_unsloth use_unsloth_gc upcast_layernorm upcast_lmhead_output "
        "ray_run_name ray_storage_path placement_strategy resources_per_worker ray_init_kwargs predict_with_generate "
        "compute_accuracy eval_on_each_dataset use_swanlab swanlab_project swanlab_run_name swanlab_mode "
        "image_max_pixels video_max_pixels image_min_pixels video_maxlen video_fps freeze_vision_tower "
        "freeze_multi_modal_projector freeze_language_model hf_hub_token infer_backend fp8_backend "
        "fp8_enable_fsdp_float8_all_gather kt_optimize_rule cpu_infer chunk_size mode adapter_folder "
        "init_special_tokens use_reentrant_gc offload_folder use_kv_cache use_v1_kernels infer_dtype ms_hub_token "
        "om_hub_token print_param_status quantization_device_map image_do_pan_and_scan crop_to_patches "
        "video_min_pixels use_audio_in_video audio_sampling_rate export_dir export_size export_device "
        "export_quantization_bit export_quantization_dataset export_quantization_nsamples export_quantization_maxlen "
        "export_legacy_format export_hub_model_id vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank "
        "vllm_config sglang_maxlen sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend device_map "
        "media_dir buffer_size eval_num_beams data_shared_file_system master_addr master_port enable_torch_profiler "
        "profiler_output_dir profiler_wait_steps profiler_warmup_steps profiler_active_steps profiler_repeat "
        "profiler_record_shapes profiler_profile_memory profiler_with_stack profile_modules swanlab_workspace "
        "swanlab_api_key swanlab_logdir swanlab_lark_webhook_url swanlab_lark_secret "
        "include_effective_tokens_per_second do_sample temperature top_p top_k num_beams max_length max_new_tokens "
        "repetition_penalty length_penalty skip_special_tokens kt_weight_path kt_expert_checkpoint_path kt_maxlen "
        "kt_use_cuda_graph kt_mode kt_force_think kt_cpu_activation kt_config",
        _QUIET,
    ),
    ("fp8", close_if_true("matrices are multiplied in 8 bits there, and in model.dtype here")),
    ("use_kt", close_if_true("experts are computed by KTransformers on the CPU there; the same adapters are trained")),
    (
        "reward_model ref_adapters ref_model_adapters ld_alpha use_galore use_apollo use_badam use_adam_mini use_muon "
        "pissa_init use_llama_pro mixture_of_depths use_dft_loss use_asft_loss use_eaft_loss add_tokens "
        "add_special_tokens new_special_tokens_config resize_vocab streaming shift_attn rope_scaling moe_aux_loss_coef "
        "default_system tool_format use_mca train_from_scratch kt_use_lora_experts",
        _METHOD,
    ),
    (
        "galore_update_interval galore_scale galore_proj_type galore_layerwise apollo_update_interval apollo_proj "
        "apollo_proj_type apollo_scale_type apollo_scale_front badam_start_block badam_switch_mode "
        "badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose ppo_buffer_size ppo_epochs ppo_target "
        "ppo_whiten_rewards reward_model_adapters reward_model_quantization_bit reward_model_type "
        "ref_model_quantization_bit kt_lora_expert_num kt_lora_expert_intermediate_size freeze_trainable_layers "
        "freeze_trainable_modules freeze_extra_modules galore_rank galore_target apollo_rank apollo_target "
        "apollo_layerwise apollo_scale badam_mode pissa_iter pissa_convert asft_alpha eaft_alpha oft_rank "
        "oft_block_size oft_target module_dropout ppo_score_norm",
        no_effect("a number of a method that another key turns on"),
    ),
):  # fmt: skip
    TABLE |= dict.fromkeys(_keys.split(), _rule)

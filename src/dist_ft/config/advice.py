"""Advice on keys, values and whole configs that people bring from other tools."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from dist_ft.config.yaml_file import Yaml

QUANTISED = (
    "a frozen base is quantised here when it is loaded: name the model as it is, and set model.quantization to "
    "{kind: nf4} or {kind: int8} beside method.kind=lora"
)
TOKEN = "secrets come from the environment only: remove it here; for a hub, set HF_TOKEN"

_RENAMED = {
    "model.name": "base_model model_name_or_path model_name model_id model_path pretrained_model_name_or_path",
    "model.revision": "model_revision revision_of_model",
    "model.dtype": "torch_dtype precision mixed_precision",
    "model.attention": "attn_implementation flash_attn flash_attention attn",
    "model.config_overrides": "overrides_of_model_config model_config model_init_kwargs",
    "method.r": "lora_r lora_rank rank",
    "method.lora_alpha": "alpha",
    "method.target_modules": "lora_target_modules lora_target",
    "method.modules_to_save": "lora_modules_to_save additional_target",
    "method.use_rslora": "peft_use_rslora",
    "method.use_dora": "peft_use_dora dora",
    "method.layers_to_transform": "peft_layers_to_transform",
    "method.init_from": "lora_model_dir adapter_name_or_path resume_adapter",
    "data.train": "datasets dataset dataset_name dataset_dir train_file train_files train_data train_dataset data_path "
    "dataset_path train_path",
    "data.eval": "test_datasets eval_dataset eval_file eval_data val_dataset val_file validation_file "
    "val_set_size val_size "
    "dataset_test_split split_dataset_ratio eval_split",
    "data.train[].source": "path data_files file_name hf_hub_url",
    "data.train[].columns": "field_messages field_instruction field_output message_property_mappings "
    "dataset_text_field",
    "data.seq_len": "sequence_len max_seq_length max_seq_len max_length cutoff_len model_max_length "
    "block_size seq_length",
    "data.packing": "sample_packing neat_packing pack",
    "data.long_samples": "excess_length_strategy truncation_strategy",
    "data.chat_template": "chat_template_jinja chat_template_path template prompt_template",
    "data.curation.exact": "dataset_exact_deduplication",
    "train.micro_batch_size": "per_device_train_batch_size train_micro_batch_size_per_gpu per_device_batch_size",
    "train.epochs": "num_train_epochs num_epochs n_epochs epoch",
    "train.max_steps": "max_train_steps total_steps train_steps num_steps train_iters",
    "train.gradient_checkpointing": "activation_checkpointing recompute",
    "optimizer.lr": "learning_rate base_lr peak_lr",
    "optimizer.kind": "optim optimizer_type optimizer_name",
    "optimizer.eps": "adam_epsilon adam_eps",
    "optimizer.max_grad_norm": "gradient_clipping clip_grad clip_grad_norm gradient_clip_val grad_clip",
    "schedule.kind": "lr_scheduler lr_scheduler_type lr_schedule scheduler scheduler_type",
    "schedule.warmup_steps": "num_warmup_steps lr_warmup_steps",
    "schedule.min_lr_ratio": "cosine_min_lr_ratio min_lr_rate",
    "objective.kind": "rl rlhf_type loss_type",
    "objective.beta": "dpo_beta pref_beta kto_beta orpo_alpha cpo_alpha rl_beta",
    "objective.gamma": "simpo_gamma",
    "eval.best_metric": "metric_for_best_model load_best_model_at_end",
    "eval.early_stopping": "early_stopping_patience early_stopping_threshold",
    "eval.every_steps": "eval_steps eval_every eval_interval evals_per_epoch eval_strategy evaluation_strategy",
    "checkpoint.every_steps": "save_steps save_every save_interval saves_per_epoch save_strategy checkpointing_steps",
    "checkpoint.keep_last": "save_total_limit max_to_keep",
    "monitor.project": "wandb_project project_name",
    "monitor.wandb": "report_to use_wandb wandb_mode",
    "run.name": "run_name experiment_name wandb_run_name wandb_name",
    "run.output_dir": "out_dir save_dir checkpoint_dir",
    "cluster.num_workers": "ray_num_workers num_gpus n_gpus n_gpus_per_node nproc_per_node num_processes world_size "
    "num_nodes nnodes",
    "cluster.address": "ray_address",
    "zero.stage": "zero_stage fsdp fsdp_config fsdp_version deepspeed deepspeed_config",
    "zero.offload": "offload_optimizer offload_param cpu_offload offload_params",
}
"""Keys of Axolotl, LLaMA-Factory, TRL, ms-swift and their like, by the key that does the same here."""
_LORA = "write method.kind=lora or method.kind=full; to go on from an adapter, name its directory in method.init_from"
_BATCH = (
    "write train.global_batch_size, the sequences of an optimizer step over all workers (sequences per device x "
    "gradient_accumulation_steps x devices), and train.micro_batch_size, the sequences of a worker and pass; "
    "how many passes "
    "a step takes follows, so that the result is the same on any number of workers"
)
_MASK = (
    "write data.train_on: `assistant` trains all answers, `last` the last one, `all` every token; prompts of "
    "prompt and "
    "completion rows are never trained but with `all`"
)
_DTYPE = (
    "write model.dtype=bfloat16 or model.dtype=float32; float16 is not supported: it needs loss scaling, which skips "
    "the steps in which numbers overflow"
)
_NO_PROFIT = "it has no effect on the result here; remove it"
_CONVERTED = (
    (
        "gradient_accumulation(_steps)?|grad_accum(_steps)?|batch_size|train_batch_size|global_batch|total_batch_size",
        _BATCH,
    ),
    ("per_device_eval_batch_size|eval_batch_size", "evaluations take train.micro_batch_size; remove it"),
    (
        "adapter|peft|use_peft|use_lora|lora|peft_type|peft_config|finetuning_type|train_type|tuner_type|full_finetune",
        _LORA,
    ),
    ("bf16|fp16|bfloat16|float16|pure_bf16|fp8|amp|half", _DTYPE),
    ("lora_target_linear", "write method.target_modules=all-linear"),
    (
        "unfrozen_parameters|freeze_.*|trainable_(params|parameters)",
        "write method.freeze, regular expressions of what is frozen",
    ),
    (
        "lora_target_parameters|rank_pattern|alpha_pattern|init_lora_weights|lora_bias|bias|fan_in_fan_out"
        "|trainable_token_.*"
        "|peft_.*|pissa.*|relora.*|lisa.*",
        "this variant of LoRA is not supported: remove it, see docs/models.md",
    ),
    ("adam_beta[12]?|beta[12]", "write optimizer.betas=[BETA1, BETA2]"),
    (
        "loraplus_lr_embedding|embedding_lr(_scale)?|lr_groups",
        "write optimizer.groups with pattern and lr, such as {pattern: embed_tokens, lr: 3.2e-5}",
    ),
    ("neftune_noise_alpha", "it is method.neftune_alpha here"),
    ("loraplus_lr_ratio", "it is optimizer.lora_plus_ratio here"),
    (
        "train_on_(inputs|prompt|input)|mask_(prompt|history|inputs?)|(assistant|completion)_only_loss"
        "|train_on_responses_only"
        "|roles_to_train|train_on_eos|train_on_eot|response_template",
        _MASK,
    ),
    ("resume(_from_checkpoint)?|auto_resume.*", "a run goes on with `dist-ft train CONFIG --resume`"),
    (
        "do_(train|eval|predict)|overwrite_output_dir|overwrite_cache",
        "remove it: `dist-ft train` trains, and never overwrites a run",
    ),
    (
        "logging_steps|logging_strategy|log_(every|interval|steps)|logging_dir|logging_first_step",
        "every step is in metrics.jsonl and goes to the sinks; remove it",
    ),
    (
        "max_samples|num_samples|max_train_samples|subset_size",
        "write max_rows of a source in data.train; it takes a sample by content, not the first rows",
    ),
    ("prompt_style|conversation|dataset_format", "write format of a source in data.train: see docs/data.md"),
    (
        "noisy_embedding_alpha|label_smoothing_factor|dft_loss|use_eaft|qat",
        "it is not supported; remove it",
    ),
    (
        "special_tokens|tokens|added_tokens_overrides|resize_(vocab|token_embeddings.*)|add_tokens"
        "|new_special_tokens|pad_token"
        "|eos_token|eot_tokens",
        "tokens are the tokenizer's: change tokenizer and model, save both, and name that directory in model.name",
    ),
    ("push_to_hub|hub_.*", "nothing is pushed to a hub; remove it, and upload exports/final"),
    (
        "liger_.*|use_liger.*|.*_kernel|use_unsloth.*|unsloth.*|torch_compile.*|tf32|dataloader_.*|ddp.*"
        "|device_map|local_rank"
        "|low_cpu_mem_usage|.*num_proc|preprocessing_num_workers|dataset_processes|remove_unused_columns"
        "|group_by_length"
        "|pad_to_.*|dataset_prepared_path|use_cache|.*_parallel_size|plugins|use_ray|strict|debug"
        "|save_safetensors|save_only_model"
        "|tokenizer_(type|use_fast|legacy)|model_type|logging_nan_inf_filter|plot_loss",
        _NO_PROFIT,
    ),
    (
        "wandb_(entity|run_id|group|tags|watch|log_model)",
        "W&B reads it from the environment (WANDB_ENTITY and so on); remove it",
    ),
)
_KEYS = (
    (re.compile(r"load_in_[48]bit|bnb_.*|quanti[sz].*|q(lora|dora)|gptq|awq|loftq.*"), QUANTISED),
    (re.compile(r"(hf_|auth_|access_|use_auth_|hub_)?token"), TOKEN),
    (re.compile(r"lr_end|min_lr|num_decay_steps"), "rates and lengths are shares: see min_lr_ratio and decay_ratio"),
    *((re.compile("|".join(names.split())), f"it is {key} here") for key, names in _RENAMED.items()),
    *((re.compile(names), advice) for names, advice in _CONVERTED),
)
_VALUES = {
    "method.kind": (
        (re.compile(r"q-?(lora|dora)|bnb.*|gptq|awq", re.IGNORECASE), QUANTISED),
        (re.compile(r"dora", re.IGNORECASE), "write method.kind=lora and method.use_dora=true"),
        (re.compile(r"rs-?lora", re.IGNORECASE), "write method.kind=lora and method.use_rslora=true"),
        (re.compile(r"freeze|partial", re.IGNORECASE), "write method.kind=full and method.freeze"),
    ),
    "model.dtype": ((re.compile(r"(torch\.)?(float16|fp16|half|auto|fp8)", re.IGNORECASE), _DTYPE),),
    "model.attention": (
        (
            re.compile(r"flash.*|fa[23]", re.IGNORECASE),
            "write model.attention=flash_attention_2, or sdpa, which needs no other package",
        ),
        (re.compile(r"xformers|flex.*|sage.*|auto|disabled", re.IGNORECASE), "write model.attention=sdpa"),
    ),
    "objective.kind": (
        (re.compile(r"simpo", re.IGNORECASE), "write objective.kind=cpo with objective.loss=simpo and sft_weight=0"),
        (re.compile(r"ipo|hinge|robust", re.IGNORECASE), "write objective.kind=dpo and objective.loss"),
        (re.compile(r"nll|ce|cross_entropy|sft_.*|pt|clm", re.IGNORECASE), "write objective.kind=sft"),
        (re.compile(r"grpo|ppo|rloo|gkd|rm|reward.*|online_dpo|ebft", re.IGNORECASE), "it is not supported"),
    ),
    "optimizer.kind": (
        (
            re.compile(r".*(8|4)_?bit.*|.*bnb.*|paged_.*|.*_fp8", re.IGNORECASE),
            "its moments are quantised in blocks of 256 elements, which ZeRO's partitions cut: the result would "
            "depend on the number of workers. Use optimizer.kind=lion, whose state is half of AdamW's, or "
            "zero.offload=true",
        ),
        (
            re.compile(r"adafactor|came|adam_?mini|sm3", re.IGNORECASE),
            "its second moment is made of means over whole rows and columns, which ZeRO's flat partitions do not hold. "
            "Use optimizer.kind=lion, whose state is half of AdamW's, or zero.offload=true",
        ),
        (
            re.compile(r".*(galore|apollo|q_?galore).*", re.IGNORECASE),
            "it projects the gradients of whole matrices, which ZeRO's flat partitions do not hold. Use "
            "method.kind=lora, or optimizer.kind=lion, whose state is half of AdamW's",
        ),
        (
            re.compile(r".*muon.*", re.IGNORECASE),
            "DeepSpeed keeps its momentum for whole matrices, on each rank that holds a part of one, and clips its "
            "update at ZeRO 1 to 3 but the gradient at ZeRO 0: the result would depend on the stage. Use "
            "optimizer.kind=adamw",
        ),
        (
            re.compile(r"adamw?(_(torch|hf|apex|anyprecision)(_\w+)?)?", re.IGNORECASE),
            "write optimizer.kind=adamw, which runs fused and with float32 moments",
        ),
        (re.compile(r"lion_.*", re.IGNORECASE), "write optimizer.kind=lion"),
        (
            re.compile(r"schedule_?free.*", re.IGNORECASE),
            "of the schedule-free optimizers there is optimizer.kind=schedule_free_adamw",
        ),
    ),
    "schedule.kind": (
        (
            re.compile(r"cosine_with_(hard_)?restarts", re.IGNORECASE),
            "write schedule.kind=cosine and schedule.num_cycles",
        ),
        (
            re.compile(r"(cosine_with_min_lr|cosine_warmup_with_min_lr)", re.IGNORECASE),
            "write schedule.kind=cosine and schedule.min_lr_ratio",
        ),
        (re.compile(r"warmup_stable_decay", re.IGNORECASE), "write schedule.kind=wsd"),
    ),
}
# As the hub writes them, and user info in a URL.
_SECRET = re.compile(r"\bhf_[A-Za-z0-9]{16,}|//[^/@\s]+@")


def advice_on_key(key: str) -> str | None:
    """Return what to do instead of an unknown key, if other tools have it."""
    return next((advice for pattern, advice in _KEYS if pattern.fullmatch(key.lower())), None)


def advice_on_value(key: str, value: Yaml) -> str | None:
    """Return what to do instead of a refused value, if other tools take it."""
    if not isinstance(value, str):
        return None
    return next((advice for pattern, advice in _VALUES.get(key, ()) if pattern.fullmatch(value)), None)


def keys_with_secrets(raw: Yaml, key: str = "") -> Iterator[str]:
    """Yield the keys whose values contain a token or the user info of a URL. Do not show these values."""
    if isinstance(raw, dict):
        for name, value in raw.items():
            yield from keys_with_secrets(value, f"{key}.{name}".removeprefix("."))
    elif isinstance(raw, list):
        for index, value in enumerate(raw):
            yield from keys_with_secrets(value, f"{key}.{index}")
    elif isinstance(raw, str) and _SECRET.search(raw):
        yield key


ToolName = Literal["axolotl", "llamafactory", "trl", "dist-ft"]

_AXOLOTL = {"base_model", "sequence_len", "micro_batch_size", "num_epochs", "sample_packing", "adapter", "datasets"}
_LLAMAFACTORY = {"finetuning_type", "stage", "template", "cutoff_len", "dataset_dir", "lora_rank", "do_train"}
_LLAMAFACTORY_ONLY = {"finetuning_type", "cutoff_len", "adapter_name_or_path", "infer_backend", "model_class"}
_TRL = {"dataset_name", "use_peft", "max_length", "dataset_train_split", "assistant_only_loss", "dataset_config"}


def tool_of(raw: dict[str, Yaml]) -> ToolName | None:
    """Return the tool that a config was written for; None when its keys do not show it."""
    if any(isinstance(raw.get(key), dict) for key in ("model", "data", "method", "train")):
        return "dist-ft"
    if raw.keys() & _LLAMAFACTORY_ONLY or {"model_name_or_path", "dataset"} <= raw.keys():
        return "llamafactory"
    counts: dict[ToolName, int] = {
        "axolotl": len(raw.keys() & _AXOLOTL) + 2 * ("base_model" in raw),
        "llamafactory": len(raw.keys() & _LLAMAFACTORY),
        "trl": len(raw.keys() & _TRL),
    }
    best = max(counts, key=lambda tool: counts[tool])
    if counts[best] < 2 and "model_name_or_path" in raw:
        return "trl"
    return best if counts[best] >= 2 else None


def import_hint(path: str, raw: dict[str, Yaml]) -> str | None:
    """Return what to do with a config of another tool; None when it is none."""
    tool = tool_of(raw)
    if tool in (None, "dist-ft"):
        return None
    return (
        f"{path} is a config of {tool}, not of dist-ft; write a dist-ft config from it: "
        f"dist-ft import {tool} {path} --to my.yaml"
    )

"""The table of Axolotl's keys (its version 0.18): what becomes of each."""

from __future__ import annotations

import re

from dist_ft.config.yaml_file import Yaml
from dist_ft.importers import their_templates
from dist_ft.importers.axolotl_data import entries, held_out, is_chat, own_template, train_sources
from dist_ft.importers.preference_rules import TOKEN_MEAN, dropout, loss_of, number, smoothing, unknown_loss
from dist_ft.importers.rule_kinds import (
    BEST,
    FLOAT16,
    close_if_true,
    count_of,
    deepspeed,
    early_stopping,
    family_targets,
    held_out_rows,
    lora_only,
    lora_plus,
    mentions,
    model_name,
    neftune,
    no_effect,
    optimizer,
    quantised,
    quantised_base,
    refuse,
    run_place,
    schedule,
    schedule_arguments,
    to,
    trust_remote_code,
    unless,
    warmup_ratio,
    warmup_steps,
    zero_stage,
)
from dist_ft.importers.verdicts import (
    Outcome,
    Rule,
    Source,
    as_flag,
    as_mapping,
    as_number,
    as_numbers,
    as_text,
    as_texts,
    as_whole,
    is_off,
)

NOTES = (
    "The loss: with several GPUs, Axolotl averages over the tokens of each GPU and then over GPUs; here all trained "
    "tokens of a step weigh alike. At one GPU it is the same.",
    "The first token of a packed sample is predicted from the sample before it there, when it is trained.",
    "Order, dropout, adapter matrices and the held-out split come from other random numbers.",
)
DEFAULTS: dict[str, Yaml] = {
    "sequence_len": 512, "sample_packing": False, "excess_length_strategy": "drop", "warmup_ratio": 0.03,
    "adapter": "none", "lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "seed": 42, "micro_batch_size": 1,
    "bf16": "auto", "num_epochs": 1.0, "weight_decay": 0.0, "max_grad_norm": 1.0, "lr_scheduler": "cosine",
    "output_dir": "./model-out", "wandb_project": "", "optimizer": "adamw_torch_fused", "lora_target_modules": "",
}  # fmt: skip
"""What Axolotl takes for keys that a file leaves out; they are written out, because ours differ."""
_MOST_WARMUP = 100
"""Most steps of a warm-up that a file leaves out."""
REQUIRED = ("base_model", "learning_rate", "datasets")


def _world(source: Source) -> int:
    return source.options.gpus or source.whole("ray_num_workers", 1)


def _batch(source: Source, value: Yaml) -> Outcome:
    micro = source.whole("micro_batch_size", 1)
    steps = source.whole("gradient_accumulation_steps", 1)
    if "batch_size" in source.values and "gradient_accumulation_steps" not in source.values:
        steps = max(1, source.whole("batch_size", micro) // max(1, micro))
    world = _world(source)
    split = source.whole("context_parallel_size", 1) * source.whole("tensor_parallel_size", 1)
    if world % split:
        return Outcome("refused", f"{world} GPUs are not divisible by {split} that share a sequence; give --gpus N")
    settings: dict[str, Yaml] = {"train.micro_batch_size": micro}
    settings["train.global_batch_size"] = micro * steps * (world // split)
    if source.options.gpus is not None:
        settings["cluster.num_workers"] = source.options.gpus
    if source.options.gpus is None and "ray_num_workers" not in source.values:
        why = "FOR ONE GPU: the file does not say how many it is for; give --gpus N"
        return Outcome("close", why, settings)
    return Outcome("same", f"{micro} x {steps} x {world // split} ranks", settings)


def _part_of_batch(source: Source, value: Yaml) -> Outcome:
    as_whole("a part of the batch", value)
    parts = ("batch_size", "micro_batch_size", "gradient_accumulation_steps")
    if all(key in source.values for key in parts):
        whole, micro, steps = (source.whole(key, 1) for key in parts)
        if whole != micro * steps:
            why = f"batch_size={whole}, but micro_batch_size x gradient_accumulation_steps = {micro * steps}"
            return Outcome("refused", f"{why}; remove one of the three")
    return Outcome("same", "in train.global_batch_size")


def _dtype(source: Source, value: Yaml) -> Outcome:
    if value in ("auto", "full") or as_flag("bf16", value):
        is_full = source.values.get("adapter") is None
        if is_full and not mentions(source, "deepspeed", "fsdp", "fsdp_config"):
            why = "weights and moments are in bfloat16 there, and have float32 masters here"
            return Outcome("close", why, {"model.dtype": "bfloat16"})
        return Outcome("same", "", {"model.dtype": "bfloat16"})
    if mentions(source, "fp16", "float16", "bfloat16", "torch_dtype"):
        return Outcome("no effect", "another key says the dtype")
    return Outcome("same", "", {"model.dtype": "float32"})


def _named_dtype(source: Source, value: Yaml) -> Outcome:
    name = as_text("torch_dtype", value).removeprefix("torch.")
    if name in ("float16", "half", "fp16"):
        return Outcome("refused", FLOAT16)
    known = {"bfloat16": "bfloat16", "bf16": "bfloat16", "float32": "float32", "float": "float32", "auto": "bfloat16"}
    if name not in known:
        return Outcome("refused", f"{name} is no dtype that trains here; write bfloat16 or float32")
    return Outcome("same", "", {"model.dtype": known[name]})


def _if_true(key: str, ours: Yaml) -> Rule:
    """Take over a flag that means a value of ours."""

    def rule(source: Source, value: Yaml) -> Outcome:
        return Outcome("same", "", {key: ours}) if as_flag(key, value) else Outcome("no effect", "off")

    return rule


def _adapter(source: Source, value: Yaml) -> Outcome:
    name = as_text("adapter", value)
    if name == "none":
        if mentions(source, "load_in_4bit", "load_in_8bit"):
            return Outcome("refused", "a quantised base without an adapter has nothing to train; set adapter: lora")
        return Outcome("same", "no adapter: all weights are trained", {"method.kind": "full"})
    if name == "lora":
        return Outcome("same", "", {"method.kind": "lora"})
    if name == "qlora":
        found = _four_bit(source)
        return Outcome(found.verdict, found.why, found.settings | {"method.kind": "lora"})
    return Outcome("refused", f"{name} is an adapter that is not there; use adapter: lora")


def _four_bit(source: Source) -> Outcome:
    """Take over a 4-bit base; there scales are quantised, too, unless the file says otherwise."""
    given = as_mapping("bnb_config_kwargs", source.values.get("bnb_config_kwargs", {}))
    doubly = as_flag("bnb_4bit_use_double_quant", given.get("bnb_4bit_use_double_quant", True))
    kind = as_text("bnb_4bit_quant_type", given.get("bnb_4bit_quant_type", "nf4"))
    return quantised_base(source, kind, doubly, given.get("bnb_4bit_compute_dtype"))


def _load_in_4bit(source: Source, value: Yaml) -> Outcome:
    return _four_bit(source) if as_flag("load_in_4bit", value) else Outcome("no effect", "off")


def _load_in_8bit(source: Source, value: Yaml) -> Outcome:
    return quantised_base(source, "int8") if as_flag("load_in_8bit", value) else Outcome("no effect", "off")


def _bnb_arguments(source: Source, value: Yaml) -> Outcome:
    known = {"bnb_4bit_use_double_quant", "bnb_4bit_quant_type", "bnb_4bit_compute_dtype", "llm_int8_has_fp16_weight"}
    if extra := sorted(as_mapping("bnb_config_kwargs", value).keys() - known):
        return Outcome("refused", f"{', '.join(extra)} of bitsandbytes cannot be set here; leave it out")
    return Outcome("same", "in model.quantization")


def _adapted(rule: Rule) -> Rule:
    return lora_only(rule, "lora", "qlora", key="adapter")


def _targets(source: Source, value: Yaml) -> Outcome:
    if source.flag("lora_target_linear"):
        beyond = [name for name in as_texts("lora_target_modules", value) if re.search("embed|lm_head|wte", name)]
        if beyond:
            why = f"{', '.join(beyond)} beside all linear layers (lora_target_linear); name all modules in one list"
            return Outcome("refused", why)
        return Outcome("no effect", "lora_target_linear adapts all linear layers")
    if value == "":
        name = source.text("base_model")
        modules = family_targets(name)
        if modules is None:
            return Outcome(
                "refused", f"which modules PEFT adapts in {name} when none are named is not known here; name them"
            )
        return Outcome("close", "PEFT's own for the family, by the model's name", {"method.target_modules": modules})
    if isinstance(value, str):
        return Outcome("same", "", {"method.target_modules": value})
    return Outcome("same", "", {"method.target_modules": list(as_texts("lora_target_modules", value))})


def _layers(source: Source, value: Yaml) -> Outcome:
    layers = value if isinstance(value, list) else [value]
    return Outcome("same", "", {"method.layers_to_transform": [as_whole("a layer", layer) for layer in layers]})


def _unfrozen(source: Source, value: Yaml) -> Outcome:
    if source.values.get("adapter") is not None:
        return Outcome("no effect", "beside an adapter the base is frozen anyway")
    names = as_texts("unfrozen_parameters", value)
    if rows := [name for name in names if re.search(r"\[\d*:\d*\]$", name)]:
        return Outcome("refused", f"{rows[0]}: rows of a parameter cannot be trained alone; name it whole")
    # There a pattern matches the start of a name, and a dot is a letter unless `+` follows.
    prefixes = [re.sub(r"\.(?!\+)", r"\\.", re.sub(r"\.\*$", "", name.lstrip("^"))) for name in names]
    return Outcome("same", "", {"method.freeze": [f"^(?!(?:{'|'.join(prefixes)}))"]})


def _model_config(source: Source, value: Yaml) -> Outcome:
    found = as_mapping("model_config", value)
    if not is_off(found.get("output_router_logits", False)):
        return Outcome("refused", "output_router_logits adds a loss of the router; set it to false")
    if nested := [key for key, item in found.items() if isinstance(item, dict | list)]:
        return Outcome("refused", f"{', '.join(nested)}: only flat values can be overridden; change the config.json")
    return Outcome("same", "", {"model.config_overrides": found})


def _attention(source: Source, value: Yaml) -> Outcome:
    name = as_text("attn_implementation", value)
    if name == "eager":
        return Outcome("same", "", {"model.attention": "eager"})
    if re.search(r"sage|fp8", name):
        return Outcome("close", "attention is quantised there, and exact here")
    return Outcome("no effect", "the same attention in another kernel; see model.attention")


def _eager(source: Source, value: Yaml) -> Outcome:
    return _attention(source, "eager") if as_flag("eager_attention", value) else Outcome("no effect", "off")


def _model_type(source: Source, value: Yaml) -> Outcome:
    name = as_text("model_type", value)
    if name.endswith("ForCausalLM") and not name.startswith("Mamba"):
        return Outcome("no effect", "the class follows from the model's config")
    return Outcome("refused", f"{name} is no causal language model of text; name one")


def _same_model(source: Source, value: Yaml) -> Outcome:
    if value == source.values.get("base_model"):
        return Outcome("no effect", "the same as base_model")
    return Outcome("refused", "config or tokenizer of another model; save them beside the weights and name that folder")


def _has_chat(source: Source) -> bool:
    return any(is_chat(entry) for entry in entries(source))


def _chat_template(source: Source, value: Yaml) -> Outcome:
    if not _has_chat(source):
        return Outcome("no effect", "no data set is a chat")
    if own_template(source) is not None:
        return Outcome("no effect", "the data set names its own, which wins; see datasets")
    name = as_text("chat_template", value)
    if name == "jinja":
        return Outcome("same", "see chat_template_jinja")
    return their_templates.chat_template(source, "axolotl", name)


def _jinja(source: Source, value: Yaml) -> Outcome:
    is_named = source.values.get("chat_template") not in (None, "jinja")
    if not _has_chat(source) or is_named or own_template(source) is not None:
        return Outcome("no effect", "no data set uses it")
    return Outcome("same", "", {"data.chat_template": as_text("chat_template_jinja", value)})


def _eot_tokens(source: Source, value: Yaml) -> Outcome:
    tokens = as_texts("eot_tokens", value)
    if not _has_chat(source):
        return Outcome("no effect", "no data set is a chat")
    return Outcome(
        "close", f"the token that ends the assistant's turn in the template is trained here; is it {tokens}?"
    )


def _train_on_inputs(source: Source, value: Yaml) -> Outcome:
    if not as_flag("train_on_inputs", value) or "rl" in source.values:
        return Outcome("no effect", "off, or answers alone are compared")
    if all(entry.get("type") == "completion" for entry in entries(source)):
        return Outcome("no effect", "raw text is trained whole anyway")
    if not _has_chat(source):
        return Outcome("same", "", {"data.train_on": "all"})
    return Outcome("close", "there the contents of all turns, here every token", {"data.train_on": "all"})


def _excess(source: Source, value: Yaml) -> Outcome:
    if all(entry.get("type") == "completion" for entry in entries(source)):
        return Outcome("no effect", "raw text is cut into pieces")
    ours = {"drop": "drop", "truncate": "truncate", "raise": "error"}.get(as_text("excess_length_strategy", value))
    return Outcome("same", "", {"data.long_samples": ours}) if ours else Outcome("refused", "drop, truncate or raise")


def _shuffle(source: Source, value: Yaml) -> Outcome:
    if as_flag("shuffle_merged_datasets", value):
        return Outcome("same", "on, as here")
    return Outcome("same", "", {"data.shuffle": False})


def _least_length(source: Source, value: Yaml) -> Outcome:
    if as_whole("min_sample_len", value) <= 2:
        return Outcome("no effect", "rows without a trained token are left out")
    return Outcome("refused", "a least number of tokens is not supported; see data.curation.min_characters")


def _checkpointing(source: Source, value: Yaml) -> Outcome:
    is_on = (isinstance(value, str) and value.startswith(("offload", "unsloth"))) or as_flag(
        "gradient_checkpointing", value
    )
    return Outcome("same", "", {"train.gradient_checkpointing": True}) if is_on else Outcome("no effect", "off")


def _special_tokens(source: Source, value: Yaml) -> Outcome:
    tokens = as_mapping("special_tokens", value)
    others = {name: token for name, token in tokens.items() if name != "pad_token" and token is not None}
    if not others:
        return Outcome("no effect", "padding carries no loss")
    llama = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    is_llama = re.search(
        r"llama-?2|codellama|mistral-7b|mixtral|tinyllama|open_llama", source.text("base_model").lower()
    )
    if is_llama and others.items() <= llama.items():
        return Outcome("no effect", "the tokens of the model's own tokenizer")
    if unknown := sorted(others.keys() - {"bos_token", "eos_token", "unk_token", "additional_special_tokens"}):
        return Outcome("refused", f"{', '.join(unknown)} is no special token that is known here; leave it out")
    settings: dict[str, Yaml] = {
        f"model.special_tokens.{name.removesuffix('_token')}": as_text(name, token)
        for name, token in others.items()
        if name != "additional_special_tokens"
    }
    if "additional_special_tokens" in others:
        settings["model.special_tokens.additional"] = list(as_texts("", others["additional_special_tokens"]))
    why = "a token that the tokenizer lacks is added there, and refused here; `dist-ft plan` looks"
    return Outcome("close", why, settings)


def _fsdp(source: Source, value: Yaml) -> Outcome:
    if isinstance(value, int | float) and not isinstance(value, bool):
        as_text("fsdp", value)
    settings: dict[str, Yaml] = {"zero.stage": zero_stage(source, 3)}
    if isinstance(value, dict):
        if is_off(value.get("reshard_after_forward", True)):
            settings["zero.stage"] = 2
        if any(not is_off(value.get(key, False)) for key in ("offload_params", "fsdp_offload_params")):
            settings["zero.offload"] = True
    elif "fsdp_config" in source.values:
        return Outcome("no effect", "see fsdp_config")
    return Outcome("no effect", "every stage gives the same result", settings)


def _plugins(source: Source, value: Yaml) -> Outcome:
    quiet = re.compile(r"cut_cross_entropy|liger|kernels|expert_parallel|swanlab")
    others = [name for name in as_texts("plugins", value) if not quiet.search(name)]
    if others:
        return Outcome("refused", f"{', '.join(others)} changes what is trained; leave it out")
    return Outcome("no effect", "kernels that compute the same")


def _rl(source: Source, value: Yaml) -> Outcome:
    name = as_text("rl", value)
    losses = as_texts("dpo_loss_type", source.values.get("dpo_loss_type", []))
    if name == "dpo" and losses:
        with_sft = losses[1:] == ["sft"]
        if len(losses) > 1 and not with_sft:
            return Outcome("refused", f"dpo_loss_type={losses}: losses are not mixed here, save with sft; name one")
        name = losses[0]
    found = loss_of(name) if name != "sft" else None
    return unknown_loss(name) if found is None else found


def _objective(source: Source, value: Yaml) -> Outcome:
    return _rl(source, source.values["rl"]) if "rl" in source.values else Outcome("same")


def _loss_weights(source: Source, value: Yaml) -> Outcome:
    weights = as_numbers("dpo_loss_weights", value)
    if len(weights) == 1 and weights[0] == 1:
        return Outcome("no effect", "one loss of weight 1")
    if len(weights) == 2 and weights[0] == 1:
        return Outcome("close", TOKEN_MEAN, {"objective.sft_weight": weights[1]})
    return Outcome("refused", "the first weight must be 1; scale optimizer.lr, and the weight of sft, by hand")


def _sft_weight(source: Source, value: Yaml) -> Outcome:
    return Outcome("close", TOKEN_MEAN, {"objective.sft_weight": float(as_number("rpo_alpha", value))})


def _tokens(source: Source, value: Yaml) -> Outcome:
    return Outcome("refused", "new tokens are not supported; add them to the tokenizer and the model, and save both")


def _ray_workers(source: Source, value: Yaml) -> Outcome:
    return Outcome("same", "", {"cluster.num_workers": _world(source)})


def _resources(source: Source, value: Yaml) -> Outcome:
    found = as_mapping("resources_per_worker", value)
    ours: dict[str, Yaml] = {name: float(as_number(name, number)) for name, number in found.items()}
    return Outcome("same", "", {"cluster.resources_per_worker": ours})


def _wandb(source: Source, value: Yaml) -> Outcome:
    if value == "" or not source.flag("use_wandb", True) or source.values.get("wandb_mode") == "disabled":
        return Outcome("same", "off", {"monitor.wandb": "disabled"})
    return Outcome("same", "", {"monitor.project": as_text("wandb_project", value), "monitor.wandb": "auto"})


def _embedding_rate(source: Source, value: Yaml) -> Outcome:
    rate = float(as_number("embedding_lr", value))
    return Outcome("same", "", {"optimizer.groups": [{"pattern": "embed_tokens|lm_head", "lr": rate}]})


def _beta(index: int) -> Rule:
    def rule(source: Source, value: Yaml) -> Outcome:
        as_number("a beta", value)
        betas: list[Yaml] = [source.number("adam_beta1", 0.9), source.number("adam_beta2", 0.999)]
        return Outcome("same", "", {"optimizer.betas": betas})

    return rule


def _epochs(source: Source, value: Yaml) -> Outcome:
    epochs = float(as_number("num_epochs", value))
    if source.number("max_steps", 0) > 0:
        return Outcome("no effect", "max_steps wins")
    return Outcome("same", "", {"train.epochs": epochs})


def _warmup_steps(source: Source, value: Yaml) -> Outcome:
    if as_number("warmup_steps", value) == 0:
        return Outcome("same", "no warm-up", {"schedule.warmup_ratio": 0.0})
    return warmup_steps(source, value)


def _warmup_ratio(source: Source, value: Yaml) -> Outcome:
    if "warmup_steps" in source.values:
        return Outcome("no effect", "warmup_steps wins")
    found = warmup_ratio(source, value)
    if "warmup_ratio" in source.values or not found.settings:
        return found
    if source.number("max_steps", 0) > _MOST_WARMUP / as_number("warmup_ratio", value):
        return Outcome("close", found.why, {"schedule.warmup_steps": _MOST_WARMUP})
    return Outcome("close", f"{found.why}; at most {_MOST_WARMUP} steps there", found.settings)


def _least_rate(source: Source, value: Yaml) -> Outcome:
    ratio = float(as_number("cosine_min_lr_ratio", value))
    if source.text("lr_scheduler", "cosine") != "cosine":
        return Outcome("no effect", "counts for lr_scheduler: cosine alone")
    return Outcome("same", "", {"schedule.min_lr_ratio": ratio})


_KERNELS = no_effect("a kernel that computes the same")
_MEMORY = no_effect("memory and speed; the result is the same")
_LOGS = no_effect("what is written beside the training; see monitor")
_PARALLEL = no_effect("how ranks share the work; counted in train.global_batch_size")
_METHOD = "another method of training, which is not supported; there is nothing to import it to"
_RHYTHM = no_effect("when to measure or to keep a checkpoint; see eval.every_steps and checkpoint.every_steps")

TABLE: dict[str, Rule] = {
    "base_model": model_name,
    "base_model_config": _same_model, "tokenizer_config": _same_model,
    "revision_of_model": to("model.revision", "text"), "model_revision": to("model.revision", "text"),
    "trust_remote_code": trust_remote_code,
    "model_type": _model_type,
    "bf16": _dtype, "torch_dtype": _named_dtype,
    "bfloat16": _if_true("model.dtype", "bfloat16"), "float32": _if_true("model.dtype", "float32"),
    "fp16": refuse(FLOAT16), "float16": refuse(FLOAT16),
    "overrides_of_model_config": _model_config, "model_config": _model_config,
    "attn_implementation": _attention, "eager_attention": _eager,
    "s2_attention": refuse("shifted sparse attention computes something else; turn it off"),
    "adapter": _adapter,
    "load_in_4bit": _load_in_4bit, "load_in_8bit": _load_in_8bit, "bnb_config_kwargs": _bnb_arguments,
    "gptq": refuse("a base of GPTQ weights is not supported; name the model that it was made of"),
    "quantize_moe_experts": quantised("quantising tensors of experts"),
    "model_quantization_config": quantised("another way to quantise the base"),
    "model_quantization_config_kwargs": quantised("another way to quantise the base"),
    "lora_r": _adapted(to("method.r", "whole")), "lora_alpha": _adapted(to("method.lora_alpha", "number")),
    "lora_dropout": _adapted(dropout(_objective)),
    "lora_target_linear": _adapted(_if_true("method.target_modules", "all-linear")),
    "lora_target_modules": _adapted(_targets),
    "lora_modules_to_save": _adapted(to("method.modules_to_save", "texts")),
    "peft_use_rslora": _adapted(to("method.use_rslora", "flag")),
    "peft_use_dora": _adapted(to("method.use_dora", "flag")),
    "peft_layers_to_transform": _adapted(_layers),
    "lora_model_dir": _adapted(to("method.init_from", "text")),
    "loraplus_lr_ratio": _adapted(lora_plus), "embedding_lr": _embedding_rate,
    "unfrozen_parameters": _unfrozen,
    "datasets": train_sources, "test_datasets": held_out, "val_set_size": held_out_rows("val_set_size"),
    "shuffle_merged_datasets": _shuffle,
    "curriculum_sampling": _if_true("data.shuffle", False),
    "dataset_exact_deduplication": _if_true("data.curation.exact", True),
    "chat_template": _chat_template, "chat_template_jinja": _jinja, "eot_tokens": _eot_tokens,
    "train_on_inputs": _train_on_inputs, "special_tokens": _special_tokens,
    "sequence_len": to("data.seq_len", "whole"), "sample_packing": to("data.packing", "flag"),
    "excess_length_strategy": _excess, "min_sample_len": _least_length,
    "micro_batch_size": _batch, "gradient_accumulation_steps": _part_of_batch, "batch_size": _part_of_batch,
    "num_epochs": _epochs, "max_steps": count_of("train.max_steps"),
    "gradient_checkpointing": _checkpointing, "selective_checkpointing": _checkpointing,
    "optimizer": optimizer, "learning_rate": to("optimizer.lr", "number"),
    "weight_decay": to("optimizer.weight_decay", "number"), "max_grad_norm": to("optimizer.max_grad_norm", "number"),
    "adam_beta1": _beta(0), "adam_beta2": _beta(1), "adam_epsilon": to("optimizer.eps", "number"),
    "lr_scheduler": schedule, "lr_scheduler_kwargs": schedule_arguments,
    "cosine_min_lr_ratio": _least_rate,
    "warmup_ratio": _warmup_ratio, "warmup_steps": _warmup_steps,
    "early_stopping_patience": early_stopping,
    "eval_steps": count_of("eval.every_steps"), "save_steps": count_of("checkpoint.every_steps"),
    "save_total_limit": count_of("checkpoint.keep_last"),
    "loss_watchdog_threshold": lambda source, value: Outcome("close", "an absolute limit; see failure.spike_factor"),
    "loss_watchdog_patience": no_effect("goes with loss_watchdog_threshold"),
    "deepspeed": deepspeed, "fsdp": _fsdp, "fsdp_config": _fsdp,
    "ray_num_workers": _ray_workers, "resources_per_worker": _resources,
    "seed": to("run.seed", "whole"), "output_dir": run_place,
    "wandb_project": _wandb, "use_wandb": no_effect("see wandb_project"), "wandb_mode": no_effect("see wandb_project"),
    "resume_from_checkpoint": refuse("leave it out; `dist-ft checkpoint import` takes the checkpoint over"),
    "auto_resume_from_checkpoints": no_effect("--resume does it here"),
    "noisy_embedding_alpha": neftune, "peft_autocast_adapter_dtype": unless(
        True, refuse("adapters of 16 bits, which are float32 here; leave it out")
    ),
    "type_of_model": _model_type,
    "shuffle_before_merging_datasets": no_effect("the order follows from other random numbers anyway"),
    "sage_attention": close_if_true("attention is quantised there, and exact here"),
    "embeddings_skip_upcast": no_effect("a frozen embedding; numbers of the last digits"),
    "fp32_norms": close_if_true("norms are computed in model.dtype here"),
    "fp32_norm_classes": no_effect("goes with fp32_norms"),
    "auto_find_batch_size": close_if_true("there a batch that does not fit is halved, and the step with it"),
    "nonexpert_quantization": quantised("quantising what is no expert"),
    "gemma4_fp8_nonexpert": quantised("8-bit weights of what is no expert"),
    "gemma4_nf4_nonexpert": quantised("4-bit weights of what is no expert"),
    "dsv4_fp8_nonexpert_mode": quantised("8-bit weights of what is no expert"),
    "dsv4_bf16_all": no_effect("weights are in model.dtype"),
    "neftune_noise_alpha": neftune, "plugins": _plugins, "tokens": _tokens,
    "tokenizer_use_mistral_common": close_if_true("Mistral's own tokenizer and template there; the model's here"),
    "resize_token_embeddings_to_32x": close_if_true("rows without a token may be added there, and none here"),
    "rl": _rl, "dpo_loss_type": no_effect("see rl"), "dpo_loss_weights": _loss_weights, "rpo_alpha": _sft_weight,
    "rl_beta": number("beta", ("dpo", "cpo", "orpo", "kto"), _objective),
    "orpo_alpha": number("beta", ("orpo",), _objective),
    "simpo_gamma": number("gamma", ("cpo",), _objective), "cpo_alpha": number("sft_weight", ("cpo",), _objective),
    "kto_desirable_weight": number("desirable_weight", ("kto",), _objective),
    "kto_undesirable_weight": number("undesirable_weight", ("kto",), _objective),
    "dpo_label_smoothing": smoothing(_objective), "precompute_ref_log_probs": no_effect("always, here"),
    "dpo_use_weighting": refuse("weighs pairs by their likelihood, which is not supported; leave it out"),
    "dataset_shard_num": refuse("a shard of the data; write its rows to a file"),
    "dataset_shard_idx": refuse("a shard of the data; write its rows to a file"),
}  # fmt: skip

for _keys, _rule in (
    (
        "tokenizer_type tokenizer_use_fast tokenizer_legacy strict debug low_cpu_mem_usage device_map use_ray "
        "fsdp_version is_falcon_derived_model is_llama_derived_model is_mistral_derived_model is_qwen_derived_model "
        "base_model_ignore_patterns torchdistx_path gptq_groupsize gptq_model_v1 save_safetensors save_only_model "
        "experimental_skip_move_to_device eval_batch_size save_strategy eval_strategy profiler_steps "
        "profiler_steps_start gc_steps include_tokens_per_second include_tkps nvfp4_merge_aware "
        "nvfp4_merge_aware_start_step llama4_linearized_experts eval_sequence_len ray_run_name gradio_title "
        "gradio_share gradio_server_name gradio_server_port gradio_max_new_tokens gradio_temperature lora_on_cpu "
        "merge_lora merge_method cls_model_config tokenizer_save_jinja_files dynamic_checkpoint device world_size "
        "save_first_step is_preprocess total_num_tokens total_supervised_tokens sample_packing_eff_est "
        "axolotl_config_path capabilities env_capabilities save_compressed overwrite_output_dir",
        no_effect("nothing here depends on it"),
    ),
    (
        "flash_attention sdp_attention xformers_attention flex_attention flex_attn_compile_kwargs "
        "flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_mlp flash_attn_fuse_qkv flash_optimum "
        "gemma4_hybrid_attn_impl fused_attn_kernel liger_rope liger_rms_norm liger_rms_norm_gated liger_layer_norm "
        "liger_glu_activation liger_swiglu liger_cross_entropy liger_fused_linear_cross_entropy "
        "liger_use_token_scaling cut_cross_entropy cut_cross_entropy_impl chunked_cross_entropy "
        "chunked_cross_entropy_num_chunks lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel "
        "unsloth_cross_entropy_loss unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o unsloth_rms_norm unsloth_rope "
        "use_kernels use_sonicmoe use_scattermoe experts_implementation use_glm_dsa_kernels torch_compile "
        "torch_compile_backend torch_compile_mode torch_compile_options tf32 deepcompile large_head_attention "
        "flash_attn_d512 sdpa_varlen dpo_use_liger_kernel liger_kernel_impl expert_backend moe_grouped_backend "
        "moe_dequant_chunk_size moe_bnb_fast use_dsv4_kernels dsv4_fp8_lora_kernel dsv4_shared_mlp_lora_kernel "
        "pretrain_multipack_attn",
        _KERNELS,
    ),
    (
        "pad_to_sequence_len pad_to_multiple_of eval_sample_packing sample_packing_group_size sample_packing_bin_size "
        "sample_packing_sequentially sample_packing_mp_start_method batch_flattening dataset_prepared_path "
        "dataset_num_proc dataset_processes dataset_keep_in_memory skip_prepare_dataset remove_unused_columns "
        "dataloader_pin_memory dataloader_num_workers dataloader_prefetch_factor dataloader_drop_last num_workers ddp "
        "ddp_timeout ddp_bucket_cap_mb ddp_broadcast_buffers ddp_find_unused_parameters local_rank "
        "activation_offloading layer_offloading tiled_mlp tiled_mlp_num_shards tiled_mlp_use_original_mlp "
        "gradient_checkpointing_kwargs max_memory gpu_memory_limit accelerator_config streaming_multipack_buffer_size "
        "push_dataset_to_hub hf_use_auth_token qlora_sharded_model_loading ple_cpu_offload num_dataset_shards_to_save "
        "torch_empty_cache_steps gc_collect_steps preprocess_iterable multipack_real_batches "
        "fsdp_final_state_dict_type pretrain_multipack_buffer_size",
        _MEMORY,
    ),
    (
        "context_parallel_size context_parallel_impl sequence_parallel_degree heads_k_stride ring_attn_func "
        "tensor_parallel_size expert_parallel_size expert_parallel_backend expert_parallel_num_nvl_bytes "
        "expert_parallel_token_capacity expert_parallel_num_rdma_bytes expert_parallel_fallback_on_unsupported "
        "dp_shard_size dp_replicate_size",
        _PARALLEL,
    ),
    (
        "logging_steps use_tensorboard use_mlflow mlflow_tracking_uri mlflow_experiment_name mlflow_run_name "
        "hf_mlflow_log_artifacts use_comet comet_api_key comet_workspace comet_project_name comet_experiment_key "
        "comet_mode comet_online comet_experiment_config use_trackio trackio_project_name trackio_run_name "
        "trackio_space_id use_swanlab swanlab_project swanlab_experiment_name swanlab_description swanlab_mode "
        "swanlab_workspace swanlab_log_completions swanlab_completion_log_interval swanlab_completion_max_buffer "
        "use_otel_metrics otel_metrics_host otel_metrics_port wandb_entity wandb_name wandb_run_id wandb_watch "
        "wandb_log_model hub_model_id hub_strategy hub_revision hub_private vllm eval_table_size eval_max_new_tokens "
        "do_causal_lm_eval eval_causal_lm_metrics do_bench_eval generate_samples num_generation_samples "
        "generation_max_new_tokens generation_temperature generation_top_p generation_top_k generation_prompt_ratio "
        "generation_do_sample bench_dataset bench_split lm_eval_tasks lm_eval_batch_size lm_eval_post_train "
        "lm_eval_model log_with_wandb loss_watchdog_log",
        _LOGS,
    ),
    ("evals_per_epoch saves_per_epoch evaluation_strategy", _RHYTHM),
    ("load_best_model_at_end", BEST),
    ("metric_for_best_model greater_is_better", no_effect("see eval.best_metric")),
    (
        "trl ebft reward_model process_reward_model center_rewards_coefficient qat quantization fp8 "
        "fp8_enable_fsdp_float8_all_gather diffusion kd_trainer kd_ce_alpha kd_alpha kd_temperature use_eaft "
        "lisa_n_layers lisa_step_interval lisa_layers_attribute relora relora_steps relora_prune_ratio "
        "jagged_restart_steps jagged_restart_warmup_steps jagged_restart_anneal_steps dpo_padding_free use_onebitllms "
        "llmcompressor spectrum_top_fraction num_labels spectrum_model_name mora hatchery relora_prune_method "
        "relora_cpu_offload fp8_config use_pose pose_split_on_token_ids pose_max_context_len pose_num_chunks "
        "eaft_alpha eaft_k kd_beta kd_normalize_topk kd_online_server_base_url kd_online_topk kd_online_server "
        "kd_online_timeout kd_temperature_min dense_mixer recipe grokfast_alpha grokfast_lamb max_prompt_len "
        "nemo_gym_enabled nemo_gym_dir nemo_gym_auto_clone nemo_gym_config_paths nemo_gym_head_port "
        "nemo_gym_server_timeout nemo_gym_verify_timeout nemo_gym_run_timeout nemo_gym_datasets nemo_gym_auto_start "
        "nemo_gym_model_name nemo_gym_multi_turn nemo_gym_max_turns",
        refuse(_METHOD),
    ),
    (
        "pretraining_dataset streaming pretraining_sample_concatenation",
        refuse("windows over a stream of text are not supported; name the data under datasets with type: completion"),
    ),
    (
        "processor_type processor_kwargs role_boundaries image_size image_resize_algorithm freeze_mm_modules "
        "chat_template_mm",
        refuse("a model of images or audio; only text is trained here: name a model of text"),
    ),
    (
        "lora_target_parameters lora_rank_pattern lora_alpha_pattern peft_init_lora_weights lora_fan_in_fan_out "
        "loftq_config peft peft_layers_pattern peft_ensure_weight_tying peft_trainable_token_indices "
        "loraplus_lr_embedding embedding_lr_scale lr_groups peft_layer_replication",
        refuse("an option of adapters or groups that is not supported; leave it out"),
    ),
    (
        "reinit_weights added_tokens_overrides shrink_embeddings group_by_length optim_args optim_target_modules "
        "muon_lr cosine_constant_lr_ratio lr_quadratic_warmup dsv4_fp4_grouped_mode default_system_message "
        "model_kwargs adam_epsilon2 adam_beta3 label_smoothing_factor loss_fct trainer_cls lr_div_factor dion_lr "
        "dion_momentum dion_rank_fraction dion_rank_multiple_of qgalore_rank qgalore_update_proj_gap qgalore_scale "
        "qgalore_proj_type qgalore_proj_quant qgalore_proj_bits qgalore_proj_group_size qgalore_cos_threshold "
        "qgalore_gamma_proj qgalore_queue_size overrides_of_model_kwargs scaling_softmax scaling_softmax_factor "
        "scaling_softmax_bias chat_template_kwargs fix_untrained_tokens mean_resizing_embeddings",
        refuse("changes what is trained, and is not supported; leave it out"),
    ),
    (
        "dpo_beta dpo_use_logits_to_keep dpo_generate_during_eval dpo_norm_loss max_packed_sequence_len rope_scaling "
        "conversation",
        refuse("gone from Axolotl, which refuses it too; leave it out"),
    ),
):  # fmt: skip
    TABLE |= dict.fromkeys(_keys.split(), _rule)

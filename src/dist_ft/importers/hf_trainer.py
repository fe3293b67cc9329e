"""The keys of the Hugging Face Trainer, which LLaMA-Factory and TRL share."""

from __future__ import annotations

from dataclasses import replace

from dist_ft.config.yaml_file import Yaml
from dist_ft.importers.rule_kinds import (
    BEST,
    FLOAT16,
    close_if_true,
    count_of,
    neftune,
    no_effect,
    optimizer,
    refuse,
    run_place,
    schedule,
    schedule_arguments,
    to,
    unless,
    warmup_ratio,
    warmup_steps,
    zero_stage,
)
from dist_ft.importers.verdicts import Outcome, Rule, Source, as_flag, as_number, as_text, as_whole, is_off

TRAINER_DEFAULTS: dict[str, Yaml] = {
    "learning_rate": 5e-5, "num_train_epochs": 3.0, "per_device_train_batch_size": 8, "lr_scheduler_type": "linear",
    "warmup_ratio": 0.0, "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 42, "bf16": False, "optim": "adamw_torch",
    "report_to": "none",
}  # fmt: skip
"""What the Trainer takes for keys that a file leaves out."""


def batch(source: Source, value: Yaml) -> Outcome:
    """Take over the batch: sequences a device, times passes, times devices."""
    micro = as_whole("per_device_train_batch_size", value)
    steps = source.whole("gradient_accumulation_steps", 1)
    world = source.options.gpus or source.whole("ray_num_workers", 1)
    settings: dict[str, Yaml] = {"train.micro_batch_size": micro, "train.global_batch_size": micro * steps * world}
    if source.options.gpus is not None:
        settings["cluster.num_workers"] = source.options.gpus
    if source.options.gpus is None and "ray_num_workers" not in source.values:
        return Outcome("close", "FOR ONE GPU: the file does not say how many it is for; give --gpus N", settings)
    return Outcome("same", f"{micro} x {steps} x {world} ranks", settings)


def _workers(source: Source, value: Yaml) -> Outcome:
    return Outcome("same", "", {"cluster.num_workers": source.options.gpus or source.whole("ray_num_workers", 1)})


def _in_batch(source: Source, value: Yaml) -> Outcome:
    as_whole("gradient_accumulation_steps", value)
    return Outcome("same", "in train.global_batch_size")


def BF16(source: Source, value: Yaml) -> Outcome:
    """Take over `bf16`: bfloat16 weights here, float32 without."""
    if as_flag("bf16", value):
        why = "float32 masters and moments here, whatever the other tool keeps"
        return Outcome("close", why, {"model.dtype": "bfloat16"})
    return Outcome("same", "", {"model.dtype": "float32"})


def _epochs(source: Source, value: Yaml) -> Outcome:
    if source.number("max_steps", -1) > 0:
        return Outcome("no effect", "max_steps wins")
    return Outcome("same", "", {"train.epochs": float(as_number("num_train_epochs", value))})


def _beta(source: Source, value: Yaml) -> Outcome:
    as_number("a beta", value)
    betas: list[Yaml] = [source.number("adam_beta1", 0.9), source.number("adam_beta2", 0.999)]
    return Outcome("same", "", {"optimizer.betas": betas})


def _report_to(source: Source, value: Yaml) -> Outcome:
    names = value if isinstance(value, list) else [value]
    wandb = "auto" if {"wandb", "all"} & {as_text("report_to", name) for name in names} else "disabled"
    return Outcome("same", "", {"monitor.wandb": wandb})


def _fsdp(source: Source, value: Yaml) -> Outcome:
    if isinstance(value, int | float) and not isinstance(value, bool):
        as_text("fsdp", value)
    is_whole = isinstance(value, dict) and is_off(value.get("reshard_after_forward", True))
    stage = zero_stage(source, 2 if is_whole else 3)
    return Outcome("no effect", "every stage gives the same result", {"zero.stage": stage})


def _warmup_steps(source: Source, value: Yaml) -> Outcome:
    """Take over a warm-up in steps; less than one is a share of them, as of transformers 5."""
    number = as_number("warmup_steps", value)
    if number == 0:
        return Outcome("no effect", "off")
    if not 0 < number < 1:
        return warmup_steps(source, value)
    if "warmup_ratio" in source.values:
        return Outcome("refused", "a share of the steps, beside warmup_ratio; remove one of the two")
    others = {key: item for key, item in source.values.items() if key != "warmup_steps"}
    return warmup_ratio(replace(source, values=others), value)


_RHYTHM = no_effect("when to measure or to keep a checkpoint; see eval.every_steps and checkpoint.every_steps")
_RATE = "changes what is trained, and is not supported; leave it out"

TRAINER_TABLE: dict[str, Rule] = {
    "output_dir": run_place, "seed": to("run.seed", "whole"), "run_name": no_effect("the run is named by output_dir"),
    "per_device_train_batch_size": batch, "gradient_accumulation_steps": _in_batch, "ray_num_workers": _workers,
    "learning_rate": to("optimizer.lr", "number"), "weight_decay": to("optimizer.weight_decay", "number"),
    "max_grad_norm": to("optimizer.max_grad_norm", "number"), "adam_beta1": _beta, "adam_beta2": _beta,
    "adam_epsilon": to("optimizer.eps", "number"), "optim": optimizer,
    "lr_scheduler_type": schedule, "lr_scheduler_kwargs": schedule_arguments,
    "warmup_ratio": warmup_ratio, "warmup_steps": _warmup_steps,
    "num_train_epochs": _epochs, "max_steps": count_of("train.max_steps"),
    "bf16": BF16, "fp16": refuse(FLOAT16),
    "eval_steps": count_of("eval.every_steps"), "save_steps": count_of("checkpoint.every_steps"),
    "save_total_limit": count_of("checkpoint.keep_last"), "report_to": _report_to,
    "fsdp": _fsdp, "fsdp_config": _fsdp,
    "resume_from_checkpoint": refuse("leave it out; `dist-ft checkpoint import` takes the checkpoint over"),
    "eval_strategy": _RHYTHM, "evaluation_strategy": _RHYTHM, "save_strategy": _RHYTHM,
    "load_best_model_at_end": BEST,
    "metric_for_best_model": no_effect("see eval.best_metric"),
    "neftune_noise_alpha": neftune, "label_smoothing_factor": refuse(_RATE), "group_by_length": refuse(_RATE),
    "optim_args": refuse(_RATE), "optim_target_modules": refuse(_RATE),
    "router_aux_loss_coef": refuse("adds a loss of the router, which is not supported; set it to 0"),
    "parallelism_config": refuse("ranks that share a sequence are not counted; leave it out, and give --gpus N"),
    "average_tokens_across_devices": unless(
        True, lambda source, value: Outcome("close", "a mean over each GPU there, over all trained tokens here")
    ),
    "auto_find_batch_size": close_if_true("there a batch that does not fit is halved, and the step with it"),
}  # fmt: skip
_NO_EFFECT = (
    "full_determinism "
    "logging_steps logging_first_step logging_strategy logging_dir save_only_model save_safetensors "
    "per_device_eval_batch_size ddp_timeout ddp_find_unused_parameters dataloader_num_workers dataloader_pin_memory "
    "dataloader_drop_last tf32 torch_compile push_to_hub hub_model_id hub_strategy remove_unused_columns "
    "gradient_checkpointing_kwargs disable_tqdm log_level use_liger_kernel torch_empty_cache_steps hub_private_repo "
    "hub_token bf16_full_eval fp16_full_eval activation_checkpointing activation_checkpointing_kwargs "
    "torch_compile_mode torch_compile_backend liger_kernel_config use_cache log_on_each_node logging_nan_inf_filter "
    "include_num_input_tokens_seen include_tokens_per_second log_level_replica project trackio_space_id "
    "trackio_bucket_id trackio_static_space_id eval_delay prediction_loss_only eval_on_start eval_do_concat_batches "
    "eval_use_gather_object eval_accumulation_steps include_for_metrics include_inputs_for_metrics batch_eval_metrics "
    "save_on_each_node enable_jit_checkpoint hub_always_push hub_revision greater_is_better ignore_data_skip "
    "restore_callback_states_from_checkpoint data_seed use_cpu no_cuda use_mps_device accelerator_config "
    "dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order "
    "label_names length_column_name ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend debug "
    "skip_memory_metrics do_train do_eval do_predict local_rank overwrite_output_dir gradient_checkpointing "
    "fsdp_min_num_params half_precision_backend fsdp_transformer_layer_cls_to_wrap ray_scope torchdynamo use_ipex "
    "jit_mode_eval eval_split_batches"
)
TRAINER_TABLE |= dict.fromkeys(_NO_EFFECT.split(), no_effect("nothing of the result depends on it here"))

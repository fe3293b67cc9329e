"""The DeepSpeed config as a pure function. Only this module uses DeepSpeed's own spellings."""

from __future__ import annotations

from typing import Any

from dist_ft.config import Config
from dist_ft.slots import num_micro_steps, round_up
from dist_ft.zero.optimizers import optimizer_of

_BUCKET_LIMIT = 200_000_000  # elements; more only costs memory
_NEVER = 10**9


def build_ds_config(
    config: Config, *, world_size: int, micro_batch_size: int, num_params: int, num_trained: int, on_gpu: bool
) -> dict[str, Any]:
    """Return the dict for `deepspeed.initialize`.

    Args:
        config: The run config.
        world_size: Ranks of this attempt.
        micro_batch_size: Sequences per rank and pass.
        num_params: Elements of the whole model.
        num_trained: Elements that are trained.
        on_gpu: Whether ranks run on CUDA devices.
    """
    passes = num_micro_steps(config.train.global_batch_size, micro_batch_size, world_size)
    ds: dict[str, Any] = {
        # DeepSpeed insists on the product; the slots beyond train.global_batch_size are zero-weight padding.
        "train_batch_size": micro_batch_size * passes * world_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": config.optimizer.max_grad_norm,
        "steps_per_print": _NEVER,
        "wall_clock_breakdown": False,
        "zero_optimization": _zero_section(config, num_params, num_trained, on_gpu),
    }
    if config.model.torch_dtype == "bfloat16":
        ds["bf16"] = {"enabled": True}
        # Without these two, gradients are summed in bfloat16 and two shapes of a run drift apart by 1e-2.
        ds["data_types"] = {"grad_accum_dtype": "fp32"}
        ds["communication_data_type"] = "fp32"
    if config.zero.offload:
        ds["zero_force_ds_cpu_optimizer"] = False
    if not optimizer_of(config.optimizer).is_listed:
        ds["zero_allow_untested_optimizer"] = True
    return ds


def build_init_config(config: Config, on_gpu: bool) -> dict[str, Any]:
    """Return the dict for `deepspeed.zero.Init`, which reads only dtype and offload settings."""
    ds: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    if config.model.torch_dtype == "bfloat16":
        ds["bf16"] = {"enabled": True}
    if config.zero.offload:
        ds["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    return ds


def _zero_section(config: Config, num_params: int, num_trained: int, on_gpu: bool) -> dict[str, Any]:
    stage = config.zero_stage
    section: dict[str, Any] = {"stage": stage}
    if stage == 0:
        return section
    bucket = round_up(min(_BUCKET_LIMIT, num_trained), 2)  # DeepSpeed refuses an odd one
    section |= {
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "contiguous_gradients": True,
        # gloo runs on the cores that compute; there is nothing to overlap with.
        "overlap_comm": on_gpu,
        # The flat layout must not depend on more than the world size: slices are cut out of it.
        "round_robin_gradients": False,
    }
    if stage == 3:
        section |= {
            # Gather at most an eighth of the model, so that stage 3 saves memory at any size. With the
            # default of 1e9 a small model is never released, and the search for what to release
            # (`__params_to_release` walks the trace) takes 30 s in the second step of a 135M model.
            "stage3_max_live_parameters": max(1_000_000, num_params // 8),
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": max(100_000, num_params // 32),
            "stage3_param_persistence_threshold": min(100_000, max(1_000, num_params // 10_000)),
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    if config.zero.offload:
        section["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
        if stage == 3:
            section["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    return section

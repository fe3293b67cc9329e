"""Checks the rules that join several sections. They are pure, so they hold on any machine."""

from __future__ import annotations

from fractions import Fraction

from dist_ft.config.data_sections import DataConfig, RowSource
from dist_ft.config.schema import Config
from dist_ft.config.training_sections import (
    CpoConfig,
    DistillConfig,
    DpoConfig,
    MethodConfig,
    SftConfig,
    plain_metric,
)
from dist_ft.errors import ConfigError
from dist_ft.storage.urls import checked_store_url, is_url, shown_url, without_secrets

_LEAST_SHARE = Fraction(1, 10**9)


def check_sections(config: Config) -> None:
    """Check the rules that hold on any machine, without looking at files or cores.

    Raises:
        ConfigError: With every problem found, one a line.
    """
    problems = section_problems(config)
    if problems:
        raise ConfigError("\n".join(problems))


def section_problems(config: Config) -> list[str]:
    """Return the problems that a config has on any machine, one a line."""
    problems = []
    train, data = config.train, config.data
    if train.micro_batch_size > train.global_batch_size:
        problems.append(
            f"train.micro_batch_size={train.micro_batch_size} is larger than "
            f"train.global_batch_size={train.global_batch_size}; lower the micro batch"
        )
    sizes, workers = config.cluster.allowed_sizes, config.cluster
    if sizes is not None and not any(workers.min_workers <= size <= workers.max_workers for size in sizes):
        problems.append(
            f"cluster.allowed_sizes={sizes}: none of them is within cluster.num_workers={workers.num_workers}; "
            "change one of the two"
        )
    problems += _mixing_problems(config)
    problems += _eval_problems(config)
    problems += _checkpoint_problems(config)
    problems += _export_problems(config)
    problems += [
        f"{section}{written}={shown_url(source.source)} holds a secret, which would be kept in the run directory; give "
        "the credentials in the environment of all machines, or name a copy"
        for section, written, source in sources_of(config)
        if without_secrets(source.source) != source.source
    ]
    problems += _curation_problems(data)
    if config.zero.offload and config.zero_stage == 0:
        problems.append("zero.offload=true needs zero.stage >= 1")
    problems += _method_problems(config.method)
    if (asked := config.model.quantization) is not None:
        problems += quantisation_problems(config, f"model.quantization.kind={asked.kind}")
    if config.optimizer.lora_plus_ratio is not None and config.method.kind != "lora":
        problems.append(
            f"optimizer.lora_plus_ratio={config.optimizer.lora_plus_ratio:g} is for adapters, but method.kind="
            f"{config.method.kind}; remove it, or set method.kind=lora"
        )
    problems += _objective_problems(config)
    if config.optimizer.kind == "schedule_free_adamw" and not config.schedule.kind.startswith("constant"):
        problems.append(
            f"optimizer.kind=schedule_free_adamw averages the weights instead of lowering the rate, but schedule.kind="
            f"{config.schedule.kind}; set schedule.kind=constant_with_warmup"
        )
    if data.group_by is not None and data.eval_fraction is None and data.eval_count is None:
        problems.append(
            f"data.group_by={data.group_by} is for a held-out fraction or number of rows; set data.eval to one, or "
            "remove it"
        )
    if is_url(config.run.output_dir):
        try:
            checked_store_url(config.run.output_dir)
        except ConfigError as error:
            problems.append(f"run.output_dir: {error}")
    return problems


def quantisation_problems(config: Config, where: str) -> list[str]:
    """Return what a quantised base cannot be joined with.

    Args:
        config: The run config.
        where: What says that the base is quantised.
    """
    problems = []
    if config.method.kind != "lora":
        problems.append(f"{where} freezes the base, so that method.kind={config.method.kind} has nothing to train; "
                        "set method.kind=lora")  # fmt: skip
    if config.zero_stage == 3:
        problems.append(
            f"{where} does not go with zero.stage=3, which cuts weights into flat parts: the scales of a quantised "
            "matrix lie beside it and would be lost; set zero.stage=2"
        )
    if config.method.use_dora:
        problems.append(f"{where} does not go with method.use_dora=true, which measures whole weights; remove one")
    return problems


def _mixing_problems(config: Config) -> list[str]:
    """Return the problems of mixing sources (docs/data.md, "Mixing")."""
    problems, data = [], config.data
    weights = [source.weight for source in data.train if source.weight is not None]
    if 0 < len(weights) < len(data.train):
        problems.append("data.train: weight is set on some sources only; set it on all of them or on none")
    whole = sum(map(Fraction, weights))
    for index, weight in enumerate(weights):
        if Fraction(weight) / whole < _LEAST_SHARE:
            problems.append(
                f"data.train.{index}.weight={weight:g} is less than a billionth of the sum of all weights; raise it or "
                "remove the source"
            )
    if not weights and data.exhaust != "all":
        problems.append(
            f"data.exhaust={data.exhaust} is for sources with a weight; set data.train.0.weight (and so on), or remove "
            "it: without weights an epoch takes every sequence once"
        )
    if not weights and data.preparation == "stream" and len(data.train) > 1:
        problems.append(
            "data.preparation=stream: how large the sources are is not known at the start; set a weight on each"
        )
    endless = [
        f"data.{key}={value}" for key, value in (("exhaust", data.exhaust), ("preparation", data.preparation))
        if value in ("repeat", "stream")
    ]  # fmt: skip
    if endless and config.train.max_steps is None:
        problems.append(f"{' and '.join(endless)} has no end of an epoch to stop at; set train.max_steps")
    return problems


def _eval_problems(config: Config) -> list[str]:
    problems = []
    wanted = config.eval
    if wanted.metrics and config.data.eval is None:
        problems.append(f"eval.metrics={wanted.metrics} needs held-out data; set data.eval")
    if ("regex" in wanted.metrics) != (wanted.regex is not None):
        problems.append(
            f"eval.regex={wanted.regex} and `regex` in eval.metrics={wanted.metrics} need one another; set both"
        )
    counted = {"a fraction": config.data.eval_fraction, "a number": config.data.eval_count}
    for kind, held_out in counted.items() if config.data.preparation == "stream" else ():
        if held_out is None:
            continue
        problems.append(
            f"data.eval={held_out} is {kind} of rows that data.preparation=stream has not read "
            "yet; name a source, or set data.preparation=ahead"
        )
    if config.data.preparation == "stream" and config.data.curates:
        problems.append(
            "data.curation and max_rows look at all rows, which data.preparation=stream has not read yet; "
            "remove them, or set data.preparation=ahead"
        )
    steering = {"early_stopping": wanted.early_stopping, "best_metric": wanted.best_metric}
    used = [key for key, value in steering.items() if value is not None]
    if used and (config.data.eval is None or wanted.every_steps is None):
        problems.append(
            f"eval.{used[0]} needs evaluations on the way, but data.eval={config.data.eval} and "
            f"eval.every_steps={wanted.every_steps}; set both"
        )
    return problems


def _checkpoint_problems(config: Config) -> list[str]:
    problems, wanted = [], config.checkpoint
    if wanted.keep_best > 1 and config.eval.best_metric is None:
        problems.append(
            f"checkpoint.keep_best={wanted.keep_best} needs a metric to compare by; set eval.best_metric, or remove it"
        )
    if wanted.keep_every is not None and wanted.every_steps == "auto":
        problems.append(
            f"checkpoint.keep_every={wanted.keep_every} keeps steps by their number, and checkpoint.every_steps=auto "
            "chooses them by the clock; set a number of steps, or remove keep_every"
        )
    elif (
        wanted.keep_every is not None and isinstance(wanted.every_steps, int) and wanted.keep_every % wanted.every_steps
    ):
        problems.append(
            f"checkpoint.keep_every={wanted.keep_every} is no multiple of checkpoint.every_steps={wanted.every_steps}, "
            "so it would keep few or none; change one of the two"
        )
    return problems


def _export_problems(config: Config) -> list[str]:
    problems, wanted, every = [], config.export, config.checkpoint.every_steps
    if wanted.every_steps is not None and (not isinstance(every, int) or wanted.every_steps % every):
        problems.append(
            f"export.every_steps={wanted.every_steps} is no multiple of checkpoint.every_steps={every}, and only "
            "checkpoints are exported; change one of the two"
        )
    if wanted.latest and every is None:
        problems.append("export.latest=true exports checkpoints, but checkpoint.every_steps=null makes none on the way")
    if wanted.best and config.eval.best_metric is None:
        problems.append("export.best=true needs a metric to compare by; set eval.best_metric")
    if wanted.merge and config.method.kind == "full":
        problems.append("export.merge=true folds an adapter, but method.kind=full trains none; remove it")
    return problems


def _curation_problems(data: DataConfig) -> list[str]:
    problems, curation = [], data.curation
    for what, least, most in (
        ("characters", curation.min_characters, curation.max_characters),
        ("turns", curation.min_turns, curation.max_turns),
    ):
        if least is not None and most is not None and least > most:
            problems.append(
                f"data.curation.min_{what}={least} is more than data.curation.max_{what}={most}, so no row is left; "
                "change one of the two"
            )
    if curation.against_eval and data.eval is None:
        problems.append("data.curation.against_eval=true needs held-out data; set data.eval, or remove it")
    if data.limits.leaked is not None and data.eval is None:
        problems.append(f"data.limits.leaked={data.limits.leaked:g} needs held-out data; set data.eval, or remove it")
    return problems


def _method_problems(method: MethodConfig) -> list[str]:
    problems = []
    if method.kind == "full" and method.init_from is not None:
        problems.append("method.init_from names an adapter, but method.kind=full; set method.kind=lora")
    if method.kind == "full" and method.modules_to_save:
        problems.append("method.modules_to_save is for method.kind=lora; method.kind=full trains every module")
    if method.kind == "lora" and method.freeze:
        problems.append("method.freeze is for method.kind=full; with method.kind=lora the base is frozen anyway")
    if method.kind == "full" and (method.use_dora or method.use_rslora or method.layers_to_transform):
        problems.append(
            "method.use_dora, use_rslora and layers_to_transform are for method.kind=lora; method.kind=full trains "
            "every layer that method.freeze does not name"
        )
    elif method.layers_to_transform and isinstance(method.target_modules, str):
        problems.append(
            f"method.layers_to_transform={method.layers_to_transform} needs method.target_modules as a list of names, "
            f"such as [q_proj, v_proj]; it is {method.target_modules}"
        )
    return problems


def _objective_problems(config: Config) -> list[str]:
    """Return the problems of an objective with the other sections (docs/objectives.md)."""
    problems, objective, data = [], config.objective, config.data
    if isinstance(objective, DpoConfig) and objective.label_smoothing and objective.loss != "robust":
        problems.append(
            f"objective.label_smoothing={objective.label_smoothing:g} does nothing with objective.loss="
            f"{objective.loss}; set objective.loss=robust, or remove it"
        )
    if isinstance(objective, CpoConfig) and objective.gamma != 0.5 and objective.loss != "simpo":
        problems.append(
            f"objective.gamma={objective.gamma:g} is for objective.loss=simpo, and it is {objective.loss}; remove it"
        )
    steering = {"best_metric": config.eval.best_metric}
    if config.eval.early_stopping is not None:
        steering["early_stopping.metric"] = config.eval.early_stopping.metric
    problems += [
        f"eval.{key}={metric} is not measured with objective.kind={objective.kind}; choose one of "
        + ", ".join(objective.steering)
        for key, metric in steering.items()
        if metric is not None and plain_metric(metric) not in objective.steering
    ]
    problems += [
        f"eval.{key}={metric}: data.eval has no set {set_name}; "
        + (f"choose one of {', '.join(data.eval_names)}" if data.eval_names else "its only set has no name")
        for key, metric in steering.items()
        if metric is not None
        and (set_name := metric.removesuffix(plain_metric(metric)).rstrip("/"))
        and set_name not in data.eval_names
    ]
    if isinstance(objective, SftConfig | DistillConfig):
        return problems
    if data.train_on in ("all", "completion"):
        problems.append(
            f"data.train_on={data.train_on} trains prompts, which objective.kind={objective.kind} only conditions on; "
            "remove it"
        )
    if data.long_samples == "split":
        problems.append(
            f"data.long_samples=split cuts answers into pieces, which objective.kind={objective.kind} cannot compare; "
            "set it to truncate or drop"
        )
    return problems


def sources_of(config: Config) -> list[tuple[str, str, RowSource]]:
    """Return (section, suffix of the key that holds the address, source) of every source."""
    found = [(f"data.train.{index}", ".source", source) for index, source in enumerate(config.data.train)]
    suffix = "" if isinstance(config.data.eval, str) else ".source"
    return [*found, *((key, suffix, source) for key, source in config.data.eval_sources.items())]

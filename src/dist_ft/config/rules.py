"""Rules that join sections or look at the machine; all run before any process starts."""

from __future__ import annotations

import os
from pathlib import Path

from dist_ft.config.schema import Config
from dist_ft.errors import ConfigError

EMBEDDED_PREFIX = "embedded:"


def check_config(config: Config) -> None:
    """Checks what the schema cannot, in milliseconds.

    Raises:
        ConfigError: With every problem found, one a line.
    """
    problems = [*_section_problems(config), *_file_problems(config)]
    if problems:
        raise ConfigError("\n".join(problems))


def _section_problems(config: Config) -> list[str]:
    problems = []
    train, data = config.train, config.data
    if train.micro_batch_size > train.global_batch_size:
        problems.append(
            f"train.micro_batch_size={train.micro_batch_size} is larger than "
            f"train.global_batch_size={train.global_batch_size}; lower the micro batch"
        )
    weights = [source.weight for source in data.train]
    if any(w is None for w in weights) and any(w is not None for w in weights):
        problems.append("data.train: weight is set on some sources only; set it on all of them or on none")
    if config.eval.metrics and data.eval is None:
        problems.append(f"eval.metrics={config.eval.metrics} needs held-out data; set data.eval")
    if config.zero.offload and config.zero_stage == 0:
        problems.append("zero.offload=true needs zero.stage >= 1")
    if config.method.kind == "full" and config.method.init_from is not None:
        problems.append("method.init_from names an adapter, but method.kind=full; set method.kind=lora")
    if "://" in config.run.output_dir:
        problems.append(
            f"run.output_dir={config.run.output_dir}: this release writes to file systems only; "
            "set a path that all machines share"
        )
    return problems


def _file_problems(config: Config) -> list[str]:
    problems = []
    for index, source in enumerate(config.data.train):
        problems += _source_problem(f"data.train.{index}.source", source.source)
    if isinstance(config.data.eval, str):
        problems += _source_problem("data.eval", config.data.eval)
    template = config.data.chat_template
    if template is not None and not Path(template).is_file():
        problems.append(f"data.chat_template={template}: no such file")
    init_from = config.method.init_from
    if init_from is not None and not (Path(init_from) / "adapter_config.json").is_file():
        problems.append(
            f"method.init_from={init_from}: no PEFT adapter there (adapter_config.json is missing)"
        )
    return problems + _output_problem(config) + _model_problem(config)


def _source_problem(key: str, source: str) -> list[str]:
    if source.startswith(EMBEDDED_PREFIX):
        return []
    path = Path(source)
    if not path.exists():
        return [f"{key}={source}: no such file (looked in {Path.cwd()})"]
    if path.is_dir():
        return [f"{key}={source} is a directory; name a JSONL file"]
    if path.stat().st_size == 0:
        return [f"{key}={source} is empty; expected one JSON object a line"]
    return [] if os.access(path, os.R_OK) else [f"{key}={source} is not readable"]


def _model_problem(config: Config) -> list[str]:
    name = config.model.name
    looks_like_path = name.startswith((".", "/", "~")) or Path(name).exists()
    path = Path(name).expanduser()
    if not looks_like_path or (path / "config.json").is_file():
        return []
    if not path.exists():
        return [f"model.name={name}: no such directory; name a model directory or a hub id"]
    return [
        f"model.name={name} is not a model: config.json is missing; name a directory made by save_pretrained"
    ]


def _output_problem(config: Config) -> list[str]:
    parent = Path(config.run.output_dir).absolute()
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        return [f"run.output_dir={config.run.output_dir}: {parent} is not a directory"]
    if not os.access(parent, os.W_OK | os.X_OK):
        return [f"run.output_dir={config.run.output_dir}: {parent} is not writable; choose another directory"]
    return []

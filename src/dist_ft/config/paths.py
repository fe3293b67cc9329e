"""Checks a config against this machine, its files and its capacity, before any process starts."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dist_ft.config.data_sections import CHAT_TEMPLATES, RowSource
from dist_ft.config.rules import check_sections, section_problems, sources_of
from dist_ft.config.schema import Config
from dist_ft.config.training_sections import DistillConfig, DpoConfig, KtoConfig
from dist_ft.errors import ConfigError
from dist_ft.file_kinds import has_known_ending
from dist_ft.machine import has_gpu, local_slots, workers_on
from dist_ft.storage.remote import is_remote, missing_package, without_scheme
from dist_ft.storage.urls import is_url, shown_url

EMBEDDED_PREFIX = "embedded:"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MAX_HUB_ID = 96  # the hub's own limit
_PATTERN = re.compile(r"[*?[]")


def check_config(config: Config) -> None:
    """Check what the schema cannot check. Takes milliseconds.

    Raises:
        ConfigError: With every problem found, one a line.
    """
    problems = [*section_problems(config), *_file_problems(config)]
    cluster, resources = config.cluster, config.cluster.resources_per_worker or {}
    is_on_cpus = not resources.get("GPU") and (bool(resources) or not has_gpu())
    if cluster.address is None and is_on_cpus:  # `connect` checks a given cluster later
        room = workers_on({"CPU": local_slots()}, {"CPU": resources.get("CPU", 1.0)})
        if room is not None and cluster.min_workers > room:
            problems.append(
                f"cluster.num_workers={cluster.num_workers} is more than this machine takes "
                f"({local_slots()} CPU slots: four a core, at least eight); lower it or set cluster.address"
            )
    if problems:
        raise ConfigError("\n".join(problems))


def check_config_elsewhere(config: Config) -> None:
    """Check a config on a machine that will not run it and need not have its files.

    The paths are those of the machines that run it, in an unknown working directory, so they must be absolute.

    Raises:
        ConfigError: The config has problems; the message has one line for each.
    """
    check_sections(config)
    data, name = config.data, config.model.name
    named: dict[str, str | None] = {
        "run.output_dir": config.run.output_dir,
        "method.init_from": config.method.init_from,
    }
    sources: dict[str, RowSource] = {f"data.train.{index}.source": s for index, s in enumerate(data.train)}
    sources |= data.eval_sources
    named |= {
        key: source.source
        for key, source in sources.items()
        if is_there(Path(source.source)) or not is_hub_id(source.source)
    }
    named |= {"data.chat_template": data.template_path}
    models = {"model.name": name}
    if isinstance(config.objective, DpoConfig | KtoConfig):
        named["objective.reference"] = config.objective.reference
    elif isinstance(config.objective, DistillConfig):
        models["objective.teacher"] = config.objective.teacher
    # Otherwise it is a hub id, an embedded model or a path of the cluster.
    named |= {key: model for key, model in models.items() if _is_relative_path(model)}
    problems = [
        f"{key}={path} is a relative path, but the run will not start in this directory; name the absolute path "
        "under which all machines of the cluster see it"
        for key, path in named.items()
        if path is not None and not path.startswith(("/", EMBEDDED_PREFIX)) and "://" not in path
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _is_relative_path(model: str) -> bool:
    return model.startswith((".", "~")) or (is_there(Path(model)) and not Path(model).is_absolute())


def is_hub_id(source: str) -> bool:
    """Return whether a source that is not a path can be the hub id of a data set, not a misspelt file name."""
    is_one = len(source) <= _MAX_HUB_ID and _HUB_ID.fullmatch(source) is not None
    return is_one and not has_known_ending(source)


def is_pattern(source: str) -> bool:
    """Return whether a source that is not a path can be a pattern for several files, such as `data/*.jsonl`."""
    return _PATTERN.search(source) is not None


def _file_problems(config: Config) -> list[str]:
    problems = [
        problem
        for section, written, source in sources_of(config)
        for problem in _source_problem(section, written, source)
    ]
    template = config.data.template_path
    if template is not None and not _is_file(Path(template)):
        problems.append(
            f"data.chat_template={template[:60]}: no such file; name a Jinja file or one of {', '.join(CHAT_TEMPLATES)}"
        )
    init_from = config.method.init_from
    if init_from is not None and not _is_file(Path(init_from) / "adapter_config.json"):
        problems.append(f"method.init_from={init_from}: no PEFT adapter there (adapter_config.json is missing)")
    reference = config.objective.reference if isinstance(config.objective, DpoConfig | KtoConfig) else None
    if reference is not None and not any(
        _is_file(Path(reference).expanduser() / name) for name in ("config.json", "adapter_config.json")
    ):
        problems.append(
            f"objective.reference={reference}: no model or adapter there (config.json and adapter_config.json are "
            "missing); name its directory, or remove the key: the reference is then the model of the first step"
        )
    named = {"run.output_dir": config.run.output_dir, "model.name": config.model.name}
    named = {key: value for key, value in named.items() if not is_url(value)}
    unusable = []
    for key, value in named.items():
        try:
            Path(value).expanduser().exists()
        except OSError as error:  # the system refuses even to look: too long, not searchable
            unusable.append(f"{key}={value[:60]}: {error.strerror}")
    return problems + (unusable or _output_problem(config) + _named_models_problems(config))


def _source_problem(section: str, written: str, source: RowSource) -> list[str]:
    """Check a source by its address alone.

    Args:
        section: The config section of the source.
        written: Rest of the key under which the address itself is written.
        source: The source.
    """
    address = source.source
    key, path = f"{section}{written}={shown_url(address)}", Path(without_scheme(address)).expanduser()
    is_embedded = source.source.startswith(EMBEDDED_PREFIX)
    is_hub = not is_embedded and not is_there(path) and is_hub_id(source.source)
    for_hub = {"name": source.name, "split": source.split, "revision": source.revision}
    given = [name for name, value in for_hub.items() if value is not None]
    if given and not is_hub and not (given != ["revision"] and is_there(path) and path.is_dir()):
        return [f"{section}.{given[0]} is for a Hugging Face data set, which {shown_url(address)} is not; remove it"]
    if is_remote(address):  # the listing finds its files later
        return [f"{key}: {problem}"] if (problem := missing_package(address)) else []
    if is_embedded or is_hub:
        return []
    if not source.source:
        return [f"{key} names nothing; name a file, a folder or a data set of the hub"]
    if not is_there(path) and is_pattern(address):
        return []
    if not is_there(path):
        return [f"{key}: no such file (looked in {Path.cwd()}), and no hub id such as org/name"]
    if path.is_file() and path.stat().st_size == 0:
        return [f"{key} is empty; expected rows"]
    return [] if os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)) else [f"{key} is not readable"]


def _named_models_problems(config: Config) -> list[str]:
    model, objective = config.model, config.objective
    problems = _model_problems("model.name", model.name, model.commit or model.revision, takes_adapter=False)
    if isinstance(objective, DistillConfig):
        problems += _model_problems(
            "objective.teacher", objective.teacher, objective.teacher_revision, takes_adapter=True
        )
    return problems


def _model_problems(key: str, name: str, pin: str | None, takes_adapter: bool) -> list[str]:
    """Check the name of a model by what lies there, if it is a path.

    Args:
        key: The key that names it.
        name: A directory, a hub id or an embedded model.
        pin: Its revision.
        takes_adapter: Whether it may be an adapter.
    """
    if "://" in name:
        return [f"{key} is a URL; name the model as its hub does (`owner/name`), or a directory"]
    path = Path(name).expanduser()
    looks_like_path = name.startswith((".", "/", "~")) or is_there(path)
    if looks_like_path and pin:
        return [f"{key}={name} is a directory, which has no revision {pin}; leave it out, or name a hub's model"]
    if not looks_like_path or _is_file(path / "config.json"):
        return []
    if not is_there(path):
        return [f"{key}={name}: no such directory; name a model directory or a hub id"]
    if _is_file(path / "adapter_config.json"):
        if takes_adapter:
            return []
        return [
            f"{key}={name} is an adapter (adapter_config.json): name its base model there, and the adapter in "
            "method.init_from to go on from it"
        ]
    if (path / "exports").is_dir():
        return [f"{key}={name} is a run, not a model; name one of its exports, such as {path / 'exports' / 'final'}"]
    return [f"{key}={name} is not a model: config.json is missing; name a directory made by save_pretrained"]


def _output_problem(config: Config) -> list[str]:
    if is_url(config.run.output_dir):
        return []  # checked when the run is opened
    parent = Path(config.run.output_dir).absolute()
    while not is_there(parent) and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        return [f"run.output_dir={config.run.output_dir}: {parent} is not a directory"]
    if not os.access(parent, os.W_OK | os.X_OK):
        return [f"run.output_dir={config.run.output_dir}: {parent} is not writable; choose another directory"]
    return []


def is_there(path: Path) -> bool:
    """Like `Path.exists`, but a name that the system refuses (too long, not searchable) does not exist."""
    try:
        return path.exists()
    except OSError:
        return False


def _is_file(path: Path) -> bool:
    return is_there(path) and path.is_file()

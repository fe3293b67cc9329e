"""Rules that join sections or look at the machine; all run before any process starts."""

from __future__ import annotations

import os
import re
from fractions import Fraction
from pathlib import Path

from dist_ft.config.schema import CHAT_TEMPLATES, Config, DataConfig, MethodConfig, RowSource
from dist_ft.errors import ConfigError
from dist_ft.machine import has_gpu, local_slots
from dist_ft.storage.remote import is_remote, missing_package, shown_url, without_scheme, without_secrets
from dist_ft.storage.urls import checked_store_url, is_url

EMBEDDED_PREFIX = "embedded:"
_LEAST_SHARE = Fraction(1, 10**9)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MAX_HUB_ID = 96  # the hub's own limit
_FILE_ENDING = re.compile(
    r"\.(jsonl|ndjson|json|csv|tsv|parquet|arrow|feather|txt)(\.(gz|bz2|xz|zst))?$", re.IGNORECASE
)
_PATTERN = re.compile(r"[*?[]")


def check_config(config: Config) -> None:
    """Checks what the schema cannot, in milliseconds.

    Raises:
        ConfigError: With every problem found, one a line.
    """
    problems = [*_section_problems(config), *_file_problems(config), *_capacity_problem(config)]
    if problems:
        raise ConfigError("\n".join(problems))


def check_config_elsewhere(config: Config) -> None:
    """Checks what can be known of a config on a machine that will not run it: no file of it need be here.

    Its paths are those of the machines that run it, in a working directory that nobody knows: they must be absolute.

    Raises:
        ConfigError: With every problem found, one a line.
    """
    check_sections(config)
    if problems := _relative_paths(config):
        raise ConfigError("\n".join(problems))


def is_hub_id(source: str) -> bool:
    """Whether a source that is no path can be the id of a data set on the hub, and not a file name with a typo."""
    is_one = len(source) <= _MAX_HUB_ID and _HUB_ID.fullmatch(source) is not None
    return is_one and not _FILE_ENDING.search(source)


def is_pattern(source: str) -> bool:
    """Whether a source that is no path can stand for several files, such as `data/*.jsonl`."""
    return _PATTERN.search(source) is not None


def _is_on_hub(source: str) -> bool:
    return is_hub_id(source) and not is_there(Path(source))


def check_sections(config: Config) -> None:
    """Checks what holds on any machine, for a run that starts elsewhere: no file, no core is looked at.

    Raises:
        ConfigError: With every problem found, one a line.
    """
    problems = _section_problems(config)
    if problems:
        raise ConfigError("\n".join(problems))


def _capacity_problem(config: Config) -> list[str]:
    """More workers than a Ray of ours on this machine would ever take; a given cluster is asked later."""
    resources = config.cluster.resources_per_worker or {}
    if config.cluster.address is not None or resources.get("GPU") or (has_gpu() and not resources):
        return []
    if config.cluster.min_workers * resources.get("CPU", 1) <= local_slots():
        return []
    return [
        f"cluster.num_workers={config.cluster.num_workers} is more than this machine takes "
        f"({local_slots()} CPU slots: four a core, at least eight); lower it or set cluster.address"
    ]


def _section_problems(config: Config) -> list[str]:
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
    problems += _eval_problems(config) + _secret_problems(config)
    problems += _curation_problems(data)
    if config.zero.offload and config.zero_stage == 0:
        problems.append("zero.offload=true needs zero.stage >= 1")
    problems += _method_problems(config.method)
    if data.group_by is not None and data.eval_fraction is None:
        problems.append(f"data.group_by={data.group_by} is for a held-out fraction; set data.eval to one, or remove it")
    return problems + _output_url_problem(config.run.output_dir)


def _output_url_problem(output_dir: str) -> list[str]:
    if not is_url(output_dir):
        return []
    try:
        checked_store_url(output_dir)
    except ConfigError as error:
        return [f"run.output_dir: {error}"]
    return []


def _mixing_problems(config: Config) -> list[str]:
    """What is wrong with how sources share the stream (docs/data.md, "Mixing")."""
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
    if config.data.preparation == "stream" and config.data.eval_fraction is not None:
        problems.append(
            f"data.eval={config.data.eval_fraction} is a fraction of rows that data.preparation=stream has not read "
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


def _relative_paths(config: Config) -> list[str]:
    data, name = config.data, config.model.name
    named: dict[str, str | None] = {
        "run.output_dir": config.run.output_dir,
        "method.init_from": config.method.init_from,
    }
    sources: dict[str, RowSource] = {f"data.train.{index}.source": s for index, s in enumerate(data.train)}
    sources |= {"data.eval": data.eval_source} if data.eval_source else {}
    named |= {key: source.source for key, source in sources.items() if not _is_on_hub(source.source)}
    named |= {"data.chat_template": data.template_path}
    if name.startswith((".", "~")) or (is_there(Path(name)) and not Path(name).is_absolute()):
        named["model.name"] = name  # else a hub id, an embedded model or a path of the cluster
    return [
        f"{key}={path} is a relative path, but the run will not start in this directory; name the absolute path "
        "under which all machines of the cluster see it"
        for key, path in named.items()
        if path is not None and not path.startswith(("/", EMBEDDED_PREFIX)) and "://" not in path
    ]


def _file_problems(config: Config) -> list[str]:
    problems = [
        problem
        for section, written, source in _sources(config)
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
    named = {"run.output_dir": config.run.output_dir, "model.name": config.model.name}
    named = {key: value for key, value in named.items() if not is_url(value)}
    unusable = [problem for key, value in named.items() if (problem := _unusable_name(key, value))]
    return problems + (unusable or _output_problem(config) + _model_problem(config))


def _sources(config: Config) -> list[tuple[str, str, RowSource]]:
    """Returns every source with its section, and what of a key follows where its address is written."""
    found = [(f"data.train.{index}", ".source", source) for index, source in enumerate(config.data.train)]
    if config.data.eval_source is None:
        return [*found]
    return [*found, ("data.eval", "" if isinstance(config.data.eval, str) else ".source", config.data.eval_source)]


def _secret_problems(config: Config) -> list[str]:
    """What a config holds is kept in the run directory and shown."""
    return [
        f"{section}{written}={shown_url(source.source)} holds a secret, which would be kept in the run directory; give "
        "the credentials in the environment of all machines, or name a copy"
        for section, written, source in _sources(config)
        if without_secrets(source.source) != source.source
    ]


def _unusable_name(key: str, value: str) -> str | None:
    """Says why the system refuses even to look at a path (too long, not searchable)."""
    try:
        Path(value).expanduser().exists()
    except OSError as error:
        return f"{key}={value[:60]}: {error.strerror}"
    return None


def _source_problem(section: str, written: str, source: RowSource) -> list[str]:
    """Checks a source as far as its path tells.

    Args:
        section: The config section of the source.
        written: What of a key follows where the path itself is written.
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
    if is_remote(address):  # what it names is found when it is listed
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


def _model_problem(config: Config) -> list[str]:
    name = config.model.name
    if "://" in name:
        return ["model.name is a URL; name the model as its hub does (`owner/name`), or a directory"]
    path = Path(name).expanduser()
    looks_like_path = name.startswith((".", "/", "~")) or is_there(path)
    if looks_like_path and (pin := config.model.commit or config.model.revision):
        return [f"model.name={name} is a directory, which has no revision {pin}; leave it out, or name a hub's model"]
    if not looks_like_path or _is_file(path / "config.json"):
        return []
    if not is_there(path):
        return [f"model.name={name}: no such directory; name a model directory or a hub id"]
    return [f"model.name={name} is not a model: config.json is missing; name a directory made by save_pretrained"]


def _output_problem(config: Config) -> list[str]:
    if is_url(config.run.output_dir):
        return []  # asked when the run is opened
    parent = Path(config.run.output_dir).absolute()
    while not is_there(parent) and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        return [f"run.output_dir={config.run.output_dir}: {parent} is not a directory"]
    if not os.access(parent, os.W_OK | os.X_OK):
        return [f"run.output_dir={config.run.output_dir}: {parent} is not writable; choose another directory"]
    return []


def is_there(path: Path) -> bool:
    """Like `Path.exists`, but a name that the system refuses (too long, not searchable) is not there."""
    try:
        return path.exists()
    except OSError:
        return False


def _is_file(path: Path) -> bool:
    return is_there(path) and path.is_file()

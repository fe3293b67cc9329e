"""Rules that join sections or look at the machine; all run before any process starts."""

from __future__ import annotations

import os
from pathlib import Path

from dist_ft.config.schema import Config
from dist_ft.errors import ConfigError, UsageError

EMBEDDED_PREFIX = "embedded:"


def check_config(config: Config) -> None:
    """Checks what the schema cannot, in milliseconds.

    Raises:
        ConfigError: With every problem found, one a line.
    """
    problems = [*_section_problems(config), *_file_problems(config), *_capacity_problem(config)]
    if problems:
        raise ConfigError("\n".join(problems))


def check_new_run(config: Config) -> None:
    """Refuses to write into a run directory that is there already.

    Raises:
        UsageError: It exists.
    """
    run_dir = Path(config.run.output_dir).absolute() / config.run.name
    if _exists(run_dir):
        raise UsageError(
            f"run directory {run_dir} exists; continue it with --resume, or choose another run.name or run.output_dir"
        )


def check_sections(config: Config) -> None:
    """Checks what holds on any machine, for a run that starts elsewhere: no file, no core is looked at.

    Raises:
        ConfigError: With every problem found, one a line.
    """
    problems = _section_problems(config)
    if problems:
        raise ConfigError("\n".join(problems))


def local_slots() -> int:
    """CPU worker slots of a Ray that we start: logical, up to four a core, at least eight."""
    return max(8, 4 * num_cores())


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA device, found without loading CUDA."""
    return Path("/dev/nvidiactl").exists()


def has_fast_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU has instructions that oneDNN computes bfloat16 with; yes where that cannot be found out."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return True
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split(":")[1].split()}
    return not flags or bool(flags & {"avx512bw", "avx_ne_convert", "amx_bf16", "bf16"})


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
    weights = [source.weight for source in data.train]
    if any(w is None for w in weights) and any(w is not None for w in weights):
        problems.append("data.train: weight is set on some sources only; set it on all of them or on none")
    if config.eval.metrics and data.eval is None:
        problems.append(f"eval.metrics={config.eval.metrics} needs held-out data; set data.eval")
    if config.zero.offload and config.zero_stage == 0:
        problems.append("zero.offload=true needs zero.stage >= 1")
    if config.method.kind == "full" and config.method.init_from is not None:
        problems.append("method.init_from names an adapter, but method.kind=full; set method.kind=lora")
    if config.method.kind == "full" and config.method.modules_to_save:
        problems.append("method.modules_to_save is for method.kind=lora; method.kind=full trains every module")
    if config.method.kind == "lora" and config.method.freeze:
        problems.append("method.freeze is for method.kind=full; with method.kind=lora the base is frozen anyway")
    if isinstance(data.eval, float) and len(data.train) > 1:
        problems.append(
            f"data.eval={data.eval} is a fraction, but data.train has {len(data.train)} sources; "
            "name a held-out source instead"
        )
    for index, source in enumerate(data.train):
        if source.format not in ("auto", "messages"):
            problems.append(
                f"data.train.{index}.format={source.format} is not supported yet; convert the rows to `messages`"
            )
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
    if template is not None and not _is_file(Path(template)):
        problems.append(f"data.chat_template={template}: no such file")
    init_from = config.method.init_from
    if init_from is not None and not _is_file(Path(init_from) / "adapter_config.json"):
        problems.append(f"method.init_from={init_from}: no PEFT adapter there (adapter_config.json is missing)")
    named = {"run.output_dir": config.run.output_dir, "model.name": config.model.name}
    unusable = [problem for key, value in named.items() if (problem := _unusable_name(key, value))]
    return problems + (unusable or _output_problem(config) + _model_problem(config))


def _unusable_name(key: str, value: str) -> str | None:
    """Says why the system refuses even to look at a path (too long, not searchable)."""
    try:
        Path(value).expanduser().exists()
    except OSError as error:
        return f"{key}={value[:60]}: {error.strerror}"
    return None


def _source_problem(key: str, source: str) -> list[str]:
    if source.startswith(EMBEDDED_PREFIX):
        return []
    path = Path(source)
    if not _exists(path):
        return [f"{key}={source}: no such file (looked in {Path.cwd()})"]
    if path.is_dir():
        return [f"{key}={source} is a directory; name a JSONL file"]
    if path.stat().st_size == 0:
        return [f"{key}={source} is empty; expected one JSON object a line"]
    return [] if os.access(path, os.R_OK) else [f"{key}={source} is not readable"]


def _model_problem(config: Config) -> list[str]:
    name = config.model.name
    path = Path(name).expanduser()
    looks_like_path = name.startswith((".", "/", "~")) or _exists(path)
    if not looks_like_path or _is_file(path / "config.json"):
        return []
    if not _exists(path):
        return [f"model.name={name}: no such directory; name a model directory or a hub id"]
    return [f"model.name={name} is not a model: config.json is missing; name a directory made by save_pretrained"]


def _output_problem(config: Config) -> list[str]:
    parent = Path(config.run.output_dir).absolute()
    while not _exists(parent) and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        return [f"run.output_dir={config.run.output_dir}: {parent} is not a directory"]
    if not os.access(parent, os.W_OK | os.X_OK):
        return [f"run.output_dir={config.run.output_dir}: {parent} is not writable; choose another directory"]
    return []


def _exists(path: Path) -> bool:
    """Like `Path.exists`, but a name that the system refuses (too long, not searchable) is not there."""
    try:
        return path.exists()
    except OSError:
        return False


def _is_file(path: Path) -> bool:
    return _exists(path) and path.is_file()

"""Who may import whom (design.md, section 8), read from the source and from fresh interpreters.

Left to others: what the imported names do. A new module is covered as soon as it exists.
"""

from __future__ import annotations

import ast
import collections
import graphlib
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

SOURCE = ROOT / "src" / "dist_ft"

ROWS = (
    ("root",),
    ("storage",),
    ("config",),
    ("data.sources", "model", "zero", "checkpoint", "monitor", "importers"),
    ("data.rows",),
    ("data.curation",),
    ("data.shards",),
    ("data.stream",),
    ("run", "objectives"),
    ("evaluate",),
    ("train", "jobs", "coordinator", "engine"),
    ("report",),
    ("orchestrate", "launchers"),
    ("service",),
    ("serving",),
    ("cli",),
)
"""Lowest first. A module imports from lower rows and from its own package; `root` are the modules in no package."""
ROW_OF = {part: row for row, parts in enumerate(ROWS) for part in parts}

MAX_MODULES = 12
LARGER_FOLDERS: dict[str, int] = {}
"""Folders that hold more modules than that, with how many: a list that shrinks."""

DOORS: dict[str, tuple[str, ...]] = {
    "ray": (
        "dist_ft.orchestrate",
        "dist_ft.launchers",
        "dist_ft.coordinator.actor",
        "dist_ft.serving",
        "dist_ft.monitor.ray_metrics",
    ),
    "deepspeed": ("dist_ft.zero",),
    "transformers": ("dist_ft.model",),
    "peft": ("dist_ft.model",),
    "gguf": ("dist_ft.model.gguf",),
    "jinja2": ("dist_ft.model",),
    "wandb": ("dist_ft.monitor",),
    "mlflow": ("dist_ft.monitor",),
    "pydantic": ("dist_ft.config",),
    "yaml": ("dist_ft.config", "dist_ft.launchers"),
    "datasets": ("dist_ft.data.sources",),
    "huggingface_hub": ("dist_ft.data.sources", "dist_ft.model"),
    "fsspec": ("dist_ft.storage",),
    "typer": ("dist_ft.cli", "dist_ft.report.console"),
    "psutil": ("dist_ft.orchestrate.node_sample",),
    "matplotlib": ("dist_ft.report.pages.figures",),
    "rensa": ("dist_ft.data.curation.near",),
    "rouge_score": ("dist_ft.evaluate.metrics",),
    "sacrebleu": ("dist_ft.evaluate.metrics",),
    "fastapi": ("dist_ft.service", "dist_ft.serving"),
    "starlette": ("dist_ft.service", "dist_ft.serving"),
    "uvicorn": ("dist_ft.service",),
    "sqlalchemy": ("dist_ft.service",),
    "httpx": ("dist_ft.service",),
    "llguidance": ("dist_ft.engine",),
    "rich": ("dist_ft.cli", "dist_ft.report.console", "dist_ft.report.watch"),
}
"""The only places where a library is imported."""

LATE = {
    "dist_ft.cli": "a verb loads what it needs, so that --help and a typo are answered at once",
    "dist_ft.orchestrate.workers.forkserver": "the rank entry, once torch is loaded",
    "dist_ft.orchestrate.workers.child": "a task's module, inside the task; an engine's, whose libraries are an extra",
    "dist_ft.evaluate.metrics": "libraries of metrics that few runs ask for, each a second to load",
    "dist_ft.data.sources.hub_files": "the hub's libraries take seconds, and only a data set of the hub needs them",
    "dist_ft.monitor.wandb_sink": "wandb, only where a run logs to it",
    "dist_ft.monitor.mlflow_sink": "mlflow, only where a run logs to it",
}
"""Modules, or packages, that may import inside a function."""

TORCH_FREE = (
    "dist_ft.errors", "dist_ft.messages", "dist_ft.metric_rows", "dist_ft.printable", "dist_ft.records",
    "dist_ft.layout", "dist_ft.slices", "dist_ft.slots", "dist_ft.memory", "dist_ft.machine", "dist_ft.storage",
    "dist_ft.config", "dist_ft.importers", "dist_ft.data",
    "dist_ft.checkpoint", "dist_ft.monitor", "dist_ft.run", "dist_ft.coordinator", "dist_ft.report",
    "dist_ft.orchestrate", "dist_ft.launchers", "dist_ft.service", "dist_ft.serving", "dist_ft.engine.protocol",
    "dist_ft.engine.transcript", "dist_ft.engine.vllm_adapter", "dist_ft.cli",
)  # fmt: skip
TORCH_ALLOWED = (
    "dist_ft.checkpoint.snapshot",
    "dist_ft.checkpoint.foreign",
    "dist_ft.checkpoint.universal",
    "dist_ft.orchestrate.workers.child",
    "dist_ft.orchestrate.health.all_reduce",
)
RAY_FREE = (
    "dist_ft.orchestrate.workers.forkserver", "dist_ft.orchestrate.workers.child", "dist_ft.jobs", "dist_ft.train",
    "dist_ft.evaluate", "dist_ft.objectives", "dist_ft.service", "dist_ft.engine",
)  # fmt: skip


@dataclass(frozen=True)
class Import:
    """One imported module: by whom, which, where, and whether inside a function."""

    importer: str
    target: str
    line: int
    is_late: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def _modules() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return found


MODULES = _modules()


def _walk(node: ast.AST, is_late: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    for child in ast.iter_child_nodes(node):
        yield child, is_late
        yield from _walk(child, is_late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))


def _is_import_call(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in ("import_module", "__import__")


def _imports() -> Iterator[Import]:
    for importer, tree in MODULES.items():
        for node, is_late in _walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(importer, alias.name, node.lineno, is_late)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{importer}:{node.lineno}: relative import; write the full name"
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    yield Import(importer, whole if whole in MODULES else str(node.module), node.lineno, is_late)
            elif _is_import_call(node):
                yield Import(importer, "<by name>", node.lineno, is_late)


IMPORTS = tuple(_imports())


def _part(module: str) -> str:
    """Returns the row entry a module belongs to: its package (of `data` the subject in it), or `root`."""
    path = module.split(".")[1:]
    if path[:1] == ["data"]:
        return ".".join(path[:2]) if len(path) > 1 else "data.sources"
    is_package = bool(path) and (SOURCE / path[0]).is_dir()
    return path[0] if is_package else "root"


def _within(module: str, places: Iterable[str]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def _ours() -> list[Import]:
    return [i for i in IMPORTS if _within(i.target, ["dist_ft"])]


def test_every_module_has_a_row() -> None:
    assert {_part(name) for name in MODULES} <= set(ROW_OF)


def test_imports_point_downwards() -> None:
    upwards = [i for i in _ours() if ROW_OF[_part(i.target)] > ROW_OF[_part(i.importer)]]
    assert not upwards, "\n".join(map(str, upwards))


def test_packages_of_a_row_do_not_import_one_another() -> None:
    sideways = [
        i
        for i in _ours()
        if _part(i.target) != _part(i.importer) and ROW_OF[_part(i.target)] == ROW_OF[_part(i.importer)]
    ]
    assert not sideways, "\n".join(map(str, sideways))


def test_no_import_cycles() -> None:
    graph: dict[str, set[str]] = {name: set() for name in MODULES}
    for i in _ours():
        if i.target in MODULES:
            graph[i.importer].add(i.target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


@pytest.mark.parametrize("library", DOORS)
def test_a_library_has_one_door(library: str) -> None:
    elsewhere = [i for i in IMPORTS if _within(i.target, [library]) and not _within(i.importer, DOORS[library])]
    assert not elsewhere, "\n".join(map(str, elsewhere))


def test_imports_stand_at_the_top_of_the_file() -> None:
    late = [i for i in IMPORTS if i.is_late and not _within(i.importer, LATE)]
    assert not late, "\n".join(map(str, late))


def test_modules_are_imported_by_name_only_where_tasks_and_ranks_start() -> None:
    by_name = {i.importer for i in IMPORTS if i.target == "<by name>"}
    assert by_name <= {"dist_ft.orchestrate.workers.forkserver", "dist_ft.orchestrate.workers.child"}


_LOADED_AFTER = """
import importlib, json, sys

from tests.helpers.paths import ROOT
names, forbidden = json.loads(sys.argv[1])
loaded = {}
for name in names:
    importlib.import_module(name)
    loaded[name] = [library for library in forbidden if library in sys.modules]
print(json.dumps(loaded))
"""


def _first_to_load(names: Iterable[str], forbidden: list[str]) -> str | None:
    """Imports `names` one after the other in a fresh interpreter; says who brings in a forbidden library."""
    command = [sys.executable, "-c", _LOADED_AFTER, json.dumps([list(names), forbidden])]
    result = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]
    loaded: dict[str, list[str]] = json.loads(result.stdout.splitlines()[-1])
    return next((f"{name} imports {', '.join(found)}" for name, found in loaded.items() if found), None)


def test_everything_outside_the_rank_imports_no_torch() -> None:
    names = [name for name in MODULES if _within(name, TORCH_FREE) and not _within(name, TORCH_ALLOWED)]
    assert {"dist_ft.coordinator.actor", "dist_ft.orchestrate.driver.run", "dist_ft.data.stream.loader"} <= set(names)
    assert _first_to_load(names, ["torch"]) is None


def test_rank_and_tasks_import_no_ray() -> None:
    names = [name for name in MODULES if _within(name, RAY_FREE)]
    assert {"dist_ft.orchestrate.workers.child", "dist_ft.train.loop", "dist_ft.jobs.export"} <= set(names)
    assert _first_to_load(names, ["ray"]) is None


def test_the_command_line_starts_light() -> None:
    heavy = ["torch", "ray", "transformers", "pydantic", "yaml", "numpy", "pyarrow"]
    assert _first_to_load(["dist_ft.cli"], heavy) is None


def _files() -> list[Path]:
    return [path for path in SOURCE.rglob("*.py") if path.name != "__init__.py"]


def test_a_folder_holds_few_modules() -> None:
    counts = collections.Counter(path.parent.relative_to(SOURCE).as_posix() for path in _files())
    assert {folder: count for folder, count in counts.items() if count > MAX_MODULES} == LARGER_FOLDERS


def test_a_file_name_stands_once_in_the_tree() -> None:
    counts = collections.Counter(path.name for path in _files())
    assert not [name for name, count in counts.items() if count > 1]


def test_names_of_test_modules_are_unique() -> None:
    """A test is found by its name."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)

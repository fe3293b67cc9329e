"""Prints the figures of docs/architecture.md: how large the parts are, how they hang together, how they are typed.

`make shape` runs it on this checkout; a path to another checkout may follow. It judges nothing and ends with 0. How
each figure is counted is said where it is counted; `--json` prints them as one object, `--by-package` the typing
figures of each package, `--private` the helpers with one caller.
"""

from __future__ import annotations

import ast
import collections
import json
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LOOSE = re.compile(r"\b(?:dict|Mapping|MutableMapping|defaultdict|OrderedDict)\[str, (?:Any|object)\]")
"""An untyped dict in an annotation, whatever it is called."""
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One source file below `src/dist_ft`."""

    path: str  # relative, as in `data/stream/order.py`
    text: str
    tree: ast.Module

    @property
    def name(self) -> str:
        return "dist_ft." + self.path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")

    @property
    def package(self) -> str:
        return self.path.split("/")[0] if "/" in self.path else "root"


def read_modules(source: Path) -> list[Module]:
    """Reads every module below a source folder."""
    paths = sorted(source.rglob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in paths]
    return [
        Module(path.relative_to(source).as_posix(), text, ast.parse(text))
        for path, text in zip(paths, texts, strict=True)
    ]


def functions(module: Module) -> Iterator[Function]:
    """Yields every function and method of a module, nested ones too."""
    return (node for node in ast.walk(module.tree) if isinstance(node, Function))


def length(function: Function) -> int:
    """Lines from `def` to the last one; decorators are not counted."""
    return (function.end_lineno or function.lineno) - function.lineno + 1


def annotations(function: Function) -> list[str]:
    """Returns the annotations of a signature as text."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    arguments += [extra for extra in (function.args.vararg, function.args.kwarg) if extra]
    found = [argument.annotation for argument in arguments] + [function.returns]
    return [ast.unparse(annotation) for annotation in found if annotation is not None]


def loose_aliases(modules: list[Module]) -> dict[str, set[str]]:
    """Returns, by module, the names there that stand for an untyped dict: `Row = dict[str, Any]`, or imported so."""
    aliases: dict[str, set[str]] = {module.name: set() for module in modules}
    while True:
        before = sum(map(len, aliases.values()))
        for module in modules:
            own = aliases[module.name]
            for node in module.tree.body:
                target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
                value = getattr(node, "value", None)
                if isinstance(target, ast.Name) and isinstance(value, ast.Subscript | ast.Name):
                    text = ast.unparse(value)
                    if LOOSE.fullmatch(text) or text in own:
                        own.add(target.id)
                if isinstance(node, ast.ImportFrom) and node.module in aliases:
                    theirs = aliases[node.module]
                    own |= {alias.asname or alias.name for alias in node.names if alias.name in theirs}
        if before == sum(map(len, aliases.values())):
            return aliases


def count_loose(modules: list[Module], aliases: dict[str, set[str]]) -> int:
    """Counts untyped dicts in the text, and each use of an alias of one."""
    count = sum(len(LOOSE.findall(module.text)) for module in modules)
    for module in modules:
        names = (node.id for node in ast.walk(module.tree) if isinstance(node, ast.Name))
        count += sum(name in aliases[module.name] for name in names)
    return count


def num_vague(modules: list[Module], aliases: dict[str, set[str]]) -> int:
    """Counts signatures that say `Any`, `object`, or a name that stands for an untyped dict."""
    return sum(
        bool(set(re.findall(r"\w+", " ".join(annotations(function)))) & ({"Any", "object"} | aliases[module.name]))
        for module in modules
        for function in functions(module)
    )


def num_code_lines(modules: list[Module]) -> int:
    """Counts lines that are not blank; docstrings and comments are code."""
    return sum(1 for module in modules for line in module.text.splitlines() if line.strip())


def one_caller(modules: list[Module]) -> list[str]:
    """Returns private functions and methods that their module names exactly once outside the `def`."""
    found = []
    for module in modules:
        names = (getattr(node, "id", None) or getattr(node, "attr", None) for node in ast.walk(module.tree))
        used = collections.Counter(name for name in names if name)
        found += [
            f"{module.path}:{function.name}"
            for function in functions(module)
            if function.name.startswith("_") and not function.name.startswith("__") and used[function.name] == 1
        ]
    return found


def imports_of(module: Module, names: set[str]) -> set[str]:
    """Returns the modules of ours that a module imports, late imports included."""
    found = set()
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            wholes = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (wholes & names) or {node.module}
    return (found & names) - {module.name}


def fan_out(modules: list[Module], package: str) -> int:
    """Returns the most modules of ours that one file of a package (or a file of that name) imports."""
    names = {module.name for module in modules}
    own = [m for m in modules if m.path.startswith(f"{package}/") or m.path == f"{package}.py"]
    return max((len(imports_of(module, names)) for module in own), default=0)


def num_cycles(modules: list[Module]) -> int:
    """Counts modules that can reach themselves by imports."""
    names = {module.name for module in modules}
    graph = {module.name: imports_of(module, names) for module in modules}

    def reaches_itself(start: str) -> bool:
        seen, todo = set(), [*graph[start]]
        while todo:
            name = todo.pop()
            if name == start:
                return True
            if name not in seen:
                seen.add(name)
                todo += graph[name]
        return False

    return sum(reaches_itself(name) for name in names)


def missing_in_maps(source: Path, modules: list[Module]) -> list[str]:
    """Returns modules that the README of their folder does not name."""
    missing = []
    for module in modules:
        path = source / module.path
        if path.name == "__init__.py":
            continue
        readme = path.parent / "README.md"
        if not readme.is_file() or f"`{path.stem}`" not in readme.read_text(encoding="utf-8"):
            missing.append(module.path)
    return missing


def figures(source: Path) -> dict[str, float | str]:
    """Computes every figure of a source folder, `src/dist_ft`."""
    modules = read_modules(source)
    files = [module for module in modules if not module.path.endswith("__init__.py")]
    folders = collections.Counter(module.path.rpartition("/")[0] or "." for module in files)
    stems = collections.Counter(module.path.rpartition("/")[2] for module in files)
    every = [function for module in modules for function in functions(module)]
    lengths = sorted(map(length, every))
    aliases = loose_aliases(modules)
    return {
        "modules": len(files),
        "most modules in one folder": max(folders.values()),
        "src lines": sum(len(module.text.splitlines()) for module in modules),
        "function median": statistics.median(lengths),
        "function p90": lengths[int(0.9 * len(lengths))],
        "longest function": lengths[-1],
        "functions over 50 lines, %": round(100 * sum(n > 50 for n in lengths) / len(lengths), 1),
        "private helpers with one caller, % of functions": round(100 * len(one_caller(modules)) / len(every), 1),
        "modules in import cycles": num_cycles(modules),
        "untyped dicts a thousand lines": round(1000 * count_loose(modules, aliases) / num_code_lines(modules), 1),
        "signatures with Any, %": round(100 * num_vague(modules, aliases) / len(every), 1),
        "file names used twice": sum(count > 1 for count in stems.values()),
        "modules missing in maps": len(missing_in_maps(source, modules)),
        "fan-out of cli": fan_out(modules, "cli"),
        "fan-out of driver": max(fan_out(modules, "orchestrate/driver"), fan_out(modules, "orchestrate.driver")),
    }


def _by_package(modules: list[Module]) -> None:
    aliases, alone = loose_aliases(modules), one_caller(modules)
    print("package                lines  untyped dicts  signatures with Any  one caller")
    for package in sorted({module.package for module in modules}):
        own = [module for module in modules if module.package == package]
        every = [function for module in own for function in functions(module)]
        loose, vague = count_loose(own, aliases), num_vague(own, aliases)
        private = sum(path.split(":")[0] in {module.path for module in own} for path in alone)
        lines, num = num_code_lines(own), len(every) or 1
        print(
            f"{package:20} {lines:7} {loose:5} ({1000 * loose / lines:4.1f} ‰) {vague:8} of {len(every):4} "
            f"({vague / num:4.0%}) {private:7} ({private / num:4.0%})"
        )


def main() -> None:
    """Entry of `python tests/architecture/shape.py [CHECKOUT] [--json | --by-package | --private]`."""
    flags = {argument for argument in sys.argv[1:] if argument.startswith("--")}
    places = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    source = (Path(places[0]) if places else Path(__file__).resolve().parents[2]) / "src" / "dist_ft"
    if "--by-package" in flags:
        _by_package(read_modules(source))
    elif "--private" in flags:
        print("\n".join(one_caller(read_modules(source))))
    elif "--json" in flags:
        print(json.dumps(figures(source)))
    else:
        for name, value in figures(source).items():
            print(f"{name:50} {value}")


if __name__ == "__main__":
    main()

"""Runs an import: reads a file, judges every key by the tool's table, and builds the dist-ft config."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dist_ft.config.advice import tool_of
from dist_ft.config.load import problems_in
from dist_ft.config.yaml_file import Yaml, read_plain_yaml
from dist_ft.errors import ConfigError, UsageError
from dist_ft.importers import axolotl, llamafactory, trl
from dist_ft.importers.rule_kinds import placeholders
from dist_ft.importers.verdicts import Finding, Imported, Options, Outcome, Rule, Source, is_set

Tool = Literal["axolotl", "llamafactory", "trl"]


@dataclass(frozen=True)
class _Tables:
    """What an importer knows of its tool."""

    table: dict[str, Rule]
    defaults: dict[str, Yaml]
    required: tuple[str, ...]
    notes: tuple[str, ...]
    nulls: dict[str, str]
    """Keys whose null is no missing value, and what it means."""


_TOOLS: dict[Tool, _Tables] = {
    "axolotl": _Tables(axolotl.TABLE, axolotl.DEFAULTS, axolotl.REQUIRED, axolotl.NOTES, {}),
    "llamafactory": _Tables(llamafactory.TABLE, llamafactory.DEFAULTS, llamafactory.REQUIRED, llamafactory.NOTES, {}),
    "trl": _Tables(trl.TABLE, trl.DEFAULTS, trl.REQUIRED, trl.NOTES, trl.NULLS),
}


_TRL_PREFERENCES = _Tables(trl.PREFERENCE_TABLE, trl.PREFERENCE_DEFAULTS, trl.REQUIRED, trl.PREFERENCE_NOTES, trl.NULLS)
"""What it knows of `trl dpo` and `trl kto`; the other tools' files say themselves what is trained."""


def import_file(tool: Tool, path: Path, options: Options) -> Imported:
    """Judges every key of another tool's config.

    Raises:
        ConfigError: The file cannot be read, is of another tool, or has values of a wrong type.
    """
    raw = read_plain_yaml(path)
    found = tool_of(raw)
    if found is not None and found != tool:
        way = "it needs no import" if found == "dist-ft" else f"run `dist-ft import {found} {path}`"
        raise UsageError(f"{path} is a config of {found}, not of {tool}; {way}")
    if names := placeholders({key: value for key, value in raw.items() if not key.startswith("chat_template")}):
        raise ConfigError("\n".join(f"{path}: {key} holds a placeholder; write the value" for key in names))
    tables = _TOOLS[tool] if options.method == "sft" else _TRL_PREFERENCES
    if tool == "llamafactory" and (keys := sorted(raw.keys() & llamafactory.V1_KEYS)):
        raise UsageError(f"{path} is for the second engine of LLaMA-Factory ({keys[0]}); only the first is imported")
    source = Source(path, {key: value for key, value in raw.items() if is_set(value)}, options)
    if not source.values.keys() & tables.table.keys():
        raise UsageError(f"{path} has no key of {tool}; name a training config")
    wrong: dict[str, None] = {}
    findings: list[Finding] = []
    taken: dict[str, Finding] = {}
    left_out = {key: value for key, value in tables.defaults.items() if key not in source.values}
    for key, value, is_left_out in [
        *((key, value, False) for key, value in raw.items() if key in tables.table),
        *((key, value, True) for key, value in left_out.items()),
    ]:
        try:
            outcome = (
                tables.table[key](source, value)
                if key in source.values or is_left_out
                else Outcome("refused", tables.nulls[key])
                if key in tables.nulls
                else Outcome("no effect", "not set")
            )
        except ConfigError as error:
            wrong |= {_named(str(error), key, raw): None}
            continue
        finding = _without_contradiction(Finding(key, outcome, is_left_out), taken)
        if not is_left_out or finding.outcome.settings or finding.outcome.verdict == "refused":
            findings.append(finding)
        taken |= dict.fromkeys(finding.outcome.settings, finding)
    if wrong:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in wrong))
    findings += [
        Finding(key, Outcome("refused", "is missing, and has no default there; write it"), is_left_out=True)
        for key in tables.required
        if key not in source.values
    ]
    result = Imported(tool, path, findings, [key for key in raw if key not in tables.table], tables.notes)
    if not result.refused:
        _check(result)
    return result


def _named(problem: str, key: str, raw: dict[str, Yaml]) -> str:
    """Return a problem with the key that it is about: the one that is judged, unless it names another of the file."""
    problem = re.sub(r"^(the|a)( \w+)+=", f"{key}=", problem)
    is_named = any(problem.startswith((f"{name}=", f"{name}.")) for name in raw)
    return problem if is_named else f"{key}: {problem}"


def nested(settings: dict[str, Yaml]) -> dict[str, Yaml]:
    """Return settings such as `train.epochs` as sections."""
    sections: dict[str, Yaml] = {}
    for key, value in settings.items():
        node = sections
        *parents, last = key.split(".")
        for parent in parents:
            child = node.setdefault(parent, {})
            assert isinstance(child, dict)
            node = child
        node[last] = value
    return sections


def _without_contradiction(finding: Finding, taken: dict[str, Finding]) -> Finding:
    """Refuses a key that sets the same as an earlier one to another value; a default gives way."""
    outcome = finding.outcome
    clash = [
        (key, taken[key]) for key, value in outcome.settings.items()
        if key in taken and taken[key].outcome.settings[key] != value
    ]  # fmt: skip
    if not clash:
        return finding
    if finding.is_left_out:
        kept = {key: value for key, value in outcome.settings.items() if key not in taken}
        return Finding(finding.key, Outcome(outcome.verdict, outcome.why, kept), is_left_out=True)
    key, other = clash[0]
    why = f"{key}={outcome.settings[key]}, but {other.key} means {other.outcome.settings[key]}; remove one of the two"
    return Finding(finding.key, Outcome("refused", why))


def _check(result: Imported) -> None:
    """Check the new config against the schema, so that a value out of range is found now.

    Raises:
        ConfigError: A value cannot be one of ours; the message names the keys of the source.
    """
    keys = {key: finding.key for finding in result.findings for key in finding.outcome.settings}
    problems = [
        f"{', '.join(sorted({theirs for ours, theirs in keys.items() if line.startswith(ours)})) or 'the file'}: {line}"
        for line in problems_in(nested(result.settings), result.path)
    ]
    if one_each := {line.partition(": ")[0]: line for line in problems}:
        raise ConfigError("\n".join(one_each.values()))

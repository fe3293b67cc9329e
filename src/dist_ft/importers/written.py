"""Writes an import: the dist-ft config with comments, the list of keys, and JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from dist_ft.config.yaml_file import Yaml
from dist_ft.importers.verdicts import Finding, Imported, Verdict

_SECTIONS = ("run", "model", "method", "data", "train", "eval", "optimizer", "schedule", "zero", "cluster",
             "checkpoint", "failure", "objective", "monitor")  # fmt: skip
_TITLES: tuple[tuple[Verdict, str], ...] = (
    ("same", "same"),
    ("close", "close: goes on, with what differs"),
    ("no effect", "no effect here"),
    ("refused", "refused"),
)


def config_text(result: Imported) -> str:
    """Return the dist-ft config as YAML; a comment says where each key came from."""
    origin: dict[str, Finding] = {}
    for finding in result.findings:
        origin |= dict.fromkeys(finding.outcome.settings, finding)
    lines = [f"# Made from {_one_line(str(result.path))} by `dist-ft import {result.tool}`."]
    lines += [f"# {_one_line(note)}" for note in result.notes]
    for section in _SECTIONS:
        keys = [key for key in origin if key.split(".")[0] == section]
        lines += [f"{section}:"] * bool(keys)
        last = ""
        for key in sorted(keys, key=lambda key: key.count(".")):
            *parents, name = key.split(".")[1:]
            if parents and parents[0] != last:
                lines.append(f"  {parents[0]}:")
                last = parents[0]
            indent = "  " * (1 + len(parents))
            value = origin[key].outcome.settings[key]
            comment = _comment(origin[key])
            if isinstance(value, list) and value and isinstance(value[0], dict):
                lines.append(f"{indent}{name}:  # {comment}")
                lines += [f"{indent}  - {_flow(item)}" for item in value]
            else:
                lines.append(f"{indent}{name}: {_flow(value)}  # {comment}")
    return "\n".join(lines) + "\n"


def report_text(result: Imported) -> str:
    """Return the list of all keys by class, each key once."""
    return "\n".join(_report_lines(result))


def report_json(result: Imported) -> str:
    """Return the classes of all keys and the config as one JSON object."""
    found = {
        "classes": {finding.key: _as_json(finding) for finding in result.findings if not finding.is_left_out},
        "left_out": {finding.key: _as_json(finding) for finding in result.findings if finding.is_left_out},
        "unknown": result.unknown,
        "notes": list(result.notes),
        "config": config_text(result),
    }
    return json.dumps(found)


def refusal_text(result: Imported) -> str:
    """Return one line for each refused key."""
    return "\n".join(f"{finding.key}: {finding.outcome.why}" for finding in result.refused)


def _report_lines(result: Imported) -> Iterator[str]:
    for verdict, title in _TITLES:
        findings = [finding for finding in result.findings if finding.outcome.verdict == verdict]
        own = [finding for finding in findings if not finding.is_left_out]
        if own:
            yield f"{title} ({len(own)})"
        for finding in own:
            yield f"  {finding.key}{_arrow(finding)}"
    if result.unknown:
        yield f"unknown to this importer, nothing is made of them: check them ({len(result.unknown)})"
        for key in result.unknown:
            yield f"  {_one_line(key)}"
    left_out = [finding for finding in result.findings if finding.is_left_out]
    if left_out:
        yield f"left out in the file, so {result.tool}'s default is written ({len(left_out)})"
        for finding in left_out:
            yield f"  [{finding.key}] {finding.outcome.verdict}{_arrow(finding)}"
    yield "always different"
    for note in result.notes:
        yield f"  {note}"


def _arrow(finding: Finding) -> str:
    settings = finding.outcome.settings
    shown = ", ".join(f"{key}={_short(_flow(value))}" for key, value in settings.items())
    arrow = f" -> {shown}" if shown else ""
    return f"{arrow}: {_one_line(finding.outcome.why)}" if finding.outcome.why else arrow


def _as_json(finding: Finding) -> dict[str, str | dict[str, Yaml]]:
    outcome = finding.outcome
    return {"class": outcome.verdict, "to": outcome.settings, "why": outcome.why}


def _comment(finding: Finding) -> str:
    where = f"default of {finding.key}" if finding.is_left_out else finding.key
    close = "close: " if finding.outcome.verdict == "close" else ""
    return _one_line(f"{where}: {close}{finding.outcome.why}" if finding.outcome.why else where)


def _flow(value: Yaml) -> str:
    """Return a value on one line: JSON, with plain words as YAML writes them."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_flow(key)}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    is_plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w./-]*", value)
    if is_plain and str(value).lower() not in ("true", "false", "null", "yes", "no", "on", "off", "y", "n"):
        return str(value)
    return json.dumps(value, ensure_ascii=True)


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."


def _one_line(text: str) -> str:
    """Return a text without line breaks or control characters, which would end a comment."""
    return "".join(mark if mark.isprintable() else " " for mark in text)

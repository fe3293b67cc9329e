"""What becomes of Axolotl's data sets: their address, their format, and how their rows are read."""

from __future__ import annotations

import re
from collections.abc import Collection

from dist_ft.config.yaml_file import Yaml
from dist_ft.importers.rule_kinds import held_out_sets
from dist_ft.importers.their_templates import chat_template
from dist_ft.importers.verdicts import (
    Outcome,
    Source,
    as_flag,
    as_mapping,
    as_mappings,
    as_text,
    as_texts,
    is_off,
    is_set,
)

_ROLES = {
    "user": {"user", "human"}, "assistant": {"assistant", "gpt", "model"}, "system": {"system"}, "tool": {"tool"},
}  # fmt: skip
"""Names of roles that dist-ft reads as Axolotl does."""
_QUIET = {"preprocess_shards", "ds_type", "field_thinking", "template_thinking_key", "step_separator"}
"""Keys that change nothing here: the kind of a file follows from its ending, and thoughts are read as they are."""
_KNOWN = {"path", "name", "split", "revision", "data_files", "type", "chat_template", "chat_template_jinja"}
_TEXT_ONLY = re.compile(
    r"oasst.*|reflection|explainchoice.*|concisechoice.*|context_qa.*|reasoning|completion_instruct|creative_acr.*|"
    r"alpaca.*|gpteacher.*|metharme|orcamini|pygmalion"
)
"""Types that write plain text in a way that no prompt of ours has."""
_HEADINGS: dict[str, Yaml] = {
    "format": "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
    "no_input_format": "### Instruction:\n{instruction}\n\n### Response:\n",
}
_CHAT: dict[str, Yaml] = {
    "format": "USER: {instruction}\n{input}\nASSISTANT:", "no_input_format": "USER: {instruction}\nASSISTANT:",
}  # fmt: skip
_CHATML: dict[str, Yaml] = {
    "format": "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n",
    "no_input_format": "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
}
_ORCA: dict[str, Yaml] = {
    "format": "### Human:\n{instruction}\n### Additional Context:\n{input}\n### Assistant:\n",
    "no_input_format": "### Human:\n{instruction}\n### Assistant:\n", "system_format": "### System:\n{system}\n",
}  # fmt: skip
_TLDR: dict[str, Yaml] = {key: f"USER: Summarize the following article as a TL;DR.\n{str(text)[6:]}"
                          for key, text in _CHAT.items()}  # fmt: skip
_CONTEXT = (
    "SYSTEM: Use the following contextual information to concisely answer the question.\n\nUSER: {instruction}\n===\n"
)
_ORCA_COLUMNS: dict[str, Yaml] = {"instruction": "question", "output": "response", "system": "system_prompt"}
_STYLES_OF_ALPACA = ("", ":chat", ":chatml", ":phi")
_RESPONSE: dict[str, Yaml] = {"output": "response"}
_INSTRUCTIONS: dict[str, tuple[Yaml, dict[str, Yaml]]] = {
    **{f"alpaca{style}": (f"alpaca{style}".replace(":", "_"), {}) for style in _STYLES_OF_ALPACA},
    **{f"gpteacher{style}": (f"alpaca{style}".replace(":", "_"), _RESPONSE) for style in _STYLES_OF_ALPACA},
    "alpaca_chat": ("alpaca_chat", {}), "alpaca_instruct": ("alpaca", {}),
    "alpaca_chat.load_no_prompt": (_CHAT, {}), "alpaca_instruct.load_no_prompt": (_HEADINGS, {}),
    "jeopardy": ("jeopardy", {"instruction": "question", "input": "category", "output": "answer"}),
    "oasst": ("alpaca", {"instruction": "INSTRUCTION", "output": "RESPONSE"}),
    "summarizetldr": (_TLDR, {"instruction": "article", "output": "summary"}),
    "alpaca_w_system": (_CHAT | {"system_format": "SYSTEM: {system}\n"}, {}),
    "alpaca_w_system.load_chat": (_CHAT | {"system_format": "SYSTEM: {system}\n"}, {}),
    "alpaca_w_system.load_instruct": (_HEADINGS | {"system_format": "{system}\n\n"}, {}),
    "alpaca_w_system.load_open_orca": (_ORCA, _ORCA_COLUMNS),
    "alpaca_w_system.load_open_orca_chatml": (
        _CHATML | {"system_format": "<|im_start|>system\n{system}<|im_end|>\n"}, _ORCA_COLUMNS
    ),
    "context_qa": (
        {"format": _CONTEXT + "{input}\nASSISTANT:", "no_input_format": _CONTEXT + "\nASSISTANT:"},
        {"instruction": "article", "input": "question", "output": "answer"},
    ),
    "context_qa.load_v2": (
        {"format": "Context: {instruction}\nQuestion: {input}\n",
         "no_input_format": "Context: {instruction}\nQuestion: \n", "answer_format": "Answer: {output}"},
        {"instruction": "context", "input": "question", "output": "answer"},
    ),
}  # fmt: skip
"""Types whose rows become plain text: our `prompt`, and the columns of instruction, input, output and system."""


def is_chat(entry: dict[str, Yaml]) -> bool:
    """Return whether a data set is rendered with a chat template."""
    return entry.get("type") in ("chat_template", "chat_template.default")


def entries(source: Source, key: str = "datasets") -> list[dict[str, Yaml]]:
    """Return the data sets of a key, each with the values that are set."""
    found = as_mappings(key, source.values.get(key, []))
    # An empty list is a value: no role is trained.
    return [{name: value for name, value in entry.items() if is_set(value) or value == []} for entry in found]


def train_sources(source: Source, value: Yaml) -> Outcome:
    """Take over `datasets`: all of them, or none with every reason."""
    read = [_source(f"datasets.{index}", entry, source.values.get("rl")) for index, entry in enumerate(entries(source))]
    problems = [problem for _, found in read for problem in found]
    problems += _template_problems(source)
    if problems:
        return Outcome("refused", "; ".join(problems))
    settings: dict[str, Yaml] = {"data.train": [one for sources, _ in read for one in sources]}
    if "rl" in source.values:
        return _with_template(source, settings)
    whole = {entry.get("type") == "completion" for entry in entries(source)}
    if whole == {True}:
        return Outcome("same", "raw text, cut into pieces", settings | {"data.long_samples": "split"})
    if True in whole:
        return Outcome("refused", "completion beside other types: long samples are cut in one and dropped in the other")
    why = "weights of messages are not read there, and are here"
    if (own := own_template(source)) is None:
        return Outcome("same", why, settings)
    name, text = own
    if text:
        return Outcome("same", why, settings | {"data.chat_template": text})
    found = chat_template(source, "axolotl", name)
    return Outcome(found.verdict, f"{why}; chat_template: {found.why or name}", settings | found.settings)


def held_out(source: Source, value: Yaml) -> Outcome:
    """Take over `test_datasets`; several are measured together there, and also each by itself here."""
    read = [
        _source(f"test_datasets.{index}", entry, source.values.get("rl"))
        for index, entry in enumerate(entries(source, "test_datasets"))
    ]
    if problems := [problem for _, some in read for problem in some]:
        return Outcome("refused", "; ".join(problems))
    found = [as_mapping("test_datasets", one) for sources, _ in read for one in sources]
    return held_out_sets([(str(one["source"]), one) for one in found])


def own_template(source: Source) -> tuple[str, str] | None:
    """Return the name and the text of the template that chats themselves name; None where the file's holds."""
    return next((found for entry in entries(source) if is_chat(entry) and (found := _named(entry))), None)


def _named(entry: dict[str, Yaml]) -> tuple[str, str] | None:
    """Return the template of a data set; the tokenizer's own is the file's, which is written into the tokenizer."""
    text = as_text("datasets.chat_template_jinja", entry.get("chat_template_jinja", ""))
    name = as_text("datasets.chat_template", entry.get("chat_template", "jinja" if text else "tokenizer_default"))
    return None if name == "tokenizer_default" else (name, text if name == "jinja" else "")


def _template_problems(source: Source) -> list[str]:
    text = str(source.values.get("chat_template_jinja", ""))
    name = str(source.values.get("chat_template", "jinja" if text else "tokenizer_default"))
    found = {_named(entry) or (name, text if name == "jinja" else "") for entry in entries(source) if is_chat(entry)}
    if ("jinja", "") in found:
        return ["chat_template: jinja without its text; write chat_template_jinja"]
    names = ", ".join(sorted(name for name, _ in found))
    return [] if len(found) < 2 else [f"data sets with different templates ({names}); use one"]


def _source(key: str, entry: dict[str, Yaml], rl: Yaml) -> tuple[list[Yaml], list[str]]:
    """Return the sources of one data set, and why it cannot be taken over."""
    if "path" not in entry:
        return [], [f"{key}.path is missing; name a data set or a file"]
    row_format, problems = _format(key, entry) if rl is None else _preferences(key, entry, is_kto=rl == "kto")
    path = as_text(f"{key}.path", entry["path"])
    base: dict[str, Yaml] = {
        name: as_text(f"{key}.{name}", entry[name]) for name in ("name", "split", "revision") if name in entry
    }
    if base.get("split") == "train":
        del base["split"]
    rows, problem = split_range(base)
    if problem:
        problems.append(f"{key}.{problem}")
    is_file = re.search(r"\.(jsonl?|csv|tsv|parquet|arrow|txt)(\.\w+)?$", path) is not None
    files = as_texts(f"{key}.data_files", entry.get("data_files", []))
    if not files:
        addresses = [path]
    elif path in ("json", "csv", "parquet", "arrow", "text"):
        addresses = files
    elif path.startswith((".", "/", "~")):
        addresses = [f"{path.rstrip('/')}/{file}" for file in files]
    else:
        revision = f"@{base['revision']}" if "revision" in base else ""
        addresses = [f"hf://datasets/{path}{revision}/{file}" for file in files]
    if files or is_file:  # plain files have neither splits nor configurations
        base = {}
    if rows and len(addresses) > 1:
        problems.append(f"{key}.split: a range of rows over several data_files; join them into one file")
    return [{"source": address, **base, **rows, **row_format} for address in addresses], problems


def split_range(entry: dict[str, Yaml]) -> tuple[dict[str, Yaml], str]:
    """Take the range of rows out of a split such as `train[:1%]`.

    Returns:
        The key `rows`, if there is a range, and what is wrong with the split.
    """
    split = str(entry.get("split", ""))
    match = re.fullmatch(r"(\w+)\[(\d*%?):(\d*%?)\]", split)
    if match is None:
        is_plain = not re.search(r"[\[+(]", split)
        return (
            {},
            "" if is_plain else f"split={split} is no name and no range such as train[:1%]; write those rows to a file",
        )
    name, first, stop = match.groups()
    if name == "train":
        del entry["split"]
    else:
        entry["split"] = name
    bounds: list[Yaml] = [_bound(first) if first else 0, _bound(stop) if stop else None]
    return {"rows": bounds}, ""


def _bound(text: str) -> Yaml:
    return text if text.endswith("%") else int(text)


def _format(key: str, entry: dict[str, Yaml]) -> tuple[dict[str, Yaml], list[str]]:
    """Return the format and the columns of a data set."""
    kind = entry.get("type")
    if isinstance(kind, dict):
        return _own_format(f"{key}.type", kind, _others(key, entry, set()))
    if kind == "completion":
        column = as_text(f"{key}.field", entry.get("field", "text"))
        return {"format": "text", **_columns("text", column)}, _others(key, entry, {"field"})
    if kind in _INSTRUCTIONS:
        prompt, columns = _INSTRUCTIONS[str(kind)]
        named: dict[str, Yaml] = {"columns": columns} if columns else {}
        # Where there is no place for a system prompt, theirs never looks whether a row has one.
        has_system = isinstance(prompt, dict) and "system_format" in prompt
        quiet: dict[str, Yaml] = {} if has_system or not isinstance(prompt, dict) else {"ignore": ["system"]}
        return {"format": "alpaca", "prompt": prompt, **named, **quiet}, _others(key, entry, set())
    if kind == "chat_template":
        return _chat(key, entry)
    if isinstance(kind, str) and _TEXT_ONLY.fullmatch(kind):
        return {}, [_prompt_format(key, kind)]
    if isinstance(kind, str) and kind.startswith("sharegpt"):
        return {}, [f"{key}.type={kind} is gone from Axolotl; write type: chat_template and its field_messages"]
    if kind is None:
        return {}, [f"{key}.type is missing; rows that are tokenised already cannot be read"]
    return {}, [f"{key}.type={kind} is a way to read rows that is not there; write them as messages"]


_STYLES = re.compile(r"(chatml|llama3)\.(argilla_chat|argilla|icr|intel|prompt_pairs|ultra)")
"""Types of preference rows that write the marks of a template themselves."""


def _with_template(source: Source, settings: dict[str, Yaml]) -> Outcome:
    """Add the template whose marks the types of preference rows write."""
    styles = {
        str(entry["type"]).split(".")[0] for entry in entries(source) if _STYLES.fullmatch(str(entry.get("type")))
    }
    if not styles:
        return Outcome("same", "", settings)
    if len(styles) > 1 or any(is_chat(entry) for entry in entries(source)):
        return Outcome("refused", "data sets with different templates; use one")
    (style,) = styles
    why = f"their type writes the marks of {style} itself; compare a row with `dist-ft data show`"
    return Outcome("close", why, settings | {"data.chat_template": style})


def _preferences(key: str, entry: dict[str, Yaml], is_kto: bool) -> tuple[dict[str, Yaml], list[str]]:
    """Return the format and the columns of a data set of preferences."""
    kind = str(entry.get("type"))
    if kind == "chat_template.default" and not is_kto:
        found, problems = _chat(key, entry, {"field_chosen", "field_rejected"})
        columns = as_mapping(key, found.get("columns", {}))
        for name in ("chosen", "rejected"):
            field = as_text(f"{key}.field_{name}", entry.get(f"field_{name}", name))
            columns |= {} if field == name else {name: field}
        return {"format": "preference", **({"columns": columns} if columns else {})}, problems
    if _STYLES.fullmatch(kind):
        # A prompt of text is a turn of the user there; under this name it is one here.
        text_prompts = kind.endswith(("prompt_pairs", "ultra"))
        columns = {"columns": {"instruction": "prompt"}} if text_prompts else {}
        return {"format": "labelled" if is_kto else "preference", **columns}, _others(key, entry, set())
    return {}, [f"{key}.type={kind} is a way to read preferences that is not there; write the rows as TRL has them"]


def _own_format(key: str, kind: dict[str, Yaml], problems: list[str]) -> tuple[dict[str, Yaml], list[str]]:
    """Return a prompt format that a file writes out."""
    known = {"system_prompt": "system", "system_format": "system_format", "format": "format",
             "no_input_format": "no_input_format"}  # fmt: skip
    fields = {f"field_{ours}": ours for ours in ("system", "instruction", "input", "output")}
    given = {name: as_text(f"{key}.{name}", value) for name, value in kind.items() if value is not None}
    if extra := sorted(given.keys() - known.keys() - fields.keys()):
        problems = [*problems, f"{key}: {', '.join(extra)} changes what is read, and is not supported; leave it out"]
    columns: dict[str, Yaml] = {
        ours: given[theirs] for theirs, ours in fields.items() if given.get(theirs, ours) not in ("", ours)
    }
    prompt: dict[str, Yaml] = {ours: given[theirs] for theirs, ours in known.items() if theirs in given}
    return {"format": "alpaca", "prompt": prompt, **({"columns": columns} if columns else {})}, problems


def _prompt_format(key: str, kind: str) -> str:
    return (
        f"{key}.type={kind} writes rows as plain text with headings, which is not supported (a chat template would "
        "train other text); write the rows as prompt and completion"
    )


def _chat(key: str, entry: dict[str, Yaml], more: Collection[str] = ()) -> tuple[dict[str, Yaml], list[str]]:
    known = {
        *more,
        "field_messages", "message_property_mappings", "message_field_role", "message_field_content", "roles",
        "roles_to_train", "train_on_eos", "train_on_eot", "drop_system_message", "field_tools", "split_thinking",
    }  # fmt: skip
    problems = _others(key, entry, known)
    mapping = as_mapping(f"{key}.message_property_mappings", entry.get("message_property_mappings", {}))
    role = mapping.get("role", entry.get("message_field_role", "role"))
    content = mapping.get("content", entry.get("message_field_content", "content"))
    if (role, content) not in (("role", "content"), ("from", "value")):
        problems.append(f"{key}: turns with {role} and {content}; rename them to role and content in the rows")
    if extra := sorted(name for name in mapping.keys() - {"role", "content"} if mapping[name] != name):
        problems.append(f"{key}.message_property_mappings: {', '.join(extra)} would have to be renamed in the rows")
    for name, spellings in as_mapping(f"{key}.roles", entry.get("roles", {})).items():
        if other := sorted({*as_texts(f"{key}.roles.{name}", spellings)} - _ROLES.get(name, set())):
            problems.append(f"{key}.roles.{name}: {', '.join(other)} is not read as {name}; rename it in the rows")
    trained = set(as_texts(f"{key}.roles_to_train", entry.get("roles_to_train", ["assistant"])))
    if not trained or not trained <= {"assistant", "gpt"}:
        problems.append(
            f"{key}.roles_to_train={entry['roles_to_train']}: only assistant turns are trained; see data.train_on"
        )
    problems += [
        f"{key}.{name}={entry[name]}: the token that ends a turn is trained here; leave it out"
        for name in ("train_on_eos", "train_on_eot")
        if entry.get(name, "turn") != "turn"
    ]
    problems += [
        f"{key}.{name}: not supported; change the rows"
        for name in ("drop_system_message", "split_thinking")
        if name in entry and as_flag(f"{key}.{name}", entry[name])
    ]
    columns = _columns("messages", as_text(f"{key}.field_messages", entry.get("field_messages", "messages")))
    if "field_tools" in entry and entry["field_tools"] != "tools":
        columns = {"columns": {**as_mapping("", columns.get("columns", {})), "tools": entry["field_tools"]}}
    return {"format": "messages", **columns}, problems


def _columns(ours: str, theirs: str) -> dict[str, Yaml]:
    return {} if ours == theirs else {"columns": {ours: theirs}}


def _others(key: str, entry: dict[str, Yaml], known: set[str]) -> list[str]:
    """Names the keys of a data set that nothing is made of."""
    return [
        f"{key}.{name}: changes what is read or trained, and is not supported; leave it out"
        for name, value in entry.items()
        if name not in known | _KNOWN | _QUIET and not is_off(value)
    ]

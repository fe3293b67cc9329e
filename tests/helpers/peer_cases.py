"""Odd rows, a tokenizer, and the configs of other tools whose tokens are compared with ours.

`benchmarks/peer_tokens.py` has the other tools prepare these rows; tests/unit/importers/test_peer_tokens.py compares.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

MARKS = [
    "<s>", "</s>", "<|pad|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]",
]  # fmt: skip
_TEXTS = [
    "Add 2 and 2.", "What is the capital of France?", " a space in front", "a space behind ", "\na break in front",
    "a break behind\n", "two\n\nparagraphs", "tab\tand  two spaces", "Grüße, Straße, naïve", "日本語のテキスト",
    "🙂🙃👩‍👩‍👧",
    "{braces} and %(percent)s and {{double}}", "### Instruction:\nnested", "1,234.56 € (≈ 10 %)", "a" * 40,
    "it's, they're, I'll", "x = {'a': [1, 2]}; print(f\"{x!r}\")", "<b>bold</b> &amp;", "line\r\nending", "?!...",
]  # fmt: skip


def _text(number: int, step: int) -> str:
    first, second = _TEXTS[number % len(_TEXTS)], _TEXTS[(number * step + step) % len(_TEXTS)]
    return first if number % 3 == 0 else f"{first} {second}" if number % 3 == 1 else f"{second}\n{number} {first}"


def instructions() -> list[dict[str, str]]:
    """Return 56 rows with instruction, input (every third is empty) and output."""
    return [
        {"instruction": _text(n, 3), "input": "" if n % 3 == 2 else _text(n + 7, 7), "output": _text(n + 3, 11)}
        for n in range(56)
    ]


def chats(has_system: bool) -> list[dict[str, Any]]:
    """Return 56 chats of one to three exchanges, without white space around their texts.

    Args:
        has_system: Whether every second has a system turn.
    """
    rows = []
    for n in range(56):
        turns = [{"role": "system", "content": _text(n, 13).strip()}] if has_system and n % 2 else []
        for turn in range(1 + n % 3):
            turns.append({"role": "user", "content": _text(n + turn, 3).strip()})
            turns.append({"role": "assistant", "content": _text(n + turn + 5, 11).strip()})
        rows.append({"messages": turns})
    return rows


def tokenizer(eos: str, bos: str | None) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer of 900 tokens that knows the marks of all templates.

    Args:
        eos: Token that ends a text.
        bos: Token that it writes in front of every text; None writes none.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=MARKS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([text for row in instructions() for text in row.values()], trainer)
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, bos_token=bos, pad_token="<|pad|>", clean_up_tokenization_spaces=False,
        chat_template="{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A config of another tool, with the rows that it reads."""

    tool: str
    keys: dict[str, Any]
    """Keys of the config, besides those that every file has."""
    rows: list[dict[str, Any]]
    eos: str = "</s>"
    bos: str | None = "<s>"
    data: dict[str, Any] = field(default_factory=dict)
    """The data set: keys of `datasets` (Axolotl), or of dataset_info.json (LLaMA-Factory)."""


def _axolotl(kind: Any, columns: dict[str, str] | None = None, **others: Any) -> Case:
    """Return a case of rows that become plain text, under the names that the type reads."""
    named = {"instruction": "instruction", "input": "input", "output": "output"} | (columns or {})
    systems = [{"system": text} if named.get("system") else {} for text in ("Be brief.", "", " Wait.\n")]
    rows = [
        {named[key]: value for key, value in (row | systems[n % 3]).items() if named[key]}
        for n, row in enumerate(instructions())
    ]
    return Case("axolotl", others.pop("keys", {}), rows, data={"type": kind}, **others)


_QA = {"input": "", "instruction": "question", "output": "response", "system": "system_prompt"}
_OWN = {
    "system_prompt": "You answer.", "system_format": "<{system}>\n", "field_instruction": "ask", "field_output": "say",
    "format": "Q: {instruction} {{{input}}}\nA:", "no_input_format": "Q: {instruction}\nA:",
}  # fmt: skip
_TURNS = {
    "formatting": "sharegpt", "columns": {"messages": "messages"},
    "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
             "system_tag": "system", "observation_tag": "tool", "function_tag": "function_call"},
}  # fmt: skip
CASES: dict[str, Case] = {
    **{f"axolotl alpaca{style}": _axolotl(f"alpaca{style}") for style in ("", ":chat", ":chatml", ":phi")},
    "axolotl alpaca without bos": _axolotl("alpaca", bos=None),
    "axolotl alpaca, inputs trained": _axolotl("alpaca", keys={"train_on_inputs": True}),
    "axolotl alpaca_chat": _axolotl("alpaca_chat"),
    "axolotl alpaca_chat.load_no_prompt": _axolotl("alpaca_chat.load_no_prompt"),
    "axolotl alpaca_instruct.load_no_prompt": _axolotl("alpaca_instruct.load_no_prompt"),
    "axolotl gpteacher": _axolotl("gpteacher", {"output": "response"}),
    "axolotl gpteacher:chat": _axolotl("gpteacher:chat", {"output": "response"}),
    "axolotl jeopardy": _axolotl("jeopardy", {"instruction": "question", "input": "category", "output": "answer"}),
    "axolotl oasst": _axolotl("oasst", {"instruction": "INSTRUCTION", "input": "", "output": "RESPONSE"}),
    "axolotl summarizetldr": _axolotl("summarizetldr", {"instruction": "article", "input": "", "output": "summary"}),
    **{
        f"axolotl alpaca_w_system{load}": _axolotl(f"alpaca_w_system{load}", {"system": "system"})
        for load in (".load_instruct", ".load_chat")
    },
    "axolotl alpaca_w_system.load_open_orca": _axolotl("alpaca_w_system.load_open_orca", _QA),
    "axolotl alpaca_w_system.load_open_orca_chatml": _axolotl("alpaca_w_system.load_open_orca_chatml", _QA),
    "axolotl context_qa": _axolotl(
        "context_qa", {"instruction": "article", "input": "question", "output": "answer"}
    ),
    "axolotl context_qa.load_v2": _axolotl(
        "context_qa.load_v2", {"instruction": "context", "input": "question", "output": "answer"}
    ),
    "axolotl own format": _axolotl(_OWN, {"instruction": "ask", "output": "say"}),
    "axolotl own format, system of the row": _axolotl(
        _OWN | {"field_system": "sys"}, {"instruction": "ask", "output": "say", "system": "sys"}
    ),
    "axolotl own format, defaults": _axolotl({"field_instruction": "instruction"}),
    **{
        f"axolotl chat_template {name}": Case(
            "axolotl", {"chat_template": name}, chats(has_system), eos, data={"type": "chat_template"}
        )
        for name, has_system, eos in (
            ("chatml", True, "<|im_end|>"), ("llama3", True, "<|eot_id|>"), ("gemma3", True, "<end_of_turn>"),
            ("gemma", False, "<end_of_turn>"), ("phi_35", True, "<|end|>"), ("mistral_v2v3", False, "</s>"),
        )
    },
    **{
        f"llamafactory {name}": Case(
            "llamafactory", {"template": name}, chats(has_system), eos,
            data=_TURNS,
        )
        for name, has_system, eos in (
            ("chatml", True, "<|im_end|>"), ("llama3", True, "<|eot_id|>"), ("gemma", False, "<end_of_turn>"),
            ("qwen3_nothink", True, "<|im_end|>"), ("mistral", False, "</s>"),
        )
    },
    "llamafactory alpaca rows": Case(
        "llamafactory", {"template": "chatml"}, instructions(), "<|im_end|>", data={"formatting": "alpaca"}
    ),
    "llamafactory mask_history": Case(
        "llamafactory", {"template": "llama3", "mask_history": True}, chats(True), "<|eot_id|>",
        data=_TURNS,
    ),
    "trl messages": Case("trl", {}, chats(True), "<|im_end|>"),
    "trl text pairs": Case(
        "trl", {}, [{"prompt": row["instruction"], "completion": row["output"]} for row in instructions()]
    ),
    "trl prompt and completion of turns": Case(
        "trl", {}, [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in chats(True)],
        "<|im_end|>",
    ),
    "trl text": Case("trl", {}, [{"text": row["instruction"]} for row in instructions()]),
}  # fmt: skip


def config_of(case: Case, folder: Path) -> dict[str, Any]:
    """Return the whole config of a case, and put beside it what it refers to.

    Args:
        case: The case.
        folder: Where its rows are in `rows.jsonl`.
    """
    rows = str(folder / "rows.jsonl")
    if case.tool == "axolotl":
        needed = {"base_model": "m", "learning_rate": 1e-4, "sequence_len": 2048}
        return {**needed, "datasets": [{"path": rows, **case.data}], **case.keys}
    if case.tool == "trl":
        return {"model_name_or_path": "m", "dataset_name": rows, "report_to": "none", **case.keys}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.jsonl", **case.data}}))
    return {
        "model_name_or_path": "m", "stage": "sft", "finetuning_type": "lora", "dataset": "rows",
        "dataset_dir": str(folder), "output_dir": "out", **case.keys,
    }  # fmt: skip


def trained_ranges(trained: list[bool]) -> str:
    """Return the trained tokens of a sample as ranges, such as `5-9 12-20`."""
    edges = [n for n in range(len(trained) + 1) if (n and trained[n - 1]) != (n < len(trained) and trained[n])]
    return " ".join(f"{a}-{b}" for a, b in zip(edges[::2], edges[1::2], strict=True))


def recorded(rows: list[list[str]]) -> dict[str, Any]:
    """Return what is kept of a case: the digests of all rows, and the first two rows as they are.

    Args:
        rows: For each row its tokens, and its trained ranges.
    """
    digests = [hashlib.sha256("|".join(row).encode()).hexdigest()[:12] for row in rows]
    return {"digests": digests, "first": rows[:2]}

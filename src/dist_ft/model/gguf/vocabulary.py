"""Writes a tokenizer as llama.cpp reads it: tokens, types, merges or scores, and the name of its pre-tokenizer.

llama.cpp knows how text is split by a name (`tokenizer.ggml.pre`), not by a pattern. A wrong name gives other tokens
without a word, so a tokenizer that splits by none of the patterns below is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from tokenizers import Tokenizer

from dist_ft.errors import ModelError
from dist_ft.model.gguf.shapes import CONVERTER

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"
_LAST_RESORT = -1e6
"""Score of a token that no merge makes."""
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT_2 = "ByteLevel's own"
_PRE_TOKENIZERS: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((_GPT_2,), False): "gpt-2",
    (("digits", _GPT_2), False): "smollm",
    ((_LLAMA_3,), True): "llama-bpe",
    ((_LLAMA_3,), False): "dbrx",
    ((_QWEN_2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
}
"""(patterns that split a text, whether whole words are taken before merges) → llama.cpp's name for it."""


def add_vocabulary(writer: GGUFWriter, directory: Path, num_rows: int) -> None:
    """Add the tokenizer of a directory, its special tokens and its chat template.

    Args:
        writer: Gets the fields.
        directory: Holds tokenizer.json, and generation_config.json if there is one.
        num_rows: Rows of the embedding. Those without a token get a name that no text has.

    Raises:
        ModelError: See `check_tokenizer`.
    """
    text = (directory / "tokenizer.json").read_text(encoding="utf-8")
    described = json.loads(text)
    is_spm = check_tokenizer(described, num_rows)
    tokens, types = _tokens(described, num_rows, is_spm)
    writer.add_tokenizer_model("llama" if is_spm else "gpt2")
    writer.add_tokenizer_pre("default" if is_spm else pre_tokenizer(described))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if is_spm:
        writer.add_token_scores(_scores(described["model"], tokens))
        writer.add_add_space_prefix(_puts_space_first(described))
    special = SpecialVocab(directory, load_merges=not is_spm, n_vocab=num_rows)
    # What the tokenizer does counts, not what its config says of it.
    encoded = Tokenizer.from_str(text).encode("a").ids
    ids = special.special_token_ids
    special.add_special_token = {
        "bos": encoded[0] == ids.get("bos", -1),
        "eos": encoded[-1] == ids.get("eos", -1),
    }
    special.add_to_gguf(writer, quiet=True)
    if others := [number for number in end_tokens(directory) if number != ids.get("eos")]:
        writer.add_eot_token_id(others[0])


def check_tokenizer(described: Mapping[str, Any], num_rows: int) -> bool:
    """Check that llama.cpp can be told of a tokenizer; return whether it is of SentencePiece's kind.

    Args:
        described: What tokenizer.json says.
        num_rows: Rows of the embedding.

    Raises:
        ModelError: It cannot, or the model has fewer rows than tokens.
    """
    model = described["model"]
    if model["type"] != "BPE" or not model["merges"]:
        raise _refused(f"a tokenizer of the kind {model['type']}" + (" without merges" * (model["type"] == "BPE")))
    size = max([*model["vocab"].values(), *(token["id"] for token in described["added_tokens"])]) + 1
    if size > num_rows:
        raise ModelError(f"--format gguf: the tokenizer has {size} tokens and the model {num_rows} rows for them")
    is_spm = bool(model.get("byte_fallback"))
    if not is_spm:
        pre_tokenizer(described)
    return is_spm


def pre_tokenizer(described: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the way in which a byte-level tokenizer splits text before merges.

    Raises:
        ModelError: It has none that is known here.
    """
    model = described["model"]
    patterns = tuple(_patterns(described["pre_tokenizer"]))
    found = _PRE_TOKENIZERS.get((patterns, bool(model.get("ignore_merges"))))
    if found is None:
        raise _refused(f"a tokenizer that splits text by {' then '.join(patterns) or 'nothing'}")
    return found


def end_tokens(directory: Path) -> list[int]:
    """Return the tokens that end an answer, as generation_config.json names them."""
    path = directory / "generation_config.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
    return found if isinstance(found, list) else [] if found is None else [found]


def _refused(what: str) -> ModelError:
    return ModelError(
        f"--format gguf: {what} has no name in llama.cpp that is known here; export with `dist-ft export RUN --merge "
        f"--to DIR` and convert DIR with {CONVERTER}"
    )


def _patterns(step: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield what a pre-tokenizer splits by, in order."""
    if step is None:
        return
    match step:
        case {"type": "Sequence", "pretokenizers": steps}:
            for inner in steps:
                yield from _patterns(inner)
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            yield pattern
        case {"type": "Digits", "individual_digits": True}:
            yield "digits"
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            if use_regex:
                yield _GPT_2
        case _:
            yield json.dumps(step)


def _tokens(described: Mapping[str, Any], num_rows: int, is_spm: bool) -> tuple[list[str], list[TokenType]]:
    """Return text and type of each row of the embedding."""
    texts = [f"[PAD{row}]" for row in range(num_rows)]
    types = [TokenType.UNUSED] * num_rows
    for text, row in described["model"]["vocab"].items():
        texts[row] = text
        types[row] = TokenType.BYTE if is_spm and _BYTE.fullmatch(text) else TokenType.NORMAL
    for added in described["added_tokens"]:
        row, text = added["id"], added["content"]
        # A token that is a part of ordinary text is looked for in the text as people write it.
        texts[row] = text if added["special"] or not is_spm else text.replace(_SPACE, " ")
        types[row] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if (unknown := described["model"].get("unk_token")) is not None and is_spm:
        types[described["model"]["vocab"][unknown]] = TokenType.UNKNOWN
    return texts, types


def _scores(model: Mapping[str, Any], tokens: Sequence[str]) -> list[float]:
    """Return scores that make llama.cpp merge in the order of tokenizer.json: it merges what scores highest first."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge if isinstance(merge, list) else merge.split(" ")
        scores.setdefault(left + right, -float(rank))
    return [scores.get(token, _LAST_RESORT) for token in tokens]


def _puts_space_first(described: Mapping[str, Any]) -> bool:
    """Whether a text is read as if a space stood before it."""
    for step in (described["normalizer"], described["pre_tokenizer"]):
        for inner in [step, *((step or {}).get("normalizers") or (step or {}).get("pretokenizers") or ())]:
            match inner:
                case {"type": "Prepend"} | {"type": "Metaspace", "prepend_scheme": "always" | "first"}:
                    return True
    return False

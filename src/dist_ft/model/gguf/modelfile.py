"""Writes Ollama's Modelfile: where the weights are, the chat template in Ollama's language, and where answers end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from dist_ft.errors import DataError
from dist_ft.model.base import Tokenizer
from dist_ft.model.chat.render import Renderer
from dist_ft.records import Message

_WORDS = ("probe0first", "probe0second", "probe0third", "probe0fourth")
_SHAPES = (
    ("user",),
    ("user", "assistant", "user"),
    ("system", "user"),
    ("system", "user", "assistant", "user"),
)
"""Conversations that a template of Ollama has to render as the model's own does."""


@dataclass(frozen=True)
class Turns:
    """A chat template that writes one turn after the other.

    Attributes:
        without_system: What stands first if there is no system message.
        around: By role, what stands before and behind a message. A template may know no system messages.
        prompt: What the answer of the model follows.
    """

    without_system: str
    around: dict[str, tuple[str, str]]
    prompt: str

    def render(self, messages: Sequence[Message]) -> str:
        """Return the text of a conversation that the model is to answer."""
        first = "" if messages[0]["role"] == "system" else self.without_system
        turns = (str(m["content"]).join(self.around[m["role"]]) for m in messages)
        return first + "".join(turns) + self.prompt

    def in_go(self) -> str:
        """Return it as a template of Ollama. Texts are quoted, so that no white space is cut off them."""
        lines = []
        if self.without_system:
            lines.append(f"{{{{- if not .System }}}}{_quoted(self.without_system)}{{{{- end }}}}")
        lines.append("{{- range .Messages }}")
        for role, (before, behind) in self.around.items():
            lines.append(
                f'{{{{- if eq .Role "{role}" }}}}{_quoted(before)}{{{{- .Content }}}}{_quoted(behind)}{{{{- end }}}}'
            )
        lines.append(f"{{{{- end }}}}{_quoted(self.prompt)}")
        return "\n".join(lines)


def modelfile(source: str, adapter: str | None, tokenizer: Tokenizer, stops: Sequence[str]) -> str:
    """Return a Modelfile.

    Args:
        source: What `FROM` names: a GGUF file beside it, or a model that Ollama has.
        adapter: GGUF file of an adapter beside it.
        tokenizer: The model's, with its chat template.
        stops: Texts of tokens that end an answer.
    """
    lines = [f"FROM {source}"]
    if adapter is not None:
        lines.append(f"ADAPTER {adapter}")
    turns = find_turns(tokenizer)
    if turns is None:
        lines.append("# The model's chat template cannot be said in Ollama's language; it stands in the GGUF file.")
    else:
        lines.append(f'TEMPLATE """{turns.in_go()}"""')
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    return "\n".join(lines) + "\n"


def find_turns(tokenizer: Tokenizer) -> Turns | None:
    """Return the chat template as turns; None if there is none, or it does more than write turns.

    It is read off rendered conversations and then compared with others, so what is found is right for those. The token
    that begins every text is left out if the tokenizer sets it by itself, as Ollama's then does, too.
    """
    if not tokenizer.chat_template:
        return None
    renderer = Renderer(tokenizer)
    texts: dict[tuple[str, ...], str] = {}
    for roles in _SHAPES:
        try:
            text = renderer.text(_conversation(roles), add_generation_prompt=True)
        except DataError:
            if roles[0] != "system":
                return None
            continue
        texts[roles] = text.removeprefix(renderer.continued(""))
    try:
        turns = _read_off(texts)
    except ValueError:  # a message does not stand in its text as it is
        return None
    is_right = all(turns.render(_conversation(roles)) == text for roles, text in texts.items())
    return turns if is_right else None


def _read_off(texts: dict[tuple[str, ...], str]) -> Turns:
    """Return the turns that some rendered conversations show, whether or not they explain the others.

    Raises:
        ValueError: A message does not stand in the text as it is, or not once.
    """
    one, two, three, _ = _WORDS
    head, behind_question = texts["user",].split(one)
    _, rest = texts["user", "assistant", "user"].split(one)
    before_answer, rest = rest.split(two)
    before_next, _ = rest.split(three)
    behind_user = _shared_start([behind_question, before_answer])
    around = {"assistant": (before_answer.removeprefix(behind_user), before_next)}
    gaps = [before_next, head]
    if with_system := texts.get(("system", "user")):
        before_system, rest = with_system.split(one)
        before_question, _ = rest.split(two)
        around["system"] = (before_system, before_question)
        gaps.append(before_question)
    # What stands before every question belongs to the question.
    before_user = _shared_start([gap[::-1] for gap in gaps])[::-1]
    around = {role: (before, behind.removesuffix(before_user)) for role, (before, behind) in around.items()}
    around["user"] = (before_user, behind_user)
    return Turns(head.removesuffix(before_user), around, behind_question.removeprefix(behind_user))


def _conversation(roles: Sequence[str]) -> list[Message]:
    return [{"role": role, "content": word} for role, word in zip(roles, _WORDS, strict=False)]


def _shared_start(texts: Sequence[str]) -> str:
    """Return the characters that all texts begin with."""
    first, last = min(texts), max(texts)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:length]


def _quoted(text: str) -> str:
    """Return an action that writes a text; nothing for none."""
    return f"{{{{- {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""

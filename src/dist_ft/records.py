"""What a row of data is, between the files it comes from and the tokens it becomes.

`data/rows/` reads rows of any format into a `Record`; `model/chat/render.py` turns a record into `Sample`s.
Neither knows the other. A new kind of record is a class here and its row format in `data/rows/formats.py`; an
objective that learns from it renders it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, NotRequired, Self, TypedDict

ROLES = ("system", "developer", "user", "assistant", "tool")
ANSWER_START = "answer_start"
"""Number of a sample: the index of the first token of its answer, where tokens before it are trained, too."""


class CalledFunction(TypedDict):
    """The function of a tool call, and its arguments as an object."""

    name: str
    arguments: dict[str, Any]


class ToolCall(TypedDict):
    """A call that an assistant turn makes, in OpenAI's spelling."""

    type: Literal["function"]
    function: CalledFunction
    id: NotRequired[str]


class Message(TypedDict):
    """One turn, in OpenAI's spelling.

    `role` is one of `ROLES` and `content` always text. The other keys are those that a template may look at; `weight`,
    0 or 1, says whether an assistant turn is trained.
    """

    role: str
    content: str
    name: NotRequired[str]
    tool_call_id: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]
    weight: NotRequired[int]


@dataclass(frozen=True)
class AskedText:
    """A record as a question with a known answer.

    Attributes:
        record: What the model is asked: ends with the answer.
        answer: What it should say.
        shown: The question as a person would put it, without the template.
    """

    record: Conversation | Completion
    answer: str
    shown: str


class Record(ABC):
    """What a row of data says. Everything that curation, redaction, checks and evaluation ask of it stands here.

    Attributes:
        kind: What such a row is called in messages.
        objectives: Values of `objective.kind` that learn from it.
    """

    kind: ClassVar[str]
    objectives: ClassVar[str] = "sft"

    @property
    @abstractmethod
    def num_turns(self) -> int | None:
        """Turns of a conversation; None for raw text."""

    @abstractmethod
    def role_texts(self) -> Iterator[tuple[str, str]]:
        """Yield (role, text) of all that is said; arguments of tool calls as JSON. A prompt counts as the user's."""

    @abstractmethod
    def map_texts(self, change: Callable[[str], str]) -> Self:
        """Return the record with every text changed, turn by turn, so that what is trained stays what is trained."""

    @abstractmethod
    def answer_text(self) -> str:
        """Return the text of the last answer; empty for plain text."""

    @abstractmethod
    def has_empty_answer(self) -> bool:
        """Return whether some answer teaches the model to say nothing."""

    @abstractmethod
    def templated_texts(self) -> list[str]:
        """Return the texts that a template puts between its special tokens; raw text may hold them on purpose."""

    @abstractmethod
    def question(self) -> AskedText | None:
        """Return the record as a question; None where it asks nothing, or its answer says nothing (a tool call)."""

    @abstractmethod
    def split_content(self) -> object:
        """Return JSON values whose hash decides on which side of a held-out split the row falls."""


@dataclass(frozen=True)
class Conversation(Record):
    """Turns that a chat template renders.

    Attributes:
        messages: At least one turn.
        tools: Definitions of the functions that the assistant may call, in OpenAI's spelling; empty for none.
        is_completion: Whether the row said apart what comes before its answers.
    """

    kind = "a conversation"

    messages: list[Message]
    tools: tuple[dict[str, Any], ...] = ()
    is_completion: bool = field(default=False, compare=False)

    @property
    def num_turns(self) -> int:
        return len(self.messages)

    def role_texts(self) -> Iterator[tuple[str, str]]:
        for message in self.messages:
            yield from ((message["role"], text) for text in _message_texts(message))

    def map_texts(self, change: Callable[[str], str]) -> Self:
        messages = [_map_message(message, change) for message in self.messages]
        return replace(self, messages=messages, tools=tuple(_map_nested(tool, change) for tool in self.tools))

    def answer_text(self) -> str:
        answers = [message for message in self.messages if message["role"] == "assistant"]
        return "\n".join(_message_texts(answers[-1])) if answers else ""

    def has_empty_answer(self) -> bool:
        trained = (
            message for message in self.messages if message["role"] == "assistant" and message.get("weight") != 0
        )
        return any(
            not (message["content"].strip() or message.get("tool_calls") or message.get("reasoning_content"))
            for message in trained
        )

    def templated_texts(self) -> list[str]:
        return [message["content"] for message in self.messages]

    def question(self) -> AskedText | None:
        last = max((i for i, message in enumerate(self.messages) if message["role"] == "assistant"), default=None)
        if last is None or not self.messages[last]["content"].strip():
            return None
        messages = self.messages[: last + 1]
        asked = next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")
        return AskedText(Conversation(messages, self.tools), messages[-1]["content"], asked)

    def split_content(self) -> object:
        return {"messages": self.messages, "tools": self.tools} if self.tools else self.messages


@dataclass(frozen=True)
class Completion(Record):
    """Raw text that no template touches: plain text, or a prompt and what follows it.

    Attributes:
        prompt: Not trained; empty for plain text.
        completion: Trained, with the token that ends a text behind it.
        is_apart: Whether prompt and completion are tokenised one by one, so that no token spans both.
    """

    kind = "a text"

    prompt: str
    completion: str
    is_apart: bool = False

    @property
    def num_turns(self) -> None:
        return None

    def role_texts(self) -> Iterator[tuple[str, str]]:
        yield from ((role, text) for role, text in (("user", self.prompt), ("assistant", self.completion)) if text)

    def map_texts(self, change: Callable[[str], str]) -> Self:
        return replace(self, prompt=change(self.prompt), completion=change(self.completion))

    def answer_text(self) -> str:
        return self.completion if self.prompt else ""

    def has_empty_answer(self) -> bool:
        return not self.completion.strip()

    def templated_texts(self) -> list[str]:
        return []

    def question(self) -> AskedText | None:
        return AskedText(self, self.completion, self.prompt) if self.prompt else None

    def split_content(self) -> object:
        return {"prompt": self.prompt, "completion": self.completion}


Side = list[Message] | str
"""A prompt or an answer: turns, or raw text. A row has the same form for all of them."""


class Answered(Record):
    """A prompt with answers of which not all are to be imitated; its members say which and why."""

    prompt: Side
    tools: tuple[dict[str, Any], ...]

    @abstractmethod
    def sides(self) -> tuple[Conversation | Completion, ...]:
        """Return the prompt with each answer, the best first; only the answers are to be trained."""

    @property
    def num_turns(self) -> int | None:
        return self.sides()[0].num_turns

    def role_texts(self) -> Iterator[tuple[str, str]]:
        return self.sides()[0].role_texts()

    def answer_text(self) -> str:
        return self.sides()[0].answer_text()

    def has_empty_answer(self) -> bool:
        return any(side.has_empty_answer() for side in self.sides())

    def templated_texts(self) -> list[str]:
        return [text for side in self.sides() for text in side.templated_texts()]

    def question(self) -> AskedText | None:
        return self.sides()[0].question()

    def split_content(self) -> object:
        return {"prompt": self.prompt, "tools": self.tools}  # so all answers to a prompt fall on one side


@dataclass(frozen=True)
class Preference(Answered):
    """Two answers to one prompt, of which one is better.

    Attributes:
        prompt: Turns before the answers, or the text before them; may be empty.
        chosen: The better answer.
        rejected: The worse one.
        tools: See `Conversation`.
    """

    kind = "a pair of answers"
    objectives = "dpo, cpo, orpo"

    prompt: Side
    chosen: Side
    rejected: Side
    tools: tuple[dict[str, Any], ...] = ()

    def sides(self) -> tuple[Conversation | Completion, Conversation | Completion]:
        return answered(self.prompt, self.chosen, self.tools), answered(self.prompt, self.rejected, self.tools)

    def role_texts(self) -> Iterator[tuple[str, str]]:
        yield from super().role_texts()
        yield from answered(type(self.prompt)(), self.rejected).role_texts()

    def map_texts(self, change: Callable[[str], str]) -> Self:
        prompt, chosen, rejected = (_map_side(side, change) for side in (self.prompt, self.chosen, self.rejected))
        tools = tuple(_map_nested(tool, change) for tool in self.tools)
        return replace(self, prompt=prompt, chosen=chosen, rejected=rejected, tools=tools)


@dataclass(frozen=True)
class Labelled(Answered):
    """An answer to a prompt, and whether it is a good one.

    Attributes:
        prompt: Turns before the answer, or the text before it; may be empty.
        completion: The answer.
        label: Whether it is good.
        tools: See `Conversation`.
    """

    kind = "an answer with a label"
    objectives = "kto"

    prompt: Side
    completion: Side
    label: bool
    tools: tuple[dict[str, Any], ...] = ()

    def sides(self) -> tuple[Conversation | Completion]:
        return (answered(self.prompt, self.completion, self.tools),)

    def map_texts(self, change: Callable[[str], str]) -> Self:
        tools = tuple(_map_nested(tool, change) for tool in self.tools)
        prompt, completion = _map_side(self.prompt, change), _map_side(self.completion, change)
        return replace(self, prompt=prompt, completion=completion, tools=tools)

    def question(self) -> AskedText | None:
        return super().question() if self.label else None


def answered(prompt: Side, answer: Side, tools: tuple[dict[str, Any], ...] = ()) -> Conversation | Completion:
    """Return a prompt with an answer behind it; of a conversation only the answer's turns are to be trained."""
    if isinstance(prompt, str) and isinstance(answer, str):
        return Completion(prompt, answer)
    assert isinstance(prompt, list) and isinstance(answer, list), "all of a row has one form"
    before: list[Message] = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in prompt]
    return Conversation([*before, *answer], tools)


@dataclass(frozen=True)
class Sample:
    """One rendered record, or a part of it.

    Attributes:
        input_ids: Tokens.
        trained: For each token, whether its prediction is trained. The first is never: nothing precedes it.
        numbers: What the objective wants to know of the sample besides, by column.
        num_unended: Trained answers that end without a token at which generation stops.
    """

    input_ids: list[int]
    trained: list[bool]
    numbers: Mapping[str, float] = field(default_factory=dict)
    num_unended: int = 0


def _message_texts(message: Message) -> Iterator[str]:
    spoken = (message["content"], message.get("reasoning_content"))
    yield from (text for text in spoken if text)
    for call in message.get("tool_calls") or ():
        yield json.dumps(_function_of(call).get("arguments"), ensure_ascii=False, default=str)


def _map_side(side: Side, change: Callable[[str], str]) -> Side:
    return change(side) if isinstance(side, str) else [_map_message(message, change) for message in side]


def _map_message(message: Message, change: Callable[[str], str]) -> Message:
    changed: Message = {**message}
    if message["content"]:
        changed["content"] = change(message["content"])
    if reasoning := message.get("reasoning_content"):
        changed["reasoning_content"] = change(reasoning)
    if calls := message.get("tool_calls"):
        changed["tool_calls"] = [_map_call(call, change) for call in calls]
    return changed


def _map_call(call: ToolCall, change: Callable[[str], str]) -> ToolCall:
    function = _function_of(call)
    if "arguments" not in function:
        return call
    arguments = _map_nested(function["arguments"], change)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _function_of(call: ToolCall) -> Mapping[str, Any]:
    return call.get("function", {})


def _map_nested(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _map_nested(item, change) for key, item in value.items()}
    return [_map_nested(item, change) for item in value] if isinstance(value, list) else value

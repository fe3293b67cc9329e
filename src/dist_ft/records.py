"""What a row of data is, between the files it comes from and the tokens it becomes.

`data/rows/` reads rows of any format into a `Record`; `model/chat/render.py` turns a record into `Sample`s.
Neither knows the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")

Message = dict[str, Any]
"""One turn, in OpenAI's spelling.

`role` is one of `ROLES` and `content` always text. Further keys that a template may look at: `name`, `tool_call_id`,
`reasoning_content` (text); `tool_calls`, a list of `{"type": "function", "function": {"name", "arguments"}}` with an
optional `id`, arguments as an object; `weight`, 0 or 1: whether an assistant turn is trained.
"""


@dataclass(frozen=True)
class Conversation:
    """Turns that a chat template renders.

    Attributes:
        messages: At least one turn.
        tools: Definitions of the functions that the assistant may call, in OpenAI's spelling; empty for none.
    """

    messages: list[Message]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Completion:
    """Raw text that no template touches: plain text, or a prompt and what follows it.

    Attributes:
        prompt: Not trained; empty for plain text.
        completion: Trained, with the token that ends a text behind it.
    """

    prompt: str
    completion: str


Record = Conversation | Completion


@dataclass(frozen=True)
class Sample:
    """One rendered record, or a part of it.

    Attributes:
        input_ids: Tokens.
        trained: For each token, whether its prediction is trained. The first is never: nothing precedes it.
    """

    input_ids: list[int]
    trained: list[bool]

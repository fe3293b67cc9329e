"""Lets a teacher answer prompts: a model on this machine, or one behind an API that speaks OpenAI's protocol."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dist_ft.config import Config
from dist_ft.config.training_sections import DistillConfig
from dist_ft.errors import ConfigError, DataError, DataUnavailableError
from dist_ft.evaluate.generate import generate, make_batches
from dist_ft.model.base import load_tokenizer
from dist_ft.model.chat.render import Renderer
from dist_ft.model.frozen import check_frozen, frozen_config, frozen_key, load_frozen, named_by
from dist_ft.printable import excerpt, printable
from dist_ft.records import Conversation, Message
from dist_ft.storage.urls import shown_url

KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable with the key of an API; it is sent in a header and never shown."""
_TRIES = 6
_ANSWER_LIMIT_S = 600.0
_FIRST_WAIT_S = 1.0

Prompt = Conversation | str
"""Turns that end before the answer, or raw text to continue."""


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        max_new_tokens: Longest answer.
        temperature: 0 takes the likeliest token each time.
        seed: Draws the same answers again, on the same machine.
    """

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class TeacherAnswer:
    """What a teacher said to one prompt.

    Attributes:
        message: The assistant's turn; of raw text its content alone counts.
        is_whole: Whether the teacher came to an end by itself.
    """

    message: Message
    is_whole: bool


class Teacher(Protocol):
    """Answers prompts.

    Attributes:
        name: The teacher, as a user knows it.
        key: What would give the same answers, for a work that is gone on with.
    """

    name: str
    key: str

    def answer(self, prompts: Sequence[Prompt], first: int) -> list[TeacherAnswer]:
        """Return the answers of prompts, of which the first one has this number among all."""
        ...


class LocalTeacher:
    """A model that is loaded here, on the first GPU or the cores of this machine, with its own tokens and template.

    Args:
        config: The run config.
        named: What names the teacher.
        sampling: How answers are drawn.

    Raises:
        UserError: It does not load; the message names the key.
    """

    def __init__(self, config: Config, named: DistillConfig, sampling: Sampling) -> None:
        self.name, self._sampling = named.teacher, sampling
        with named_by("objective.teacher"):
            frozen = frozen_config(config, named.teacher, named.teacher_revision, is_of_run=False)
            if frozen.model.name != config.model.name:
                data = frozen.data.model_copy(update={"chat_template": None})
                frozen = frozen.model_copy(update={"data": data})
            check_frozen(frozen)
        self.key = frozen_key(frozen)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model, self._tokenizer = load_frozen(frozen).to(device), load_tokenizer(frozen)
        self._renderer = Renderer(self._tokenizer)

    def answer(self, prompts: Sequence[Prompt], first: int) -> list[TeacherAnswer]:
        """See `Teacher`."""
        texts = [self._text(prompt) for prompt in prompts]
        found: dict[int, TeacherAnswer] = {}
        for batch in make_batches([len(text) for text in texts]):
            torch.manual_seed(self._sampling.seed * 1_000_003 + first + batch[0])
            answers = generate(
                self._model, self._tokenizer, [texts[row] for row in batch], self._sampling.max_new_tokens,
                self._sampling.temperature,
            )  # fmt: skip
            for row, answer in zip(batch, answers, strict=True):
                found[row] = TeacherAnswer({"role": "assistant", "content": answer.text}, answer.is_whole)
        return [found[row] for row in range(len(prompts))]

    def _text(self, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            return self._renderer.continued(prompt)
        return self._renderer.text(prompt.messages, prompt.tools, add_generation_prompt=True)


class RemoteTeacher:
    """A model behind an API that speaks OpenAI's protocol (`…/v1`): vLLM, a hosted model, and the like.

    Args:
        url: Address up to `/v1`.
        model: Its name there.
        sampling: How answers are drawn.
        parallel: Requests at a time.
    """

    def __init__(self, url: str, model: str, sampling: Sampling, parallel: int) -> None:
        self._url, self._model, self._sampling = url.rstrip("/"), model, sampling
        self.name = model
        self.key = f"{shown_url(self._url)} {model}"
        self._pool = ThreadPoolExecutor(parallel)

    def answer(self, prompts: Sequence[Prompt], first: int) -> list[TeacherAnswer]:
        """See `Teacher`.

        Raises:
            DataUnavailableError: The API is away, or overloaded for long.
            ConfigError: It refuses the key, the model or a request.
        """
        return list(self._pool.map(self._ask, prompts, range(first, first + len(prompts))))

    def _ask(self, prompt: Prompt, number: int) -> TeacherAnswer:
        asked: dict[str, Any] = {"model": self._model, "max_tokens": self._sampling.max_new_tokens}
        asked["temperature"] = self._sampling.temperature
        if self._sampling.temperature:
            asked["seed"] = self._sampling.seed + number
        if isinstance(prompt, str):
            choice = self._post("completions", asked | {"prompt": prompt})
            message: Message = {"role": "assistant", "content": self._said(choice, "text", str)}
        else:
            tools = {"tools": list(prompt.tools)} if prompt.tools else {}
            choice = self._post("chat/completions", asked | {"messages": prompt.messages} | tools)
            said = self._said(choice, "message", dict)
            message = {"role": "assistant", "content": self._said({"content": ""} | _given(said), "content", str)}
            if said.get("tool_calls"):
                message["tool_calls"] = said["tool_calls"]
            if said.get("reasoning_content"):
                message["reasoning_content"] = said["reasoning_content"]
        return TeacherAnswer(message, choice.get("finish_reason") != "length")

    def _said(self, given: dict[str, Any], key: str, kind: type) -> Any:
        if not isinstance(value := given.get(key), kind):
            raise DataError(
                f"--teacher {shown_url(self._url)}: its answer has {excerpt(value)} under `{key}`, expected "
                f"{'text' if kind is str else 'an object'}"
            )
        return value

    def _post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return the first choice of an answer; ask again while the API is away or overloaded."""
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self._url}/{route}", json.dumps(body).encode(), headers)
        reason = ""
        for attempt in range(_TRIES):
            wait_s = _FIRST_WAIT_S * 2**attempt
            try:
                with urllib.request.urlopen(request, timeout=_ANSWER_LIMIT_S) as answer:
                    return dict(json.load(answer)["choices"][0])
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {printable(error.read(2000).decode(errors='replace'), 300)}"
                if error.code not in (408, 409, 429) and error.code < 500:
                    raise ConfigError(
                        f"--teacher {shown_url(self._url)} refuses {route} for model {self._model}: {reason}; check "
                        f"--model and the key in {KEY_VARIABLE}"
                    ) from error
                wait_s = _asked_wait_s(error.headers.get("Retry-After"), wait_s)
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise DataError(f"--teacher {shown_url(self._url)}: {route} answers something else: {error}") from error
            except (OSError, http.client.HTTPException) as error:
                reason = printable(str(error), 300)
            if attempt + 1 < _TRIES:
                time.sleep(wait_s)
        raise DataUnavailableError(
            f"--teacher {shown_url(self._url)} does not answer ({reason}); what is answered is kept: run the same "
            "command again to go on"
        )


def _given(message: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a message that say something; the content is null beside calls."""
    return {key: value for key, value in message.items() if value is not None}


def _asked_wait_s(retry_after: str | None, otherwise_s: float) -> float:
    """Return the seconds that an API asks to wait, a minute at most; a date, which HTTP allows, too, is not counted."""
    seconds = (retry_after or "").strip()
    return min(float(seconds), 60.0) if seconds.isdecimal() else otherwise_s

"""Chat templates that behave like the stock ones of well-known families, and what of an answer they make a model write.

Written here from what is documented of each family: its special tokens, what it trims, renames, merges, adds by
default and takes away. `Family.answer` says in Python what the Jinja text does to an answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dist_ft.config.data_sections import CHAT_TEMPLATES
from dist_ft.model.chat.render import Renderer
from dist_ft.model.chat.templates import named_template
from dist_ft.model.embedded import CHATML, byte_tokenizer
from dist_ft.records import Message

Answer = Callable[[Message, bool], str]
"""Text that is trained of an assistant turn; the flag says whether it is the last of its sample."""


@dataclass(frozen=True)
class Family:
    """A template and the tokens it needs.

    Attributes:
        template: Jinja text.
        answer: What is to be trained of an answer.
        eos: The tokenizer's EOS token.
        bos: Its BOS token, if any.
        marks: Further special tokens.
        stops: Those at which generation stops, as generation_config.json says, besides EOS.
        has_tools: Takes functions, calls and results.
        has_system: Takes a system turn.
        alternates: Wants user and assistant in turn, or does not keep two answers in a row apart.
        rewrites: Renders an answer in another way when something follows it.
    """

    template: str
    answer: Answer
    eos: str
    bos: str | None = None
    marks: tuple[str, ...] = ()
    stops: tuple[str, ...] = ()
    has_tools: bool = False
    has_system: bool = True
    alternates: bool = False
    rewrites: bool = False

    def tokenizer(self) -> Any:
        """Returns a byte-level tokenizer with the family's tokens and template."""
        tokenizer = byte_tokenizer()
        tokenizer.add_special_tokens({"eos_token": self.eos} | ({"bos_token": self.bos} if self.bos else {}))
        tokenizer.add_tokens([mark for mark in self.marks if mark != self.eos], special_tokens=True)
        tokenizer.chat_template = self.template
        return tokenizer

    def renderer(self, train_on: str = "assistant") -> Renderer:
        """Returns a renderer that knows the tokens at which generation stops."""
        tokenizer = self.tokenizer()
        return Renderer(tokenizer, train_on, tokenizer.convert_tokens_to_ids(list(self.stops)))


def _calls(message: Message, arguments: str, before: str = "", after: str = "") -> list[str]:
    functions = [call["function"] for call in message.get("tool_calls", ())]
    return [
        f"{before}{json.dumps({'name': f['name'], arguments: f['arguments']}, ensure_ascii=False)}{after}"
        for f in functions
    ]


def _plainly(end: str, strips: bool = False) -> Answer:
    return lambda message, _: (message["content"].strip() if strips else message["content"]) + end


def _in_tags(message: Message) -> str:
    """Content and calls as ChatML models of today write them."""
    calls = _calls(message, "arguments", "<tool_call>\n", "\n</tool_call>")
    return "\n".join([message["content"]] * bool(message["content"]) + calls)


# Llama 3.1: always a system turn with dates, functions in the first user turn, content trimmed, one call a turn and
# nothing beside it, results as JSON strings.
LLAMA3 = """
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}{%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}
{%- if tools %}{{- 'Environment: ipython\n' }}{%- endif %}
{{- 'Cutting Knowledge Date: December 2023\nToday Date: ' + strftime_now('%d %b %Y') + '\n\n' + system + '<|eot_id|>' }}
{%- if tools %}
    {%- if not messages %}{{- raise_exception('functions need a first user turn') }}{%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\nAnswer with a call of one of:\n\n' }}
    {%- for tool in tools %}{{- tool | tojson(indent=4) + '\n\n' }}{%- endfor %}
    {{- messages[0]['content'] | trim + '<|eot_id|>' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}{{- raise_exception('one call a turn') }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson + '}<|eot_id|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + message.content | tojson + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""

_QWEN_TOOLS = """
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] + '\n\n' }}{%- endif %}
    {{- '# Tools\n\nYou may call these:\n<tools>' }}
    {%- for tool in tools %}{{- '\n' + tool | tojson }}{%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
"""
_QWEN_RESULT = """
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}
"""

# Qwen 2.5: a default system turn where there is none, calls in tags, results gathered in a user turn.
QWEN25 = (
    _QWEN_TOOLS
    + """
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- else %}
    {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}"""
    + _QWEN_RESULT
    + """
    {%- elif message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' + ('\n' + message.content if message.content else '') }}
        {%- for call in message.tool_calls %}
            {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif not (message.role == 'system' and loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
)

# Qwen 3: reasoning in <think>, an empty one for a last answer without any, none before the last question.
QWEN3 = (
    _QWEN_TOOLS
    + """
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- endif %}
{%- set seen = namespace(question=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set seen.question = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}"""
    + _QWEN_RESULT
    + """
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- set thought = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thought = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.index0 > seen.question and (loop.last or thought) %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- content }}
        {%- endif %}
        {%- for call in message.tool_calls %}
            {{- '\n' if content or not loop.first }}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif not (message.role == 'system' and loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
)


def _qwen3_answer(message: Message, _is_last: bool) -> str:
    thought, content = message.get("reasoning_content", ""), message["content"]
    if "reasoning_content" not in message and "</think>" in content:
        thought = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
        content = content.split("</think>")[-1].lstrip("\n")
    calls = _calls(message, "arguments", "<tool_call>\n", "\n</tool_call>")
    text = "\n".join([content.lstrip("\n")] * bool(content) + calls)
    return "<think>\n" + thought.strip("\n") + "\n</think>\n\n" + text + "<|im_end|>"


# Gemma 3: the assistant is `model`, the system text opens the first user turn, content trimmed, turns alternate.
GEMMA3 = """
{{- bos_token }}
{%- set opening = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set opening = messages[0]['content'] + '\n\n' %}{%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}
    {{- opening if loop.first }}
    {%- if message['content'] is string %}
        {{- message['content'] | trim }}
    {%- else %}
        {%- for part in message['content'] %}{{- part['text'] | trim if part['type'] == 'text' }}{%- endfor %}
    {%- endif %}
    {{- '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}
"""

# Mistral: no header and no prompt before an answer, EOS behind it, functions before the last question only.
MISTRAL = """
{{- bos_token }}
{%- set opening = '' %}
{%- if messages[0]['role'] == 'system' %}
    {%- set opening = messages[0]['content'] + '\n\n' %}{%- set messages = messages[1:] %}
{%- endif %}
{%- set questions = messages | selectattr('role', 'equalto', 'user') | list %}
{%- set seen = namespace(questions=0, turns=0) %}
{%- for message in messages %}
    {%- if message['role'] in ('user', 'assistant') and 'tool_calls' not in message %}
        {%- if (message['role'] == 'user') != (seen.turns % 2 == 0) %}
            {{- raise_exception('After the optional system message, roles must alternate') }}
        {%- endif %}
        {%- set seen.turns = seen.turns + 1 %}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- set seen.questions = seen.questions + 1 %}
        {%- if tools and seen.questions == questions | length %}
            {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + (opening if loop.first else '') + message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + message['content'] + ', "call_id": "' + message['tool_call_id'] + '"}' }}
        {{- '[/TOOL_RESULTS]' }}
    {%- elif 'tool_calls' in message %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message['tool_calls'] %}
            {%- if call['id'] | length != 9 %}{{- raise_exception('Tool call IDs have 9 characters') }}{%- endif %}
            {{- (call['function'] | tojson)[:-1] + ', "id": "' + call['id'] + '"}' + (', ' if not loop.last else ']') }}
        {%- endfor %}
        {{- eos_token }}
    {%- else %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""


def _mistral_answer(message: Message, _is_last: bool) -> str:
    if "tool_calls" not in message:
        return " " + message["content"].strip() + "</s>"
    calls = [{**call["function"], "id": call["id"]} for call in message["tool_calls"]]
    return "[TOOL_CALLS] " + json.dumps(calls, ensure_ascii=False) + "</s>"


# Phi 3: an end of text behind the last turn when no answer is asked for.
PHI3 = """
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}
{%- endfor %}
{{- '<|assistant|>\n' if add_generation_prompt else eos_token }}
"""

# Phi 4: ChatML with a separator and no line breaks.
PHI4 = """
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant<|im_sep|>' }}{%- endif %}
"""

# GLM 4.5: no mark ends a turn. A model stops with the head of the next one, a question or the result of a call.
GLM45 = """
{{- '[gMASK]<sop>' }}
{%- if tools %}
    {{- '<|system|>\n# Tools\n' }}{%- for tool in tools %}{{- tool | tojson + '\n' }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|observation|>\n<tool_response>\n' + message.content + '\n</tool_response>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|assistant|>\n<think></think>' }}
        {%- if message.content %}{{- '\n' + message.content | trim }}{%- endif %}
        {%- for call in message.tool_calls %}
            {{- '\n<tool_call>' + call.function | tojson + '</tool_call>' }}
        {%- endfor %}
    {%- else %}
        {{- '<|' + message.role + '|>\n' + message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""


def _glm45_answer(message: Message, _is_last: bool) -> str:
    calls = _calls(message, "arguments", "\n<tool_call>", "</tool_call>")
    content = "\n" + message["content"].strip() if message["content"] else ""
    return "\n<think></think>" + content + "".join(calls) + ("<|observation|>" if calls else "<|user|>")


# Apertus: the mark that ends an answer is written when another turn begins, so the last answer has none.
APERTUS = """
{{- bos_token }}
{%- set seen = namespace(is_open=false) %}
{%- for message in messages %}
    {%- if seen.is_open %}{{- '<|assistant_end|>' }}{%- set seen.is_open = false %}{%- endif %}
    {{- '<|' + message.role + '_start|>' + message.content }}
    {%- if message.role == 'assistant' %}
        {%- set seen.is_open = true %}
    {%- else %}
        {{- '<|' + message.role + '_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- ('<|assistant_end|>' if seen.is_open else '') + '<|assistant_start|>' }}
{%- endif %}
"""

# Apriel: a mark between turns, on a line of its own.
APRIEL = """
{%- for message in messages %}
    {{- '<|' + message.role + '|>\n' + message.content }}
    {%- if not loop.last %}{{- '\n<|end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '\n<|end|>\n<|assistant|>\n' }}{%- endif %}
"""

# Command R7B: the prompt for the next answer stands at the end, whether it is asked for or not.
COMMAND = """
{{- bos_token }}
{%- for message in messages %}
    {%- set role = {'assistant': 'CHATBOT', 'user': 'USER'}.get(message.role, 'SYSTEM') %}
    {{- '<|START_OF_TURN_TOKEN|><|' + role + '_TOKEN|>' }}
    {%- if message.role == 'tool' %}
        {{- '<|START_TOOL_RESULT|>' + message.content | tojson + '<|END_TOOL_RESULT|>' }}
    {%- elif message.tool_calls %}
        {{- '<|START_ACTION|>' + message.tool_calls | map(attribute='function') | list | tojson + '<|END_ACTION|>' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|START_RESPONSE|>' + message.content + '<|END_RESPONSE|>' }}
    {%- else %}
        {{- message.content }}
        {%- if loop.first and tools %}{{- tools | tojson }}{%- endif %}
    {%- endif %}
    {{- '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}
"""


def _command_answer(message: Message, _is_last: bool) -> str:
    if functions := [call["function"] for call in message.get("tool_calls", ())]:
        said = "<|START_ACTION|>" + json.dumps(functions, ensure_ascii=False) + "<|END_ACTION|>"
    else:
        said = "<|START_RESPONSE|>" + message["content"] + "<|END_RESPONSE|>"
    return said + "<|END_OF_TURN_TOKEN|>"


# SmolLM 2: ChatML with a default system turn.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_LLAMA3 = {
    "eos": "<|eot_id|>",
    "bos": "<|begin_of_text|>",
    "marks": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
_GEMMA = {"eos": "<end_of_turn>", "bos": "<bos>", "marks": ("<start_of_turn>",)}
_MISTRAL = {
    "eos": "</s>",
    "bos": "<s>",
    "marks": (
        "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ),
}  # fmt: skip
_IM_END = "<|im_end|>"
_PHI3_MARKS = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")

STOCK: dict[str, Family] = {
    "chatml": Family(CHATML, _plainly(_IM_END), _IM_END),
    "smollm2": Family(SMOLLM2, _plainly(_IM_END), _IM_END),
    "llama3": Family(
        LLAMA3,
        lambda m, _: (_calls(m, "parameters") or [m["content"].strip()])[0] + "<|eot_id|>",
        **_LLAMA3,
        has_tools=True,
    ),
    "qwen2.5": Family(QWEN25, lambda m, _: _in_tags(m) + _IM_END, _IM_END, has_tools=True),
    "qwen3": Family(QWEN3, _qwen3_answer, _IM_END, has_tools=True, alternates=True, rewrites=True),
    "gemma3": Family(GEMMA3, _plainly("<end_of_turn>", strips=True), **_GEMMA, alternates=True),
    "mistral": Family(MISTRAL, _mistral_answer, **_MISTRAL, has_tools=True, alternates=True),
    "phi3": Family(
        PHI3,
        lambda m, is_last: m["content"] + "<|end|>" + ("\n<|endoftext|>" if is_last else ""),
        "<|endoftext|>",
        marks=_PHI3_MARKS,
    ),
    "phi4": Family(PHI4, _plainly(_IM_END), _IM_END, marks=("<|im_sep|>",)),
    "glm4.5": Family(
        GLM45,
        _glm45_answer,
        "<|endoftext|>",
        marks=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        stops=("<|user|>", "<|observation|>"),
        has_tools=True,
        alternates=True,
    ),
    "apertus": Family(
        APERTUS,
        _plainly("<|assistant_end|>"),
        "<|assistant_end|>",
        bos="<s>",
        marks=("<|assistant_start|>", "<|user_start|>", "<|user_end|>", "<|system_start|>", "<|system_end|>"),
    ),
    "apriel": Family(
        APRIEL, _plainly("\n<|end|>"), "<|end|>", marks=("<|user|>", "<|assistant|>", "<|system|>"), alternates=True
    ),
    "command": Family(
        COMMAND,
        _command_answer,
        "<|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>",
        marks=(
            "<|START_OF_TURN_TOKEN|>",
            "<|CHATBOT_TOKEN|>",
            "<|USER_TOKEN|>",
            "<|SYSTEM_TOKEN|>",
            "<|START_RESPONSE|>",
            "<|END_RESPONSE|>",
            "<|START_ACTION|>",
            "<|END_ACTION|>",
        ),
        has_tools=True,
    ),
}
"""By family."""


def _named_mistral(message: Message, _is_last: bool) -> str:
    content = message["content"].strip()
    calls = _calls(message, "arguments")
    said = " " + content if content or not calls else ""
    return said + (f"[TOOL_CALLS] [{', '.join(calls)}]" if calls else "") + "</s>"


def _named_llama3(message: Message, _is_last: bool) -> str:
    content, calls = message["content"], _calls(message, "parameters")
    said = content.strip() + ("\n" if content and calls else "")
    return said + "\n".join(calls) + "<|eot_id|>"


_OURS: dict[str, Family] = {
    "chatml": Family(named_template("chatml"), lambda m, _: _in_tags(m) + _IM_END, _IM_END, has_tools=True),
    "llama3": Family(named_template("llama3"), _named_llama3, **_LLAMA3, has_tools=True),
    "gemma": Family(named_template("gemma"), _plainly("<end_of_turn>", strips=True), **_GEMMA),
    "mistral": Family(named_template("mistral"), _named_mistral, **_MISTRAL, has_tools=True, alternates=True),
    "phi": Family(named_template("phi"), _plainly("<|end|>"), "<|end|>", marks=_PHI3_MARKS),
    "plain": Family(named_template("plain"), lambda m, _: " " + m["content"].strip() + "</s>", "</s>", bos="<s>"),
}
NAMED = {f"named {name}": _OURS[name] for name in CHAT_TEMPLATES}
"""By name, the templates that dist-ft brings along."""

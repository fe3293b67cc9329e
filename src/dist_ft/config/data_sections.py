"""The section `data`: sources, curation, limits, and how workers read prepared data."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from dist_ft.config.section import Pattern, Section

CHAT_TEMPLATES = ("chatml", "gemma", "llama3", "mistral", "phi", "plain")
"""Names of the templates in `model/chat/chat_templates/`."""
Column = Literal[
    "messages", "tools", "conversations", "system", "prompt", "completion", "instruction", "input", "output", "history",
    "text", "chosen", "rejected", "label",
]  # fmt: skip


def _filled_with(*names: str) -> AfterValidator:
    """Return a check that a text has no other places to fill than these: `{instruction}`; `{{` is a brace."""

    def check(text: str) -> str:
        places = ", ".join(f"{{{name}}}" for name in names)
        try:
            found = [part[1:] for part in string.Formatter().parse(text) if part[1] is not None]
        except ValueError as error:
            raise ValueError(f"{text!r} is no format: {error}; write {{{{ and }}}} for braces, and {places}") from error
        if wrong := [name for name, spec, conversion in found if name not in names or spec or conversion]:
            raise ValueError(f"{{{wrong[0]}}} cannot be filled in; there is {places}, and {{{{ is a brace")
        return text

    return AfterValidator(check)


class PromptFormat(Section):
    """Sets how a row of instruction, input and output becomes plain text. Keys and defaults are Axolotl's."""

    system: str = ""
    """System prompt of rows that have none of their own; empty writes none."""
    system_format: Annotated[str, _filled_with("system")] = "{system}"
    """Stands in front, if there is a system prompt."""
    format: Annotated[str, _filled_with("instruction", "input")] = "{instruction} {input} "
    """Prompt of a row with an input."""
    no_input_format: Annotated[str, _filled_with("instruction")] = "{instruction} "
    """Prompt of a row without one."""
    answer_format: Annotated[str, _filled_with("output")] = "{output}"
    """What is learnt; the token that ends a text stands behind."""


def _kind_of_prompt(value: str | dict[str, str] | PromptFormat) -> str:
    return "a format" if isinstance(value, dict | PromptFormat) else "a name"


PromptName = Literal["alpaca", "alpaca_chat", "alpaca_chatml", "alpaca_phi", "jeopardy"]
RowBound = Annotated[int, Field(ge=0)] | Annotated[str, Field(pattern=r"^(100|\d{1,2}(\.\d+)?)%$")] | None
"""A number of rows, or a percentage of all rows of a source."""


class RowSource(Section):
    """Names the files of rows and their format."""

    source: str
    """A file (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .feather, .txt; text also with .gz, .bz2, .xz, .zst), a
    folder of files of one kind, a pattern such as `data/*.jsonl`, each also as a URL (`s3://`, `gs://`, `az://`,
    `https://`, `hf://datasets/org/name/…`), a Hugging Face data set by path or by id such as `org/name`, or an embedded
    one such as `embedded:orders/train`."""
    format: Literal[
        "auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text", "preference", "labelled"
    ] = "auto"  # fmt: skip
    """How a row is written; `auto` looks at its keys."""
    rows: Annotated[list[RowBound], Field(min_length=2, max_length=2)] | None = None
    """Rows to use, as first and one more than the last, counted from 0 over all files in order: numbers or
    percentages, such as `[0, 500]` or `["0%", "1%"]`; null as the second is the end. Null uses all."""
    prompt: (
        Annotated[
            Annotated[PromptName, Tag("a name")] | Annotated[PromptFormat, Tag("a format")],
            Discriminator(_kind_of_prompt),
        ]
        | None
    ) = None
    """Write rows of format `alpaca` as plain text, in place of turns of a chat template: with the headings of Stanford
    Alpaca (`alpaca`), with other marks, or in a format of your own. Null writes turns. See docs/data.md."""
    columns: dict[Column, str] = {}
    """Names of a format's keys to those of the file, such as `{messages: dialog}`."""
    ignore: list[str] = []
    """Keys of rows, turns, parts of contents and calls that are not looked at, such as `[images, label]`: those that
    would be refused or warned of, where what is left is still right."""
    name: str | None = None
    """Configuration of a Hugging Face data set; null is its default."""
    split: str | None = None
    """Split of a Hugging Face data set; null is `train`."""
    revision: str | None = None
    """Commit, tag or branch of a hub id; null is the default branch. Name a commit to be able to resume for ever."""


class SourceConfig(RowSource):
    """One training source."""

    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the sequences of the stream (normalised). Null on all sources: every sample once an epoch."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Most training rows to use, after `data.curation`. The sample follows from a hash of the rows' content, not from
    the order of the file. Null uses all."""


def _checked_set_name(name: str) -> str:
    if not _SET_NAME.fullmatch(name) or name in _METRIC_GROUPS:
        raise ValueError(
            f"{name[:60]!r} cannot name a held-out set: take up to 40 letters, digits, `_`, `-` and `.`, beginning "
            f"with a letter or a digit, and not {' or '.join(_METRIC_GROUPS)}, with which names of metrics begin"
        )
    return name


_SET_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
_METRIC_GROUPS = ("rewards", "logps")


class HeldOutSets(Section):
    """Held-out sources that are measured each by itself, and all together."""

    sources: Annotated[dict[Annotated[str, AfterValidator(_checked_set_name)], RowSource], Field(min_length=1)]
    """Source of each set by its name, such as `{orders: {source: orders.jsonl}, chat: {source: chat.jsonl}}`. The
    numbers of a set carry its name, such as `orders/eval_loss`; those without a name are of all rows together."""


def _kind_of_held_out(value: str | float | dict[str, str] | RowSource | HeldOutSets) -> str:
    if isinstance(value, HeldOutSets) or (isinstance(value, dict) and "sources" in value):
        return "sets"
    if isinstance(value, dict | RowSource):
        return "a source"
    return "a path" if isinstance(value, str) else "a count" if isinstance(value, int) else "a fraction"


HeldOut = Annotated[
    Annotated[str, Tag("a path")]
    | Annotated[float, Field(gt=0, lt=1), Tag("a fraction")]
    | Annotated[int, Field(ge=1), Tag("a count")]
    | Annotated[RowSource, Tag("a source")]
    | Annotated[HeldOutSets, Tag("sets")],
    Discriminator(_kind_of_held_out),
]
"""The members are told apart by type, so that an error message speaks of the one that was meant."""


class LoaderConfig(Section):
    """Sets how workers read prepared data from an object store. On a file system, they read it in place."""

    cache_dir: str | None = None
    """Directory on each machine for copies of token shards; null is a folder in the user's cache directory."""
    cache_gib: Annotated[float, Field(gt=0)] = 50.0
    """Largest size of the copies on a machine's disk, in GiB. The least recently used go first."""
    prefetch_steps: Annotated[int, Field(ge=0)] = 2
    """Number of steps to prepare ahead of the one that is computed."""
    max_tries: Annotated[int, Field(ge=1)] = 6
    """Tries to read a shard. The wait between two tries starts at half a second and doubles."""
    replicas: list[str] = []
    """Paths or URLs that hold the same prepared data. Workers try them when `data.cache_dir` fails."""


class TextRule(Section):
    """A pattern and the role whose texts it searches."""

    pattern: Pattern
    """Regular expression, searched in each text."""
    role: Literal["any", "system", "developer", "user", "assistant", "tool"] = "any"
    """Whose texts; a prompt counts as the user's, and what follows it as the assistant's."""


class CurationConfig(Section):
    """Sets rules that leave out training rows. Held-out rows stay. The rows left out are counted by rule."""

    min_characters: Annotated[int, Field(ge=1)] | None = None
    """Fewest characters of all texts of a row."""
    max_characters: Annotated[int, Field(ge=1)] | None = None
    """Most characters of all texts of a row. Tokens are `data.seq_len` and `data.long_samples: drop`."""
    min_turns: Annotated[int, Field(ge=1)] | None = None
    """Fewest turns of a conversation. Raw text has no turns and always passes."""
    max_turns: Annotated[int, Field(ge=1)] | None = None
    """Most turns of a conversation."""
    drop: list[TextRule] = []
    """Leave out rows in which any of these is found."""
    require: list[TextRule] = []
    """Leave out rows in which one of these is not found."""
    exact: bool = False
    """Leave out rows that say the same as an earlier one, over all sources in order."""
    near: Annotated[float, Field(ge=0.5, le=1)] | None = None
    """Leave out rows that are similar to an earlier one. The value is the share of runs of three words that two rows
    have in common, such as 0.8. Instructions are not compared. Null compares none."""
    against_eval: bool = False
    """Leave out training rows that equal a held-out row or, with `near`, are similar to one."""

    @property
    def is_on(self) -> bool:
        """Whether any rule is set."""
        return self != CurationConfig()


Share = Annotated[float, Field(ge=0, le=1)]


class LimitsConfig(Section):
    """Shares from which on a finding of `dist-ft data check` is an error. Null, here and below, sets no limit."""

    exact_copies: Share | None = None
    """Training rows that equal an earlier one."""
    near_copies: Share | None = None
    """Training rows that are similar but not equal to an earlier one."""
    leaked: Share | None = None
    """Held-out rows that equal a training row or are similar to one."""
    personal: Share | None = None
    """Rows of a split with personal data or secrets, after `data.redact`."""
    untrained: Share | None = None
    """Rows of a split without a trained token."""
    long: Share | None = None
    """Samples of a split that are longer than `data.seq_len`."""
    bad: Share | None = None
    """Rows of a split that cannot be used."""
    empty_answers: Share | None = None
    """Rows of a split with an empty answer."""
    repeated_answers: Share | None = None
    """Training rows whose answer many other rows share."""
    one_sided_lengths: Share | None = None
    """Pairs of a split whose longer answer is on the side where it is more often."""
    one_sided_labels: Share | None = None
    """Labelled answers of a split with the label that is more frequent."""


class DataConfig(Section):
    """Sets the data on which the model is trained and measured."""

    train: Annotated[list[SourceConfig], Field(min_length=1)]
    """Training sources."""
    eval: HeldOut | None = None
    """Held-out data: a source (as a path, or with the keys of a training source), several of them by name as
    `{sources: {NAME: {source: …}}}`, a fraction (0.05) or a number (200) of the rows of all training sources, or null
    for none. A row's side follows from its content. With a fraction it stays when the data grows; a number holds out
    the rows whose hashes are the lowest, which new rows may push out."""
    group_by: Annotated[str, Field(min_length=1)] | None = None
    """Column, by the file's name, whose rows of equal value fall on the same side of a held-out fraction or number."""
    seq_len: Annotated[int, Field(ge=8)] = 2048
    """Longest sequence in tokens."""
    long_samples: Literal["truncate", "drop", "error", "split"] = "truncate"
    """How to treat a sample longer than seq_len: cut its end, leave it out, fail, or split it into consecutive pieces.
    The first token of a piece is not trained."""
    bad_rows: Literal["error", "skip"] = "error"
    """How to treat a row that cannot be used: fail with an error that names it, or leave it out, count it, and write it
    to `quarantine.jsonl` beside the prepared data."""
    packing: bool = True
    """Join short samples into one sequence. They do not attend to one another."""
    preparation: Literal["ahead", "stream"] = "ahead"
    """When rows become token shards: all before the first step, or from the first window of shards on while training
    goes on, which needs train.max_steps. The order of samples is the same."""
    part_mib: Annotated[float, Field(gt=0)] = 32.0
    """MiB of a source, as stored, that become one token shard: what a machine prepares at a time. Files that cannot be
    cut are larger parts; small ones are joined."""
    cache_dir: str | None = None
    """Where token shards are kept: a path that all machines see, or a URL such as `s3://bucket/cache`. Null is
    `.dist-ft-cache/data` in run.output_dir."""
    exhaust: Literal["first", "all", "repeat"] = "all"
    """When an epoch ends, with weights: `first`, as soon as one source is used up; `all`, when every source has been
    used up once, the shorter ones being repeated; `repeat`, never, which needs train.max_steps."""
    shuffle: bool = True
    """Shuffle with `run.seed`. False is a curriculum: each epoch takes every source in its own order."""
    loader: LoaderConfig = LoaderConfig()
    """How workers read prepared data."""
    curation: CurationConfig = CurationConfig()
    """Which training rows are left out."""
    redact: list[Literal["email", "phone", "card", "iban", "api_key", "private_key"]] = []
    """Kinds of personal data and secrets to replace by `<EMAIL>`, `<PHONE>` and so on, in held-out texts too.
    See docs/data-check.md for what is found."""
    limits: LimitsConfig = LimitsConfig()
    """When `dist-ft data check` fails."""
    chat_template: str | None = None
    """In place of the tokenizer's own template: a name (`chatml`, `gemma`, `llama3`, `mistral`, `phi`, `plain`), the
    path of a Jinja file, or Jinja text (whatever holds `{{` or `{%`). See docs/templates.md."""
    train_on: Literal["assistant", "last", "turns", "last_turn", "all", "completion"] = "assistant"
    """Which tokens are trained: those of all assistant turns, of the last one only, the same with the white space that
    the template writes behind an answer (`turns`, `last_turn`: LLaMA-Factory's rule), or every one. `completion` is
    TRL's: `turns` of rows that have a prompt apart, and every token of the others. A turn's `"weight": 0` leaves it
    out, save where every token is trained."""

    @property
    def curates(self) -> bool:
        """Whether rows are left out by `curation` or `max_rows`."""
        return self.curation.is_on or any(source.max_rows is not None for source in self.train)

    @property
    def part_bytes(self) -> int:
        """`part_mib` in bytes."""
        return max(1, int(self.part_mib * 2**20))

    @property
    def template_path(self) -> str | None:
        """The file that `chat_template` names; None when it is a name, Jinja text or null."""
        template = self.chat_template
        if template is None or template in CHAT_TEMPLATES or "{{" in template or "{%" in template:
            return None
        return template

    @property
    def weights(self) -> list[float] | None:
        """Weights of the training sources; None when every sample is to be used once an epoch."""
        weights = [source.weight for source in self.train if source.weight is not None]
        return weights or None

    @property
    def eval_sources(self) -> dict[str, RowSource]:
        """The held-out sources by the key that holds each; none where rows of the training sources are held out."""
        if isinstance(self.eval, str):
            return {"data.eval": RowSource(source=self.eval)}
        if isinstance(self.eval, HeldOutSets):
            return {f"data.eval.sources.{name}": source for name, source in self.eval.sources.items()}
        return {"data.eval": self.eval} if isinstance(self.eval, RowSource) else {}

    @property
    def eval_names(self) -> list[str]:
        """Names of the held-out sets, in the order of `eval_sources`; none for a single one, which has no name."""
        return [*self.eval.sources] if isinstance(self.eval, HeldOutSets) else []

    def held_out_at(self, addresses: Sequence[str | None]) -> HeldOut | None:
        """Return `eval` with other addresses of its sources, in the order of `eval_sources`."""
        moved = [
            source.model_copy(update={"source": address})
            for source, address in zip(self.eval_sources.values(), addresses, strict=True)
        ]
        if isinstance(self.eval, HeldOutSets):
            return HeldOutSets(sources=dict(zip(self.eval.sources, moved, strict=True)))
        return self.eval if not moved else moved[0].source if isinstance(self.eval, str) else moved[0]

    @property
    def eval_fraction(self) -> float | None:
        """The fraction of the training rows that is held out; None for anything else."""
        return self.eval if isinstance(self.eval, float) else None

    @property
    def eval_count(self) -> int | None:
        """The number of training rows that are held out; None for anything else."""
        return self.eval if isinstance(self.eval, int) else None

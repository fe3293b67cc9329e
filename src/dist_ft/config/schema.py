"""The run config: one frozen schema, the only place where defaults live.

Reading files and overrides is `load.py`; rules that join sections are `rules.py`. Validators check and never
change a value; whatever is derived is a property.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from dist_ft.storage.urls import is_url


def _compiled(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    return pattern


DType = Literal["float32", "bfloat16", "fp32", "bf16"]
Pattern = Annotated[str, Field(min_length=1), AfterValidator(_compiled)]
Beta = Annotated[float, Field(ge=0, lt=1)]
SteeringMetric = Literal["eval_loss", "token_accuracy"]
CHAT_TEMPLATES = ("chatml", "gemma", "llama3", "mistral", "phi", "plain")
"""Names of the templates in `model/chat/chat_templates/`."""
_LONG_DTYPE = {"fp32": "float32", "bf16": "bfloat16"}


class Section(BaseModel):
    """A part of the config: frozen, unknown keys rejected, no silent type conversion."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class RunConfig(Section):
    """What the run is called and where it lives."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Run id and name of the run directory. Default: the config file's stem."""
    output_dir: str = "runs"
    """Parent of the run directory: a path that all machines of the cluster see, or a URL such as `s3://bucket/runs`."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds order, dropout and adapter initialisation."""

    @property
    def address(self) -> str:
        """Path or URL of the run directory."""
        if is_url(self.output_dir):
            return f"{self.output_dir.rstrip('/')}/{self.name}"
        return str(Path(self.output_dir).absolute() / self.name)


class ModelConfig(Section):
    """The base model."""

    name: str
    """Hub id, path of a model directory, or an embedded model: `smollm2-135m-instruct`, `tiny-random`."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; null is the default branch."""
    commit: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = None
    """Commit of a hub model. Null: what `revision` is when the run starts; it is written here in the run's own
    config, and whoever goes on with the run uses it, however far the branch has moved."""
    dtype: DType = "bfloat16"
    """Dtype of weights and computation. Masters, moments and gradient accumulation are always float32."""
    config_overrides: dict[str, bool | int | float | str | None] = {}
    """Numbers, words and flags in place of those in the model's config.json, such as `{attn_pdrop: 0.0}`. An export
    of all weights holds them; whoever uses an adapter must set what changes the computation, too."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""
    trust_remote_code: bool = False
    """Run Python code that the model brings along. Off, because it is somebody else's program."""

    @property
    def torch_dtype(self) -> str:
        """`float32` or `bfloat16`."""
        return _LONG_DTYPE.get(self.dtype, self.dtype)


class MethodConfig(Section):
    """Which weights are trained. The keys are PEFT's."""

    kind: Literal["full", "lora"] = "lora"
    """`full` trains every parameter, `lora` low-rank adapters (Hu et al. 2021)."""
    r: Annotated[int, Field(ge=1)] = 16
    """Rank of the adapter matrices."""
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale: the update is multiplied by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapter's input, one mask a sequence."""
    use_rslora: bool = False
    """LoRA only: multiply by lora_alpha / sqrt(r) instead, so that large ranks train as fast (Kalajdzievski 2023)."""
    use_dora: bool = False
    """LoRA only: train the length of each weight vector apart from its direction (Liu et al. 2024)."""
    target_modules: Pattern | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Module names to adapt, a regular expression that whole names must match, or `all-linear`: all linear layers but
    the output layer."""
    layers_to_transform: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    """LoRA only: indexes of the layers to adapt, with `target_modules` as a list. Null adapts all."""
    modules_to_save: list[Annotated[str, Field(min_length=1)]] = []
    """LoRA only: modules that are trained whole beside the adapter, such as `lm_head`. As in PEFT every module
    whose name ends so is meant."""
    freeze: list[Pattern] = []
    """Full only: parameters that stay as they are, as regular expressions searched in their names."""
    init_from: str | None = None
    """Directory of a PEFT LoRA adapter to go on from instead of fresh matrices. The keys of this section that are left
    out are the adapter's."""


Column = Literal[
    "messages", "tools", "conversations", "system", "prompt", "completion", "instruction", "input", "output", "history",
    "text",
]  # fmt: skip


class RowSource(Section):
    """Where rows are, and how they are written."""

    source: str
    """A file (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .feather, .txt; text also with .gz, .bz2, .xz, .zst), a
    folder of files of one kind, a pattern such as `data/*.jsonl`, each also as a URL (`s3://`, `gs://`, `az://`,
    `https://`, `hf://datasets/org/name/…`), a Hugging Face data set by path or by id such as `org/name`, or an embedded
    one such as `embedded:orders/train`."""
    format: Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text"] = "auto"
    """How a row is written; `auto` looks at its keys."""
    columns: dict[Column, str] = {}
    """Names of a format's keys to those of the file, such as `{messages: dialog}`."""
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
    """Most training rows used of it, after `data.curation`: a sample by a hash of what rows say, so that it does not
    follow the order of the file. Null uses all."""


def _kind_of_held_out(value: Any) -> str:
    if isinstance(value, dict | RowSource):
        return "a source"
    return "a fraction" if isinstance(value, int | float) else "a path"


HeldOut = Annotated[
    Annotated[str, Tag("a path")]
    | Annotated[float, Field(gt=0, lt=1), Tag("a fraction")]
    | Annotated[RowSource, Tag("a source")],
    Discriminator(_kind_of_held_out),
]
"""Told apart by type, so that a mistake is explained as what was meant."""


class LoaderConfig(Section):
    """How workers read prepared data that lies in an object store. On a file system it is read where it lies."""

    cache_dir: str | None = None
    """Directory on each machine for copies of token shards; null is a folder in the user's cache directory."""
    cache_gib: Annotated[float, Field(gt=0)] = 50.0
    """Most of a machine's disk that the copies take, in GiB; those not used for longest go first."""
    prefetch_steps: Annotated[int, Field(ge=0)] = 2
    """Steps whose batches are made ready while one is computed."""
    max_tries: Annotated[int, Field(ge=1)] = 6
    """Tries to read a shard, each after twice the wait of the one before, from half a second on."""
    replicas: list[str] = []
    """Further places (paths or URLs) that hold the same prepared data, tried where `data.cache_dir` fails."""


class TextRule(Section):
    """A pattern, and whose texts it looks at."""

    pattern: Pattern
    """Regular expression, searched in each text."""
    role: Literal["any", "system", "developer", "user", "assistant", "tool"] = "any"
    """Whose texts; a prompt counts as the user's, and what follows it as the assistant's."""


class CurationConfig(Section):
    """Which training rows are left out. Held-out rows are never touched, and what is left out is counted by rule."""

    min_characters: Annotated[int, Field(ge=1)] | None = None
    """Fewest characters of all texts of a row."""
    max_characters: Annotated[int, Field(ge=1)] | None = None
    """Most characters of all texts of a row. Tokens are `data.seq_len` and `data.long_samples: drop`."""
    min_turns: Annotated[int, Field(ge=1)] | None = None
    """Fewest turns of a conversation; raw text has none and is not looked at."""
    max_turns: Annotated[int, Field(ge=1)] | None = None
    """Most turns of a conversation."""
    drop: list[TextRule] = []
    """Rows are left out in which one of these is found."""
    require: list[TextRule] = []
    """Rows are left out in which not every one of these is found."""
    exact: bool = False
    """Leave out rows that say the same as an earlier one, over all sources in order."""
    near: Annotated[float, Field(ge=0.5, le=1)] | None = None
    """Leave out rows that are alike an earlier one: the share of their runs of three words that both have, such as
    0.8. Instructions are not compared. Null: none."""
    against_eval: bool = False
    """Leave out training rows that equal a held-out row, or with `near` are alike one."""

    @property
    def is_on(self) -> bool:
        """Whether anything is asked for."""
        return self != CurationConfig()


Share = Annotated[float, Field(ge=0, le=1)]


class LimitsConfig(Section):
    """From which share on what `dist-ft data check` finds is an error. Null, here and below: no limit."""

    exact_copies: Share | None = None
    """Training rows that equal an earlier one."""
    near_copies: Share | None = None
    """Training rows that are alike an earlier one, the equal ones aside."""
    leaked: Share | None = None
    """Held-out rows that equal a training row or are alike one."""
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
    """Training rows whose answer many others give, too."""


class DataConfig(Section):
    """What the model is trained and measured on."""

    train: Annotated[list[SourceConfig], Field(min_length=1)]
    """Training sources."""
    eval: HeldOut | None = None
    """Held-out data: a source (as a path, or with the keys of a training source), a fraction of the rows of all
    training sources, or null for none. A row's side follows from its content, so it stays when the data grows."""
    group_by: Annotated[str, Field(min_length=1)] | None = None
    """Column, by the file's name, whose rows of equal value fall on the same side of the held-out fraction."""
    seq_len: Annotated[int, Field(ge=8)] = 2048
    """Longest sequence in tokens."""
    long_samples: Literal["truncate", "drop", "error", "split"] = "truncate"
    """What becomes of a sample longer than seq_len: cut at the end, left out, an error, or made into consecutive pieces
    (the first token of a piece is not trained)."""
    bad_rows: Literal["error", "skip"] = "error"
    """What becomes of a row that cannot be used: an error that names it, or it is left out, counted, and written to
    `quarantine.jsonl` beside the prepared data."""
    packing: bool = True
    """Join short samples into one sequence; they do not see one another."""
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
    """With weights, when an epoch ends: as soon as one source is used up; when every source has been used up, the
    others being repeated; or never, which needs train.max_steps."""
    shuffle: bool = True
    """Seeded order. False is a curriculum: every source in its own order, in each epoch."""
    loader: LoaderConfig = LoaderConfig()
    """How workers read prepared data."""
    curation: CurationConfig = CurationConfig()
    """Which training rows are left out."""
    redact: list[Literal["email", "phone", "card", "iban", "api_key", "private_key"]] = []
    """Kinds of personal data and secrets that `<EMAIL>`, `<PHONE>` and so on stand for in all texts, held-out ones too.
    See docs/data-check.md for what is found."""
    limits: LimitsConfig = LimitsConfig()
    """When `dist-ft data check` fails."""
    chat_template: str | None = None
    """In place of the tokenizer's own template: a name (`chatml`, `gemma`, `llama3`, `mistral`, `phi`, `plain`), the
    path of a Jinja file, or Jinja text (whatever holds `{{` or `{%`). See docs/templates.md."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens are trained: those of all assistant turns, of the last one only, or every one. A turn's
    `"weight": 0` leaves it out, save with `all`."""

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
    def eval_source(self) -> RowSource | None:
        """The held-out source; None for a fraction, or nothing."""
        if isinstance(self.eval, str):
            return RowSource(source=self.eval)
        return self.eval if isinstance(self.eval, RowSource) else None

    @property
    def eval_fraction(self) -> float | None:
        """The fraction of the training rows that is held out; None for a source, or nothing."""
        return self.eval if isinstance(self.eval, float) else None


class TrainConfig(Section):
    """Batch, length and memory of the run."""

    global_batch_size: Annotated[int, Field(ge=1)] = 32
    """Sequences per optimizer step over all workers; constant over a run."""
    micro_batch_size: Annotated[int, Field(ge=1)] = 1
    """Sequences per worker and pass; changes memory and speed, never the result. A worker whose memory is known
    (a GPU, or `cluster.memory_per_worker`) takes fewer where so many are estimated not to fit."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps; wins over `epochs`."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the data, may be fractional."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


class EarlyStopping(Section):
    """When a run ends before its last step."""

    metric: SteeringMetric = "eval_loss"
    """What is looked at; perplexity goes with `eval_loss`."""
    patience: Annotated[int, Field(ge=1)]
    """Evaluations in a row without improvement after which the run is complete."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """An improvement is more than this."""


class EvalConfig(Section):
    """Measurements on the held-out data."""

    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between held-out losses; null measures before the first and after the last step only."""
    early_stopping: EarlyStopping | None = None
    """End the run when the held-out data gets no better; null runs all steps. The decision depends on the numbers
    measured so far and on nothing else, so a run that fails or is resized on the way ends at the same step."""
    best_metric: SteeringMetric | None = None
    """Keep the checkpoint that is best by this, and export it as `exports/best`. Null keeps the last ones only."""
    metrics: list[Literal["exact_match", "json_valid", "json_fields", "rouge_l", "bleu", "regex"]] = []
    """Metrics of generated answers, measured on the base model and on the result. json_valid: the answer is one JSON
    object or array; json_fields: share of the fields of the reference's object that are equal; rouge_l: F1; bleu: of
    all answers together, 0 to 100; regex: see below."""
    regex: Pattern | None = None
    """Pattern of the metric `regex`: its first match in the answer must equal the one in the reference (its groups,
    where it has any); where the reference has none, any match will do."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    """Longest generated answer."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Held-out rows used for generated answers; null uses all."""


class GroupConfig(Section):
    """Settings of the parameters whose names match."""

    pattern: Pattern
    """Regular expression, searched in the name of a trained parameter."""
    lr: Annotated[float, Field(ge=0)] | None = None
    """Peak learning rate; null is `optimizer.lr`. The schedule scales it like the other."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Decoupled decay, also of norms and biases; null keeps the rule of `optimizer.weight_decay`."""


class OptimizerConfig(Section):
    """AdamW (Loshchilov and Hutter 2017)."""

    lr: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay of matrices; norms and biases are not decayed unless `groups` says so."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    """Decay rates of the two moments."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Clip the global gradient norm to this; 0 does not clip."""
    groups: list[GroupConfig] = []
    """Parameters with settings of their own; the first pattern that matches a name decides."""


class ScheduleConfig(Section):
    """Learning rate over the run."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps over which the rate rises from zero."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Final rate as a share of the peak."""


class ZeroConfig(Section):
    """How DeepSpeed shards state (Rajbhandari et al. 2019)."""

    stage: Annotated[int, Field(ge=0, le=3)] = 2
    """0 nothing, 1 optimizer state, 2 also gradients, 3 also weights."""
    offload: bool = False
    """Keep optimizer state (and at stage 3 weights) in host memory. Needs a GPU."""


class ClusterConfig(Section):
    """Machines and workers."""

    address: str | None = None
    """Ray address; null starts a Ray on this machine."""
    num_workers: Annotated[int, Field(ge=1)] | Annotated[list[int], Field(min_length=2, max_length=2)] = 1
    """Workers, or `[min, max]`."""
    resources_per_worker: dict[str, float] | None = None
    """Ray resources of a worker. Null: one GPU where the cluster has any, else one CPU."""
    memory_per_worker: Annotated[float, Field(gt=0)] | None = None
    """Memory a worker may use, in GiB. Null: all of its GPU; on CPUs it is not looked at."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """How long to wait for resources that exist but are busy."""
    allowed_sizes: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] | None = None
    """Worker counts that the run may have, within num_workers. Null: every one."""
    grow_after_s: Annotated[float, Field(ge=0)] | None = 30.0
    """New machines must have been there for so long before the run grows on to them; null: it never grows while it
    runs. Machines that are about to leave are left at once."""
    grow_if_it_pays: bool = True
    """Grow only when the steps that are left gain more time than a resize costs, both as measured in this run."""

    @property
    def min_workers(self) -> int:
        """Fewest workers the run goes on with."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def max_workers(self) -> int:
        """Most workers the run uses."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]


class PhaseLimits(Section):
    """Seconds that a rank may spend in a phase before it counts as hung."""

    start_s: Annotated[float, Field(gt=0)] = 600.0
    """From the group's start to the rank's first word."""
    load_s: Annotated[float, Field(gt=0)] | None = None
    """Loading model and checkpoint. Null, here and below: ten times the longest so far, at least ten minutes; an hour
    or two while there was none."""
    data_s: Annotated[float, Field(gt=0)] | None = None
    """Waiting for a token shard that is not there yet, in `data.preparation: stream`."""
    first_step_s: Annotated[float, Field(gt=0)] | None = None
    """The first step, which compiles and allocates."""
    step_s: Annotated[float, Field(gt=0)] | None = None
    """A step. Null: three median steps and ten seconds."""
    evaluate_s: Annotated[float, Field(gt=0)] | None = None
    """An evaluation."""
    save_s: Annotated[float, Field(gt=0)] | None = None
    """Writing slices."""
    drain_s: Annotated[float, Field(gt=0)] = 3600.0
    """Waiting for the last commit."""
    silence_s: Annotated[float, Field(gt=0)] = 60.0
    """In any phase: without a sign of life from the rank's supervisor, which gives one several times a second. A
    supervisor that gets no answer for so long, and does not reach the head either, ends itself and its rank."""


class FailureConfig(Section):
    """What happens after a failure."""

    max_restarts: Annotated[int, Field(ge=0)] = 20
    """Restarts after a crash or a hang before the run gives up. Errors of the user or of the data are never retried."""
    max_node_losses: Annotated[int, Field(ge=0)] = 1000
    """Restarts after the loss of a machine. A machine that gives notice costs none of these."""
    max_out_of_memory: Annotated[int, Field(ge=0)] = 2
    """Restarts after a rank ran out of memory: seldom a passing thing."""
    bad_numbers: Literal["fail", "rollback", "skip_batch"] = "fail"
    """After a loss or gradient norm that is not finite, or a spike: end the run; go back to the last checkpoint and
    try again, which cures a passing fault of the hardware; or go back and leave out the update of that step."""
    max_bad_numbers: Annotated[int, Field(ge=1)] = 3
    """Roll-backs or skipped steps before the run gives up."""
    spike_factor: Annotated[float, Field(gt=1)] | None = None
    """A loss of more than so many times the median of the last 50 is a spike. Null: none is."""
    max_same_step: Annotated[int, Field(ge=1)] = 3
    """Failures in a row without a new step after which the run gives up."""
    backoff_s: Annotated[float, Field(ge=0)] = 2.0
    """Wait before a second restart at the same step; doubles up to a minute. The first restart does not wait."""
    limits: PhaseLimits = PhaseLimits()
    """When a rank counts as hung."""


class CheckpointConfig(Section):
    """When state is kept."""

    every_steps: Annotated[int, Field(ge=1)] | None = 50
    """Steps between checkpoints; null keeps the last one only. The last step always makes one."""
    in_background: bool = True
    """Write while training goes on, from a copy in host memory (12 bytes a trained parameter over all workers). A
    checkpoint that is due while the one before is still being written is left out. False: training waits for the
    disk, and none is left out."""
    keep_last: Annotated[int, Field(ge=1)] = 2
    """Committed checkpoints to keep; the best one (`eval.best_metric`) stays besides."""


class MonitorConfig(Section):
    """Where numbers go besides metrics.jsonl."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """`auto` is online with WANDB_API_KEY set and offline without."""
    project: str = "dist-ft"
    """W&B project."""


class Config(Section):
    """One run, whole."""

    run: RunConfig
    """What the run is called and where it lives."""
    model: ModelConfig
    """The base model."""
    method: MethodConfig = MethodConfig()
    """Which weights are trained."""
    data: DataConfig
    """Training and held-out data."""
    train: TrainConfig = TrainConfig()
    """Batch, length and memory."""
    eval: EvalConfig = EvalConfig()
    """Measurements."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW."""
    schedule: ScheduleConfig = ScheduleConfig()
    """Learning rate over the run."""
    zero: ZeroConfig = ZeroConfig()
    """Sharding."""
    cluster: ClusterConfig = ClusterConfig()
    """Machines and workers."""
    failure: FailureConfig = FailureConfig()
    """After a failure."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When state is kept."""
    monitor: MonitorConfig = MonitorConfig()
    """Where numbers go."""

    @model_validator(mode="after")
    def _check_worker_range(self) -> Config:
        if not 1 <= self.cluster.min_workers <= self.cluster.max_workers:
            raise ValueError(
                f"cluster.num_workers={self.cluster.num_workers} is not [min, max] with 1 <= min <= max; "
                "write for example cluster.num_workers=[1, 4]"
            )
        return self

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage that is run.

        bfloat16 at stage 0 runs as stage 1: DeepSpeed's own path refuses float32 accumulation there and
        counts an Adam step at construction.
        """
        return 1 if self.zero.stage == 0 and self.model.torch_dtype == "bfloat16" else self.zero.stage

"""The sections of what is trained and how: `model`, `method`, `train`, `eval`, `optimizer`, `schedule`, `zero`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)

from dist_ft.config.section import Pattern, Section

QuantizationKind = Literal["nf4", "fp4", "int8"]
DType = Literal["float32", "bfloat16", "fp32", "bf16"]
_LONG_DTYPE = {"fp32": "float32", "bf16": "bfloat16"}
Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]
InterpolatingBetas = Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], Beta], Field(strict=False)]
SteeringMetric = Literal[
    "eval_loss", "token_accuracy", "nll_loss", "rewards/accuracies", "rewards/margins", "rewards/chosen",
    "rewards/rejected", "logps/chosen", "logps/rejected", "kl", "agreement",
]  # fmt: skip
_STEERING: tuple[str, ...] = get_args(SteeringMetric)


def plain_metric(metric: str) -> str:
    """Return the name of a metric without the name of the held-out set that it is of: `orders/eval_loss`."""
    return metric if metric in _STEERING or "/" not in metric else metric.partition("/")[2]


def _checked_metric(metric: str) -> str:
    if plain_metric(metric) not in _STEERING:
        raise ValueError(
            f"{metric[:60]!r} is none of {', '.join(_STEERING)}; before it may stand the name of a held-out set, as "
            "in orders/eval_loss"
        )
    return metric


MeasuredMetric = Annotated[str, AfterValidator(_checked_metric)]
"""A `SteeringMetric`, of all held-out rows or of the set whose name stands before it."""
_REWARDS: tuple[SteeringMetric, ...] = (
    "eval_loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen",
    "logps/rejected",
)  # fmt: skip


class SpecialTokens(Section):
    """Special tokens in place of the tokenizer's own. Each must be in its vocabulary."""

    eos: str | None = None
    """Ends a text, and generation."""
    bos: str | None = None
    """Begins a text, where the template writes it."""
    pad: str | None = None
    """Fills rows up; nothing that is learnt depends on it."""
    unk: str | None = None
    """Stands for what the tokenizer does not know."""
    additional: list[Annotated[str, Field(min_length=1)]] = []
    """Further tokens that a text never falls apart into, and that answers are shown without."""


class QuantizationConfig(Section):
    """Quantises the linear layers of the frozen base under an adapter (QLoRA, Dettmers et al. 2023)."""

    kind: QuantizationKind
    """`nf4`: 4 bits a weight, in blocks of 64; `fp4` alike, with another table of values, which fits weights less well;
    `int8`: 8 bits, a scale a row. Embeddings and output layer stay."""
    double_quant: bool = True
    """4 bits only: quantise the scales of the blocks, too."""
    compute_dtype: DType | None = None
    """4 bits only: dtype in which products are computed; null is `model.dtype`."""

    @property
    def torch_dtype(self) -> str | None:
        """`float32`, `bfloat16`, or None."""
        return None if self.compute_dtype is None else _LONG_DTYPE.get(self.compute_dtype, self.compute_dtype)


class ModelConfig(Section):
    """The base model."""

    name: str
    """Hub id, path of a model directory, or an embedded model: `smollm2-135m-instruct`,
    `smollm2-135m-half` (every second layer of it, a student for distillation), `tiny-random`."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; null is the default branch."""
    commit: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = None
    """Commit of a hub model. Null takes the commit of `revision` when the run starts. The run's own config stores it
    here, so that a resume uses it even if the branch has moved."""
    dtype: DType = "bfloat16"
    """Dtype of weights and computation. Masters, moments and gradient accumulation are always float32."""
    config_overrides: dict[str, bool | int | float | str | None] = {}
    """Numbers, words and flags in place of those in the model's config.json, such as `{attn_pdrop: 0.0}`. An export of
    all weights contains them. With an adapter, set those that change the computation wherever it is used."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers. With `sdpa` the samples of a packed row attend one by one, without
    a mask of [T, T]."""
    quantization: QuantizationConfig | None = None
    """Quantise the frozen base, with `method.kind: lora` and ZeRO stage 0 to 2. It needs the extra `quantised`. A model
    whose files are quantised by bitsandbytes is trained on as it is: leave the key out, or name its kind."""
    special_tokens: SpecialTokens = SpecialTokens()
    """Special tokens in place of the tokenizer's own, such as `{eos: <|im_end|>}` for a base model that learns to chat.
    Exports have them in tokenizer, config and generation config."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off by default, because it is somebody else's program."""

    @property
    def torch_dtype(self) -> str:
        """`float32` or `bfloat16`."""
        return _LONG_DTYPE.get(self.dtype, self.dtype)


class MethodConfig(Section):
    """Sets which weights are trained. The keys are PEFT's."""

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
    """LoRA only: modules to train whole beside the adapter, such as `lm_head`. As in PEFT, a name matches every module
    whose name ends with it."""
    freeze: list[Pattern] = []
    """Full only: parameters to freeze, as regular expressions searched in their names."""
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    """Add noise to the embeddings while training (NEFTune, Jain et al. 2023): uniform, up to this / sqrt(tokens of the
    sequence x hidden size), drawn by sequence as dropout is. The paper uses 5 to 15. Null adds none."""
    init_from: str | None = None
    """Directory of a PEFT LoRA adapter to start from instead of fresh matrices. Keys of this section that are not set
    take the adapter's values."""


class TrainConfig(Section):
    """Batch, length and memory of the run."""

    global_batch_size: Annotated[int, Field(ge=1)] = 32
    """Sequences per optimizer step over all workers; constant over a run."""
    micro_batch_size: Annotated[int, Field(ge=1)] = 1
    """Sequences per worker and pass. It changes memory and speed, never the result. A worker whose memory is known (a
    GPU, or `cluster.memory_per_worker`) takes fewer if so many are estimated not to fit."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps. Overrides `epochs`."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the data. May be fractional."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


class EarlyStopping(Section):
    """When a run ends before its last step."""

    metric: MeasuredMetric = "eval_loss"
    """Metric to watch, one of the objective's (docs/objectives.md); perplexity goes with `eval_loss`. With several
    held-out sets, `NAME/eval_loss` is that of one of them."""
    patience: Annotated[int, Field(ge=1)]
    """Evaluations in a row without improvement after which the run is complete."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """A smaller change does not count as an improvement."""


class EvalConfig(Section):
    """Measurements on the held-out data."""

    every_steps: Annotated[int, Field(ge=1)] | None = None
    """Steps between held-out losses; null measures before the first and after the last step only."""
    early_stopping: EarlyStopping | None = None
    """End the run when the metric on the held-out data stops improving. Null runs all steps. The decision depends only
    on the numbers measured so far, so a run that fails or is resized ends at the same step."""
    best_metric: MeasuredMetric | None = None
    """Metric by which the best checkpoint is kept and exported as `exports/best`; of one of several held-out sets it is
    `NAME/eval_loss`. Null keeps only the last checkpoints."""
    metrics: list[Literal["exact_match", "json_valid", "json_fields", "rouge_l", "bleu", "regex"]] = []
    """Metrics of generated answers, measured on the base model and on the result. json_valid: the answer is one JSON
    object or array; json_fields: share of the fields of the reference's object that are equal; rouge_l: F1; bleu: of
    all answers together, 0 to 100; regex: see below."""
    regex: Pattern | None = None
    """Pattern of the metric `regex`. Its first match in the answer, or the groups of that match, must equal those in
    the reference. If the reference has no match, any match counts."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    """Longest generated answer."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Held-out rows used for generated answers; null uses all."""


class GroupConfig(Section):
    """Settings for the parameters whose names match a pattern."""

    pattern: Pattern
    """Regular expression, searched in the name of a trained parameter."""
    lr: Annotated[float, Field(ge=0)] | None = None
    """Peak learning rate; null is `optimizer.lr`. The schedule scales it like the other."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Decoupled decay, also of norms and biases; null keeps the rule of `optimizer.weight_decay`."""


class SftConfig(Section):
    """Supervised fine-tuning: the cross entropy of the trained tokens."""

    steering: ClassVar[tuple[SteeringMetric, ...]] = ("eval_loss", "token_accuracy")
    kind: Literal["sft"] = "sft"
    """What is optimised."""


class DpoConfig(Section):
    """Direct preference optimisation (Rafailov et al. 2023): the chosen answer rather than the rejected one.

    Names, defaults and formulas are TRL's; see docs/objectives.md.
    """

    steering: ClassVar[tuple[SteeringMetric, ...]] = _REWARDS
    kind: Literal["dpo"] = "dpo"
    """What is optimised."""
    loss: Literal["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "apo_zero", "apo_down"] = "sigmoid"
    """Loss of a pair. `sigmoid_norm` divides log-probabilities by the length and wants a `beta` of about 5."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the model is held near the reference."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs whose answers are taken to be swapped; for `loss: robust` only."""
    sft_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the cross entropy of the chosen answer (mean per token), which keeps it likely; TRL's `[…, sft]`."""
    reference: str | None = None
    """Directory of the reference: a model, an adapter of the base model, or an export. Null is the model of the first
    step: the base, with the adapter of `method.init_from`."""


class CpoConfig(Section):
    """Contrastive preference optimisation (Xu et al. 2024) and SimPO (Meng et al. 2024): pairs without a reference."""

    steering: ClassVar[tuple[SteeringMetric, ...]] = (*_REWARDS, "nll_loss")
    kind: Literal["cpo"] = "cpo"
    """What is optimised."""
    loss: Literal["sigmoid", "simpo"] = "sigmoid"
    """Loss of a pair. `simpo` compares means per token with a margin."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """Scale of the difference; SimPO's authors use 2 to 10."""
    gamma: Annotated[float, Field(ge=0)] = 0.5
    """Margin that the chosen answer should have, for `loss: simpo`."""
    sft_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the cross entropy of the chosen answer (mean per token); 0 is SimPO proper."""


class OrpoConfig(Section):
    """Odds ratio preference optimisation (Hong et al. 2024): cross entropy and a preference in one, no reference."""

    steering: ClassVar[tuple[SteeringMetric, ...]] = (*_REWARDS, "nll_loss")
    kind: Literal["orpo"] = "orpo"
    """What is optimised."""
    beta: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the odds ratio."""


class KtoConfig(Section):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024): answers with a label each, not pairs."""

    steering: ClassVar[tuple[SteeringMetric, ...]] = (
        "eval_loss", "rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected",
    )  # fmt: skip
    kind: Literal["kto"] = "kto"
    """What is optimised."""
    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    """Loss of a row. `kto` compares with the mean over the step's mismatched answers, `apo_zero_unpaired` with 0."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the model is held near the reference."""
    desirable_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of rows with a true label. Times their number it should be 1 to 4/3 of that of the others."""
    undesirable_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of rows with a false label."""
    reference: str | None = None
    """See `dpo`."""


class DistillConfig(Section):
    """Distillation (Hinton et al. 2015): the teacher's distribution over the trained tokens, not the tokens alone."""

    steering: ClassVar[tuple[SteeringMetric, ...]] = ("eval_loss", "kl", "nll_loss", "token_accuracy", "agreement")
    kind: Literal["distill"] = "distill"
    """What is optimised."""
    teacher: Annotated[str, Field(min_length=1)]
    """The teacher: a model as in `model.name`, or an export. It must have the tokens of the model that is trained."""
    teacher_revision: str | None = None
    """Branch, tag or commit of a teacher on a hub; null is the default branch. A run goes on with the same one only."""
    divergence: Literal["forward", "reverse", "jsd"] = "forward"
    """What is minimised: KL(teacher ‖ student), KL(student ‖ teacher), or the Jensen-Shannon divergence."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits of both. The loss is multiplied by its square, so that gradients keep their size."""
    top_k: Annotated[int, Field(ge=1)] = 64
    """Likeliest tokens of the teacher that are kept at each place; the others together are one bucket."""
    ce_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the cross entropy of the data's own tokens, added to the divergence."""


def _kind_of_objective(value: dict[str, str] | Section) -> str:
    """Return the kind of an objective. A section without one means supervised fine-tuning."""
    return str(value.get("kind", "sft")) if isinstance(value, dict) else str(getattr(value, "kind", "sft"))


ObjectiveConfig = Annotated[
    Annotated[SftConfig, Tag("sft")]
    | Annotated[DpoConfig, Tag("dpo")]
    | Annotated[CpoConfig, Tag("cpo")]
    | Annotated[OrpoConfig, Tag("orpo")]
    | Annotated[KtoConfig, Tag("kto")]
    | Annotated[DistillConfig, Tag("distill")],
    Discriminator(_kind_of_objective),
]
"""The union of all objectives, told apart by `kind`."""


class OptimizerConfig(Section):
    """Holds the settings of every optimizer; each kind adds its own. See docs/optimizers.md."""

    lr: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled decay of matrices; norms and biases are not decayed unless `groups` says so."""
    betas: Betas = (0.9, 0.999)
    """Decay rates of the moments."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Clip the global gradient norm to this; 0 does not clip."""
    groups: list[GroupConfig] = []
    """Parameters with settings of their own; the first pattern that matches a name decides."""
    lora_plus_ratio: Annotated[float, Field(gt=0)] | None = None
    """LoRA only: matrices B learn at this many times `lr`, such as 16 (LoRA+, Hayou et al. 2024). A pattern of `groups`
    comes first. Null is 1."""


class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov and Hutter 2017). A section without a `kind` means this one."""

    title: ClassVar[str] = "AdamW"
    kind: Literal["adamw"] = "adamw"
    """Which optimizer."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator."""


class LionConfig(OptimizerConfig):
    """Lion (Chen et al. 2023): the sign of an interpolated momentum; one moment instead of two."""

    title: ClassVar[str] = "Lion"
    kind: Literal["lion"] = "lion"
    """Which optimizer."""
    lr: Annotated[float, Field(gt=0)] = 3e-5
    """Peak learning rate. Every element moves by it, so it is three to ten times smaller than AdamW's, and
    `weight_decay` so many times larger."""
    betas: Betas = (0.9, 0.99)
    """Weight of the momentum in the update; decay rate of the momentum."""


class ScheduleFreeAdamWConfig(OptimizerConfig):
    """Schedule-free AdamW (Defazio et al. 2024): an average of the weights instead of a decaying rate.

    Training computes at an interpolation of the average and of the fast weights; held-out numbers and exports use
    the average. Needs `schedule.kind` `constant` or `constant_with_warmup`.
    """

    title: ClassVar[str] = "schedule-free AdamW"
    kind: Literal["schedule_free_adamw"] = "schedule_free_adamw"
    """Which optimizer."""
    lr: Annotated[float, Field(gt=0)] = 5e-4
    """Peak learning rate; one to ten times AdamW's with a schedule."""
    betas: InterpolatingBetas = (0.9, 0.999)
    """Share of the average in the weights that training computes with; decay rate of the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator."""


def _kind_of_optimizer(value: dict[str, str] | OptimizerConfig) -> str:
    """Return the kind of an optimizer. A section without one means AdamW."""
    return str(value.get("kind", "adamw")) if isinstance(value, dict) else str(getattr(value, "kind", "adamw"))


AnyOptimizer = Annotated[
    Annotated[AdamWConfig, Tag("adamw")]
    | Annotated[LionConfig, Tag("lion")]
    | Annotated[ScheduleFreeAdamWConfig, Tag("schedule_free_adamw")],
    Discriminator(_kind_of_optimizer),
]


class ScheduleConfig(Section):
    """Learning rate over the run. See docs/optimizers.md for the shapes."""

    kind: Literal[
        "cosine", "linear", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt", "wsd"
    ] = "cosine"  # fmt: skip
    """Shape after the warm-up. `constant` and `constant_with_warmup` are the same."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of the steps over which the rate rises from zero."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps over which the rate rises from zero, in place of `warmup_ratio`."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Final rate as a share of the peak."""
    num_cycles: Annotated[int, Field(ge=1)] = 1
    """cosine: how often the rate falls; it restarts at the peak in between (Loshchilov and Hutter 2016)."""
    power: Annotated[float, Field(gt=0)] = 1.0
    """polynomial: exponent of the share of the steps that is left."""
    decay_ratio: Annotated[float, Field(gt=0, le=1)] = 0.1
    """wsd: share of the steps, the last ones, over which the rate falls."""
    decay_kind: Literal["linear", "cosine", "1-sqrt"] = "linear"
    """wsd: shape of the fall."""

    @model_validator(mode="after")
    def _check_warmup(self) -> ScheduleConfig:
        if self.warmup_steps is not None and "warmup_ratio" in self.model_fields_set:
            raise ValueError(
                f"schedule.warmup_steps={self.warmup_steps} and schedule.warmup_ratio={self.warmup_ratio} say the same "
                "thing twice; remove one of them"
            )
        return self

    @model_serializer(mode="wrap")
    def _one_warmup(self, serialize: SerializerFunctionWrapHandler) -> dict[str, str | int | float]:
        """Leaves out the warm-up that is not used, so that what is written can be read again."""
        unused = "warmup_steps" if self.warmup_steps is None else "warmup_ratio"
        return {key: value for key, value in serialize(self).items() if key != unused}


class ZeroConfig(Section):
    """Sets how DeepSpeed shards state (Rajbhandari et al. 2019)."""

    stage: Annotated[int, Field(ge=0, le=3)] = 2
    """0 nothing, 1 optimizer state, 2 also gradients, 3 also weights."""
    offload: bool = False
    """Keep optimizer state (and at stage 3 weights) in host memory. Needs a GPU."""

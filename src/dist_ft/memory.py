"""Estimates the memory of one worker. Pure arithmetic.

Model state follows the ZeRO paper (Rajbhandari et al. 2019, section 3 and figure 1) with what runs here:
gradients are summed in float32, masters and the optimizer's state are float32. With P parameters of `b` bytes, T
of them trained with `m` bytes of optimizer state (8 for AdamW's two moments), on N workers:

    stage            weights         gradients   optimizer
    0, float32       b·P             4·T         m·T            (the weights are the masters)
    1                b·P             4·T         (4 + m)·T / N
    2                b·P             4·T / N     (4 + m)·T / N
    3                b·P / N + G     4·T / N     (4 + m)·T / N

G is what stage 3 holds gathered at a time: what the worker does not own, at most an eighth of the model
(`stage3_max_live_parameters` in `zero/ds_config.py`). A frozen LoRA base is sharded at stage 3 only; a quantised one
takes 0.52 bytes (nf4) or 1 (int8) for each element of its linear layers.

Activations follow Korthikanti et al. 2022 ("Reducing Activation Recomputation in Large Transformer Models",
equation 2): s·B·h·(34 + 5·a·s/h) bytes a layer in 16 bit, for s tokens, B sequences, hidden size h, a heads.
The second term is the attention matrix, which fused kernels never store. With `eager` it is the float32
softmax and its copy in 16 bit; the paper's share for dropout is left out, attention dropout is refused here.
With gradient checkpointing a layer keeps its input alone, and one layer at a time is recomputed.

It is an estimate, for choosing a stage and a micro batch; for two small Llamas it was within a tenth of what
autograd saved. Left out: communication buffers (up to 200 million elements), the allocator's fragmentation,
the copy of a checkpoint that is being written ((4 + m)·T / N, in host memory), and the libraries and the CUDA
context (about 1 GiB a worker). Gated feed-forward layers alone can need a quarter more than the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
STAGES = (0, 1, 2, 3)
_GRADIENT = 4
_MASTER = 4
_GATHERED_PARTS = 8


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model that the formulas use.

    Attributes:
        num_params: Elements of the whole model, adapter included (P).
        num_trained: Elements that are trained (T).
        num_layers: Transformer layers.
        hidden_size: Width of the residual stream (h).
        num_heads: Attention heads (a).
        vocab_size: Columns of the logits.
        dtype_bytes: Bytes of a weight and of an activation (b).
        state_bytes: Bytes of optimizer state of a trained element (m).
        saved_bytes: How much smaller a quantised base is.
    """

    num_params: int
    num_trained: int
    num_layers: int
    hidden_size: int
    num_heads: int
    vocab_size: int
    dtype_bytes: int
    state_bytes: int = 8
    saved_bytes: int = 0


@dataclass(frozen=True)
class BatchShape:
    """The largest micro batch of one worker.

    Attributes:
        num_sequences: Sequences of a pass (B).
        num_tokens: Tokens of the longest sequence (s).
        num_trained_tokens: Most trained tokens of one sequence; only they reach the output layer.
        gradient_checkpointing: Whether layers are recomputed in the backward pass.
        has_eager_attention: Whether the attention matrix is stored.
    """

    num_sequences: int
    num_tokens: int
    num_trained_tokens: int
    gradient_checkpointing: bool = False
    has_eager_attention: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker.

    Attributes:
        weights_bytes: Model weights.
        gradients_bytes: Summed gradients.
        optimizer_bytes: Masters and optimizer state.
        activations_bytes: What the forward pass keeps for the backward pass.
        host_bytes: The part of it that `zero.offload` keeps in host memory.
    """

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    host_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """Bytes on the worker's device."""
        parts = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.activations_bytes
        return parts - self.host_bytes


def weights_bytes(model: ModelShape, stage: int, world_size: int, offload: bool = False) -> int:
    """Return the bytes of the weights, at stage 3 with those gathered for the running layers.

    With `offload` a worker's own part is in host memory and is gathered like the others'.
    """
    elements = model.num_params
    if stage == 3:
        own = _share(elements, world_size)
        elements = own + min(elements - (0 if offload else own), elements // _GATHERED_PARTS)
    return elements * model.dtype_bytes - model.saved_bytes


def gradients_bytes(model: ModelShape, stage: int, world_size: int) -> int:
    """Return the bytes of the gradients summed over a step."""
    return _GRADIENT * (_share(model.num_trained, world_size) if stage >= 2 else model.num_trained)


def optimizer_bytes(model: ModelShape, stage: int, world_size: int) -> int:
    """Return the bytes of masters and optimizer state. Stage 0 is float32's; bfloat16 runs as stage 1 there."""
    if stage == 0:
        return model.state_bytes * model.num_trained
    return (_MASTER + model.state_bytes) * _share(model.num_trained, world_size)


def activations_bytes(model: ModelShape, batch: BatchShape) -> int:
    """Return the bytes that the forward pass keeps; the same at every stage and world size."""
    tokens = batch.num_sequences * batch.num_tokens
    # 34 bytes at 2 bytes an element are 17 elements; the paper's two byte masks for dropout count as one.
    layer = 17 * tokens * model.hidden_size * model.dtype_bytes
    if batch.has_eager_attention:
        layer += model.num_heads * batch.num_tokens * tokens * (4 + _cast_bytes(model))
    if batch.gradient_checkpointing:
        layers = layer + model.num_layers * tokens * model.hidden_size * model.dtype_bytes
    else:
        layers = layer * model.num_layers
    # Logits of the trained tokens in the model's dtype, in float32, and their log-softmax.
    logits = batch.num_sequences * batch.num_trained_tokens * model.vocab_size * (8 + _cast_bytes(model))
    return layers + logits


def estimate(model: ModelShape, batch: BatchShape, *, stage: int, world_size: int, offload: bool = False) -> Memory:
    """Return the memory of one worker.

    Args:
        model: The model.
        batch: The largest micro batch.
        stage: ZeRO stage that is run.
        world_size: Workers.
        offload: Whether optimizer state, and at stage 3 weights, lie in host memory.
    """
    weights = weights_bytes(model, stage, world_size, offload)
    optimizer = optimizer_bytes(model, stage, world_size)
    host = 0
    if offload and stage >= 1:
        host = optimizer
        if stage == 3:
            host += _share(model.num_params, world_size) * model.dtype_bytes
    return Memory(
        weights_bytes=weights,
        gradients_bytes=gradients_bytes(model, stage, world_size),
        optimizer_bytes=optimizer,
        activations_bytes=activations_bytes(model, batch),
        host_bytes=host,
    )


def fitting_micro_batch(
    model: ModelShape, batch: BatchShape, *, stage: int, world_size: int, limit_bytes: int, offload: bool = False
) -> int:
    """Return the largest number of sequences a pass that is estimated to fit: 1 to `batch.num_sequences`.

    A group that shrinks holds more state per worker, and what is left may be too little for the passes it had.
    The result of a run does not depend on it.

    Args:
        model: The model.
        batch: The largest micro batch, as configured.
        stage: ZeRO stage that is run.
        world_size: Workers.
        limit_bytes: Memory of a worker's device; a tenth of it is left alone, as the estimate may err by that.
        offload: As in `estimate`.
    """
    for count in range(batch.num_sequences, 1, -1):
        smaller = replace(batch, num_sequences=count)
        memory = estimate(model, smaller, stage=stage, world_size=world_size, offload=offload)
        if memory.total_bytes <= 0.9 * limit_bytes:
            return count
    return 1


def _share(elements: int, world_size: int) -> int:
    return -(-elements // world_size)


def _cast_bytes(model: ModelShape) -> int:
    """Bytes of an element's 16-bit copy next to its float32 form; none when the model is float32 itself."""
    return model.dtype_bytes if model.dtype_bytes < 4 else 0

"""The DeepSpeed engine of a rank: how it is made, and the typed door to it.

Collective: every function here is called by every rank at the same point.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from math import prod
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from dist_ft.config import Config
from dist_ft.config.training_sections import OptimizerConfig
from dist_ft.zero.devices import choose_backend, device_id, sums_in_one_order
from dist_ft.zero.ds_config import build_ds_config
from dist_ft.zero.optimizers import Optimizer, ParamGroup, optimizer_of
from dist_ft.zero.sharding import full_shape

logger = logging.getLogger(__name__)

# Longer than any limit of the watchdog, which names the rank that delays the others. This timeout would end, and
# blame, the ranks that wait.
_GROUP_TIMEOUT = timedelta(hours=3)


@dataclass(frozen=True)
class Engine:
    """A module that DeepSpeed trains.

    Attributes:
        raw: DeepSpeed's engine, which has no types.
        module: The module that is trained.
        names: Trained parameters and their names.
        optimizer: Its row of the optimizers' table.
        stage: ZeRO stage that is run.
        device: Where the module computes.
    """

    raw: Any
    module: nn.Module
    names: Mapping[nn.Parameter, str]
    optimizer: Optimizer
    stage: int
    device: torch.device

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The optimizer that keeps the state, without ZeRO around it."""
        found: torch.optim.Optimizer = self.raw.optimizer if self.stage == 0 else self.raw.optimizer.optimizer
        return found

    @property
    def training(self) -> bool:
        """Whether dropout is on."""
        return bool(self.module.training)

    def __call__(self, *arguments: object) -> torch.Tensor:
        """Run the module's forward pass."""
        output: torch.Tensor = self.raw(*arguments)
        return output

    def backward(self, loss: torch.Tensor) -> None:
        """Run the backward pass of a micro step; gradients are summed, not divided."""
        with sums_in_one_order(self.device):
            self.raw.backward(loss, scale_wrt_gas=False)

    def end_micro_step(self) -> None:
        """Go on to the next micro step of an accumulation."""
        self.raw.step()

    def apply_step(self, lr_scale: float) -> float:
        """Take the optimizer step that ends an accumulation; return the gradient norm before clipping.

        Called after the backward pass of the last micro step, when gradients are reduced but not yet applied.

        Args:
            lr_scale: What the schedule makes of each group's peak learning rate.
        """
        for group in self.raw.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_scale
            group["lr_scale"] = lr_scale
        if self.stage > 0:
            self.raw.step()
            return float(self.raw.get_global_grad_norm())
        # Every rank holds all reduced gradients, and DeepSpeed reports no norm.
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(gradient.float()) for gradient in gradients])
        norm = float(torch.linalg.vector_norm(norms))
        self.raw.step()
        return norm

    def train(self, mode: bool = True) -> None:
        """Switch dropout on, or off."""
        self.raw.train(mode)

    def eval(self) -> None:
        """Switch dropout off."""
        self.raw.eval()


def open_store(host: str, rank: int, world_size: int, port: int = 0) -> dist.TCPStore:
    """Open the rendezvous store. Rank 0 listens on a free port (see `.port`), the others connect."""
    return dist.TCPStore(
        host, port, world_size, is_master=rank == 0, timeout=timedelta(minutes=5), wait_for_workers=False
    )


def init_process_group(store: dist.TCPStore, rank: int, world_size: int, on_gpu: bool) -> None:
    """Join the process group of this attempt; a rank does so once in its life.

    DeepSpeed would compile a shared-memory op with g++ (80 s on two cores) for a few CPU collectives; it is
    switched off before `init_distributed` looks for it, and gloo does the work.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not on_gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = choose_backend(store, rank, world_size, device_id() if on_gpu else None)
    device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else None
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world_size, timeout=_GROUP_TIMEOUT, device_id=device
    )
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def parameter_groups(names: Mapping[nn.Parameter, str], config: OptimizerConfig) -> list[ParamGroup]:
    """Return the optimizer's groups, one for each pair of learning rate and weight decay.

    By default matrices are decayed and vectors (norms, biases) are not.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter, name in names.items():
        own = next((group for group in config.groups if re.search(group.pattern, name)), None)
        ratio = config.lora_plus_ratio if config.lora_plus_ratio is not None and "lora_B" in name else 1.0
        lr, decay = ratio * config.lr, config.weight_decay if len(full_shape(parameter)) > 1 else 0.0
        if own is not None:
            lr = lr if own.lr is None else own.lr
            decay = decay if own.weight_decay is None else own.weight_decay
        groups.setdefault((lr, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "initial_lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]


def build_engine(
    module: nn.Module,
    names: Mapping[nn.Parameter, str],
    config: Config,
    *,
    world_size: int,
    micro_batch_size: int,
    on_gpu: bool,
) -> Engine:
    """Wrap the module in a DeepSpeed engine."""
    optimizer = optimizer_of(config.optimizer)
    parameters = {p: prod(full_shape(p)) for p in module.parameters()}
    ds_config = build_ds_config(
        config,
        world_size=world_size,
        micro_batch_size=micro_batch_size,
        num_params=sum(parameters.values()),
        num_trained=sum(count for p, count in parameters.items() if p.requires_grad),
        on_gpu=on_gpu,
    )
    logger.info("DeepSpeed config: %s", ds_config)
    inner = optimizer.build(parameter_groups(names, config.optimizer))
    raw, *_ = deepspeed.initialize(model=module, optimizer=inner, config=ds_config, dist_init_required=False)
    return Engine(raw, raw.module, names, optimizer, raw.zero_optimization_stage(), raw.device)

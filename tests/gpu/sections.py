"""The sections of `tests.gpu.check`: each one function, run in a process of its own: `... tests.gpu.sections NAME DIR`.

Ranks are forked by the starter that production uses, without Ray; only the last section imports Ray.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.gpu.check import ROOT, SKIPPED_STATUS, Figures, answer

_HOPPER_FLOPS = 989e12  # dense bfloat16 products of an H100 SXM or an H200, by NVIDIA's data sheets
_LLAMA_PARAMS, _LLAMA_LAYERS, _LLAMA_WIDTH = 1.236e9, 16, 2048


class Skipped(Exception):
    """This section cannot run here; the text says why."""


@dataclass(frozen=True)
class Place:
    """Where a section runs.

    Attributes:
        directory: Its own, empty.
        on_gpu: Whether there is a CUDA device.
    """

    directory: Path
    on_gpu: bool

    def need_gpu(self) -> None:
        """Skips the section without a device."""
        if not self.on_gpu:
            raise Skipped("there is no CUDA device")


def preflight(here: Place) -> Figures:
    """Reads the device, multiplies in bfloat16 and reduces over NCCL (gloo without a device)."""
    from dist_ft.zero.devices import use_device
    from dist_ft.zero.engine import init_process_group, open_store

    figures: Figures = {"python": sys.version.split()[0], "torch": torch.__version__, "device": "cpu"}
    if here.on_gpu:
        use_device(0)
        properties = torch.cuda.get_device_properties(0)
        assert torch.cuda.is_bf16_supported(), "no bfloat16"
        matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        seconds = _median_s(lambda: matrix @ matrix)
        figures |= {
            "device": properties.name,
            "memory GiB": round(properties.total_memory / 2**30, 1),
            "bf16 TFLOP/s": round(2 * 8192**3 / seconds / 1e12),
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        }
    init_process_group(open_store("127.0.0.1", 0, 1), 0, 1, here.on_gpu)
    total = torch.ones(1 << 20, device="cuda" if here.on_gpu else "cpu")
    dist.all_reduce(total)
    assert float(total.sum()) == 1 << 20
    return {**figures, "backend": dist.get_backend()}


def numerics(here: Place) -> Figures:
    """Trains the tiny model: float32 as on the CPU, bfloat16 twice the same."""
    here.need_gpu()
    with _starter(on_gpu=False) as starter:
        cpu = _train(here, starter, "cpu", on_gpu=False)
    with _starter(on_gpu=True) as starter:
        gpu = _train(here, starter, "gpu")
        first, second = (_train(here, starter, name, model__dtype="bfloat16") for name in ("first", "second"))
    apart = max(abs(gpu[step] - loss) / loss for step, loss in cpu.items())
    assert apart < 1e-4, f"float32 losses {gpu} on the device, {cpu} on the CPU"
    assert first == second, f"two runs in bfloat16: {first} and {second}"
    return {"float32 from CPU": f"{apart:.1e}", "bfloat16 twice": "equal"}


def resume(here: Place, stage: int) -> Figures:
    """Stops after two steps and resumes: the same losses, bit for bit."""
    changes: dict[str, Any] = {"zero__stage": stage, "model__dtype": "bfloat16" if here.on_gpu else "float32"}
    with _starter(here.on_gpu) as starter:
        whole = _train(here, starter, "whole", **changes)
        _train(here, starter, "parts", on_message=_stop_after_two, **changes)
        parts = _train(here, starter, "parts", **changes)
    assert parts == whole, f"resumed {parts}, at one go {whole}"
    return {"steps": len(whole), "last loss": round(whole[max(whole)], 4)}


def offload(here: Place, stage: int) -> Figures:
    """Trains with optimizer state, and at stage 3 weights, in host memory: the losses of a run without."""
    here.need_gpu()
    with _starter(on_gpu=True) as starter:
        plain, offloaded = (
            _train(here, starter, str(flag), zero__stage=stage, zero__offload=flag) for flag in (False, True)
        )
    apart = max(abs(offloaded[step] - loss) / loss for step, loss in plain.items())
    assert apart < 1e-4, f"with offload {offloaded}, without {plain}"
    return {"largest relative difference": f"{apart:.1e}"}


def memory(here: Place) -> Figures:
    """Compares the estimate by which micro batches are chosen with what was allocated; within a tenth."""
    here.need_gpu()
    from dist_ft.data.stream.loader import fitting_batch
    from dist_ft.memory import estimate
    from dist_ft.model.trained import model_shape

    parts = _build(here)
    config = parts.config
    torch.cuda.reset_peak_memory_stats()
    _run(parts)
    shape = model_shape(parts.engine.module.model, config)
    batch = fitting_batch(config, shape, list(parts.spec.attempt.inputs.splits), 1, None, 1)
    expected = estimate(shape, batch, stage=config.zero_stage, world_size=1).total_bytes
    found = torch.cuda.max_memory_allocated()
    figures: Figures = {"estimate GiB": round(expected / 2**30, 2), "peak GiB": round(found / 2**30, 2)}
    assert abs(expected - found) <= 0.1 * found, f"not within a tenth: {figures}"
    return figures


def background(here: Place) -> Figures:
    """Copies the state of 1.2B trained parameters to pinned memory: how long a checkpoint blocks."""
    here.need_gpu()
    from dist_ft.checkpoint.snapshot import HostCopies
    from dist_ft.zero.partitions import collect_slices

    parts = _build(here)
    _run(parts)
    seconds, host = [], HostCopies()
    for _ in range(2):
        began = time.perf_counter()
        copies = host.copy([*collect_slices(parts.engine)])
        seconds.append(time.perf_counter() - began)
        assert all(torch.equal(kept, now.detach().float().cpu()) for (_, kept), (_, now) in zip(
            copies[:3], list(collect_slices(parts.engine))[:3], strict=True))  # fmt: skip
        num_bytes = sum(copy.nbytes for _, copy in copies)
    return {"GB": round(num_bytes / 1e9, 1), "first s": round(seconds[0], 2), "second s": round(seconds[1], 2)}


def packed(here: Place) -> Figures:
    """Compares a packed row without a mask, forward and backward, with transformers' dense mask."""
    from transformers import LlamaConfig, LlamaModel

    from dist_ft.model.attention import attend_by_sample

    width, length, sample = (2048, 4096, 512) if here.on_gpu else (64, 128, 32)
    device, dtype = ("cuda", torch.bfloat16) if here.on_gpu else ("cpu", torch.float32)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=4,
        num_attention_heads=width // 32, num_key_value_heads=width // 64, max_position_embeddings=length,
    )  # fmt: skip
    model = LlamaModel._from_config(config, attn_implementation="sdpa").to(device, dtype)
    ids_BT = torch.randint(512, (2, length), device=device)
    positions_BT = torch.arange(sample, device=device).repeat(length // sample).expand(2, -1)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        hidden = model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).last_hidden_state
        hidden.float().square().mean().backward()
        gradient = model.layers[0].self_attn.q_proj.weight.grad
        return hidden.detach().float(), gradient.float().clone()

    dense, dense_s = step(), _median_s(step)
    attend_by_sample(model)
    ours, ours_s = step(), _median_s(step)
    for name, one, other in zip(("hidden states", "gradients"), ours, dense, strict=True):
        apart = float(torch.linalg.vector_norm(one - other) / torch.linalg.vector_norm(other))
        # bfloat16 has 8 bits of mantissa, and four layers round in another order.
        assert apart < (2e-2 if here.on_gpu else 1e-5), f"{name} differ by {apart:.1e} relative"
    return {"mask s": round(dense_s, 4), "ours s": round(ours_s, 4), "times": round(dense_s / ours_s, 2)}


def two_ranks(here: Place) -> Figures:
    """Trains on two ranks of one device, over gloo because NCCL refuses: the losses of one rank."""
    with _starter(here.on_gpu) as starter:
        one = _train(here, starter, "one")
        two = _train(here, starter, "two", cluster__num_workers=2)
    apart = max(abs(two[step] - loss) / loss for step, loss in one.items())
    assert apart < 1e-4, f"two ranks {two}, one {one}"
    return {"largest relative difference": f"{apart:.1e}"}


def generation(here: Place) -> Figures:
    """Answers prompts as an evaluation does, twice the same."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dist_ft.evaluate.generate import generate
    from dist_ft.model.embedded import materialise

    path = materialise("tiny-random")
    model = AutoModelForCausalLM.from_pretrained(path).to("cuda" if here.on_gpu else "cpu").eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = [f"{number} red blue" for number in range(32)]
    began = time.perf_counter()
    first, second = (generate(model, tokenizer, prompts, 32) for _ in range(2))
    assert first == second and len(first) == len(prompts)
    return {"answers/s": round(2 * len(prompts) / (time.perf_counter() - began), 1)}


def speed(here: Place, case: str) -> Figures:
    """Measures tokens/s and MFU of a random 1.2B Llama beside a bare loop and TRL, in turns."""
    here.need_gpu()
    from benchmarks.training import PACKED_LEN, compare

    found = compare(case, 1, str(here.directory))
    figures: Figures = {f"{side} tokens/s": round(value) for side, value in found["tokens_per_s"].items()}
    figures |= {f"times {side}": value for side, value in found["ratio"].items()}
    if "trl" not in found["tokens_per_s"]:
        figures["trl"] = "not importable"
    if any(name in torch.cuda.get_device_name() for name in ("H100", "H200")):
        # Forward and backward are 6 operations a parameter and token, without gradients of weights 4; causal
        # attention adds half of 12 (8) a layer, token and unit of width.
        products = 6 if case.endswith("full") else 4
        a_token = products * (_LLAMA_PARAMS + _LLAMA_LAYERS * _LLAMA_WIDTH * PACKED_LEN)
        figures["MFU %"] = round(100 * a_token * found["tokens_per_s"]["dist-ft"] / _HOPPER_FLOPS, 1)
    return figures


def through_ray(here: Place) -> Figures:
    """Trains through Ray with one worker, kills the driver after two steps, resumes: as at one go."""
    if importlib.util.find_spec("ray") is None:
        raise Skipped("ray cannot be imported")
    from tests.helpers.rows import last_rows

    def start(name: str, *others: str) -> subprocess.Popen[bytes]:
        settings = ["cluster.num_workers=1", f"run.output_dir={here.directory}", f"run.name={name}",
                    "data.eval=null", "eval.metrics=[]", "monitor.wandb=disabled", "train.max_steps=8",
                    "checkpoint.every_steps=2"]  # fmt: skip
        command = [sys.executable, "-c", "from dist_ft.cli import main; main()", "train"]
        command.append(str(ROOT / "configs" / "smoke" / "full.yaml"))
        return subprocess.Popen([*command, *settings, *others])

    def losses(name: str) -> dict[int, float]:
        return {step: row["loss"] for step, row in last_rows(here.directory / name / "metrics.jsonl").items()}

    assert start("whole").wait() == 0
    first = start("parts")
    while 3 not in losses("parts"):
        assert first.poll() is None, "it ended before it could be killed"
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert start("parts", "--resume").wait() == 0
    assert losses("parts") == losses("whole"), f"resumed {losses('parts')}, at one go {losses('whole')}"
    return {"steps": len(losses("parts"))}


SECTIONS: dict[str, Callable[[Place], Figures]] = {
    "preflight": preflight,
    "numerics": numerics,
    **{f"resume-{stage}": partial(resume, stage=stage) for stage in (1, 2, 3)},
    "packed": packed,
    "memory": memory,
    **{f"offload-{stage}": partial(offload, stage=stage) for stage in (2, 3)},
    "background": background,
    "two-ranks": two_ranks,
    "generation": generation,
    "lora-1b": partial(speed, case="llama-lora"),
    "full-1b": partial(speed, case="llama-full"),
    "ray": through_ray,
}


def _median_s(work: Callable[[], object]) -> float:
    """Returns the median of five times, after one that is not counted."""
    from dist_ft.train.timing import Stopwatch

    seconds = []
    for _ in range(6):
        watch = Stopwatch(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        work()
        watch.stop()
        seconds.append(watch.seconds)
    return statistics.median(seconds[1:])


@contextmanager
def _starter(on_gpu: bool) -> Iterator[str]:
    from dist_ft.orchestrate.workers.processes import ForkServer

    server = ForkServer(on_gpu)
    yield server.socket_path
    server.close()


def _stop_after_two(coordinator: Any, envelope: dict[str, Any]) -> None:
    if envelope["kind"] == "step_done" and envelope["body"]["row"]["step"] == 2:
        coordinator.request_stop("test")


def _train(
    here: Place, starter: str, name: str, on_message: Any = None, on_gpu: bool | None = None, **changes: Any
) -> dict[int, float]:
    """Trains the tiny model for up to six steps, forked, without Ray; returns the losses."""
    from tests.helpers.configs import tiny_config
    from tests.helpers.group import run_group

    config = tiny_config(here.directory, **{"run__name": name, "cluster__num_workers": 1, **changes})
    group = run_group(config, starter, on_message, here.on_gpu if on_gpu is None else on_gpu)
    wanted = "completed" if on_message is None else "stopped"
    assert group.outcome == wanted, f"{name} {group.outcome}: {group.errors or 'see its ledger'}"
    return group.losses


def _build(here: Place) -> Any:
    """Builds a rank of the random Llama, all of it trained, in this process."""
    from benchmarks.training import make_config
    from dist_ft.jobs.prepare import prepare
    from dist_ft.run.attempt_spec import AttemptSpec, RankSpec
    from dist_ft.train.build import build_rank
    from dist_ft.zero.devices import use_device
    from dist_ft.zero.engine import init_process_group, open_store

    use_device(0)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    config = make_config("llama-full", str(here.directory))
    inputs = replace(prepare(config).inputs, eval_split=None)
    attempt = AttemptSpec("llama", 1, str(here.directory / "run"), config, inputs, on_gpu=True)
    init_process_group(open_store("127.0.0.1", 0, 1), 0, 1, True)
    return build_rank(RankSpec(attempt, 0, 1, 0, "127.0.0.1", torch.get_num_threads()))


class _Deaf:
    """A link that nobody listens to."""

    def send(self, message: object) -> None:
        """See `train.link.Link`."""

    def should_stop(self) -> bool:
        """See `train.link.Link`."""
        return False

    def wait_committed(self, step: int) -> None:
        """See `train.link.Link`."""


def _run(parts: Any) -> None:
    """Takes two steps of the loop, without a checkpoint."""
    from dist_ft.train import loop

    for step in range(2):
        loop._step(parts, _Deaf(), step, deque(), False)


def main(name: str, directory: str) -> int:
    """Runs one section and prints its answer."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    try:
        figures = SECTIONS[name](Place(Path(directory), torch.cuda.is_available()))
    except Skipped as reason:
        print(answer(str(reason)), flush=True)
        return SKIPPED_STATUS
    print(answer(figures=figures), flush=True)
    return 0


if __name__ == "__main__":
    status = main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # destructors of process groups may hang

"""Measures the embedded engine: tokens a second at 1, 4 and 16 requests in parallel, against a loop of `generate`.

    python benchmarks/serving.py [MODEL] [--tokens 48] [--rounds 3] [--threads N] [--peer]

With `--peer` the same prompts go to `transformers serve`, too, once as it is and once with its continuous batching. It
is a process of its own that is asked over HTTP, so the engine is compared by the CPU seconds that a token takes.

Both sides are in one process, in float32, with the same threads, and take turns, so that load of others hits both.
On a machine that others use, `--threads 1` and the ratio of CPU seconds say more than the clock.
Answers have a fixed length. The loop answers one prompt after the other, as many as the engine gets at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from openai import AsyncOpenAI, OpenAIError
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_ft.config import config_from_dict
from dist_ft.engine.answering import Engine
from dist_ft.engine.protocol import Accepted, Ask, EngineSpec, Piece, Prompt, Sampling
from dist_ft.machine import num_cores
from dist_ft.model.base import model_dir

PARALLEL = (1, 4, 16)


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--peer", action="store_true", help="also ask `transformers serve`")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    config = config_from_dict(
        {
            "run": {"name": "bench"}, "model": {"name": given.model, "dtype": "float32"},
            "data": {"train": [{"source": "-"}]},
        }
    )  # fmt: skip
    engine = Engine(EngineSpec(config.model_dump(mode="json")))
    directory = model_dir(config)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    prompts = [
        f"Order {n}: two red candles and {n} blue plates for Alex, shipped to Chicago. As JSON:" for n in range(16)
    ]
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    answer_all(engine, ids[:2], 4)
    loop(model, ids[:1], 4)
    for count in PARALLEL:
        speeds: dict[str, list[float]] = {"engine": [], "loop": [], "first": [], "cpu": [], "cpu_per_token": []}
        for _ in range(given.rounds):
            cpu_began = time.process_time()
            speeds["loop"].append(count * given.tokens / loop(model, ids[:count], given.tokens))
            cpu_middle = time.process_time()
            whole_s, first_s = answer_all(engine, ids[:count], given.tokens)
            cpu_s = time.process_time() - cpu_middle
            speeds["cpu"].append((cpu_middle - cpu_began) / cpu_s)
            speeds["cpu_per_token"].append(cpu_s / (count * given.tokens))
            speeds["engine"].append(count * given.tokens / whole_s)
            speeds["first"].append(first_s)
        found = {name: statistics.median(values) for name, values in speeds.items()}
        print(
            json.dumps(
                {
                    "parallel": count, "engine_tokens_per_s": round(found["engine"], 1),
                    "loop_tokens_per_s": round(found["loop"], 1), "ratio": round(found["engine"] / found["loop"], 2),
                    "ratio_of_cpu_seconds": round(found["cpu"], 2),
                    "cpu_s_per_token": round(found["cpu_per_token"], 4),
                    "time_to_first_token_s": round(found["first"], 3),
                    "max_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
                }
            )
        )  # fmt: skip

    if given.peer:
        for more in ([], ["--continuous-batching"]):
            with peer(directory, given.threads, more) as (url, process):
                for count in PARALLEL:
                    began, cpu_began = time.perf_counter(), cpu_of(process)
                    made = asyncio.run(ask_all(url, str(directory), prompts[:count], given.tokens))
                    whole_s, cpu_s = time.perf_counter() - began, cpu_of(process) - cpu_began
                    rate = {"tokens_per_s": round(made / whole_s, 1), "cpu_s_per_token": round(cpu_s / made, 4)}
                    print(json.dumps({"transformers serve": more, "parallel": count, "tokens": made, **rate}))


@contextmanager
def peer(directory: Path, threads: int, more: Sequence[str]) -> Iterator[tuple[str, psutil.Process]]:
    """Run `transformers serve`; yield its address and process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).parent / "transformers"), "serve", str(directory), "--dtype", "float32",
        "--device", "cpu", "--host", "127.0.0.1", "--port", str(port), *more,
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}/v1"
        asyncio.run(answered(url, str(directory), server))
        yield url, psutil.Process(server.pid)
    finally:
        server.terminate()
        server.wait(60)


async def answered(url: str, model: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until a server has answered once."""
    while True:
        try:
            await ask_all(url, model, ["warm up"], 4)
            return
        except OpenAIError:
            if server.poll() is not None:
                raise
            await asyncio.sleep(0.5)


async def ask_all(url: str, model: str, prompts: Sequence[str], tokens: int) -> int:
    """Ask a server for chats at once; return the tokens of its answers."""
    async with AsyncOpenAI(base_url=url, api_key="any", max_retries=0, timeout=600) as client:
        answers = [
            client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": prompt}], max_tokens=tokens, temperature=0
            )
            for prompt in prompts
        ]
        found = await asyncio.gather(*answers)
    return sum(answer.usage.completion_tokens for answer in found if answer.usage)


def cpu_of(process: psutil.Process) -> float:
    """Return the CPU seconds of a process."""
    times = process.cpu_times()
    return float(times.user + times.system)


def loop(model: AutoModelForCausalLM, prompts: Sequence[Sequence[int]], tokens: int) -> float:
    """Answer one prompt after the other with `generate`; return the seconds."""
    began = time.perf_counter()
    for prompt in prompts:
        ids = torch.tensor([prompt])
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens,
            min_new_tokens=tokens,
        )  # fmt: skip
    return time.perf_counter() - began


def answer_all(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, float]:
    """Answer all prompts at once; return the seconds, and those until the last one had its first token."""
    began = time.perf_counter()
    # The stops are made impossible, as for the loop.
    bias = tuple((token, -100.0) for token in engine.stops)
    for number, prompt in enumerate(prompts):
        sampling = Sampling(max_tokens=tokens, temperature=0.0, logit_bias=bias)
        taken = engine.submit(Ask(str(number), Prompt(tokens=tuple(prompt)), sampling))
        assert isinstance(taken, Accepted), taken
    first_s, seen = 0.0, set[str]()
    while not engine.is_idle:
        for event in engine.step():
            if isinstance(event, Piece) and event.id not in seen:
                seen.add(event.id)
                first_s = time.perf_counter() - began
    return time.perf_counter() - began, first_s


if __name__ == "__main__":
    main()

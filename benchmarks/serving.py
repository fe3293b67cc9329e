"""Measures the embedded engine: tokens a second at 1, 4 and 16 requests in parallel, against a loop of `generate`.

    python benchmarks/serving.py [MODEL] [--tokens 48] [--rounds 3] [--threads N]

Both sides are in one process, in float32, with the same threads, and take turns, so that load of others hits both.
On a machine that others use, `--threads 1` and the ratio of CPU seconds say more than the clock.
Answers have a fixed length. The loop answers one prompt after the other, as many as the engine gets at once.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Sequence

import torch
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
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    answer_all(engine, ids[:2], 4)
    loop(model, ids[:1], 4)
    for count in PARALLEL:
        speeds: dict[str, list[float]] = {"engine": [], "loop": [], "first": [], "cpu": []}
        for _ in range(given.rounds):
            cpu_began = time.process_time()
            speeds["loop"].append(count * given.tokens / loop(model, ids[:count], given.tokens))
            cpu_middle = time.process_time()
            whole_s, first_s = answer_all(engine, ids[:count], given.tokens)
            speeds["cpu"].append((cpu_middle - cpu_began) / (time.process_time() - cpu_middle))
            speeds["engine"].append(count * given.tokens / whole_s)
            speeds["first"].append(first_s)
        found = {name: statistics.median(values) for name, values in speeds.items()}
        print(
            json.dumps(
                {
                    "parallel": count, "engine_tokens_per_s": round(found["engine"], 1),
                    "loop_tokens_per_s": round(found["loop"], 1), "ratio": round(found["engine"] / found["loop"], 2),
                    "ratio_of_cpu_seconds": round(found["cpu"], 2),
                    "time_to_first_token_s": round(found["first"], 3),
                    "max_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
                }
            )
        )  # fmt: skip


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

"""Shows the fine-tuning service from end to end: key, server, upload, a job on the tiny model, its weights, answers.

Run it with `make service-smoke`. It needs about two minutes on two cores; its store is removed in the end.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from openai import OpenAI, OpenAIError

_LIMIT_S = 600.0
_CLI = [sys.executable, "-m", "dist_ft.cli"]


def main() -> int:
    """Run the whole way; return the exit code."""
    with tempfile.TemporaryDirectory(prefix="dist-ft-service-") as store:
        made = subprocess.run(
            [*_CLI, "api", "key", "add", "--store", store, "--role", "admin"],
            capture_output=True,
            text=True,
            check=True,
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = subprocess.Popen([*_CLI, "serve-api", "--store", store, "--port", str(port), "--launcher", "local"])
        try:
            return drive(f"http://127.0.0.1:{port}", made.stdout.split()[-1])
        finally:
            server.terminate()
            server.wait(60)


def drive(url: str, key: str) -> int:
    """Fine-tune the tiny model as a client does; return the exit code."""
    client = OpenAI(base_url=f"{url}/v1", api_key=key)
    base = _first_model(client)
    turns = [
        [{"role": "user", "content": f"{n} + 1?"}, {"role": "assistant", "content": f"{n + 1}"}] for n in range(16)
    ]
    rows = "".join(json.dumps({"messages": messages}) + "\n" for messages in turns)
    file = client.files.create(file=("sums.jsonl", rows.encode()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=base, training_file=file.id, validation_file=file.id, hyperparameters={"n_epochs": 3, "batch_size": 4}
    )
    deadline = time.monotonic() + _LIMIT_S
    while (now := client.fine_tuning.jobs.retrieve(job.id)).status not in ("succeeded", "failed", "cancelled"):
        if time.monotonic() > deadline:
            break
        time.sleep(1)
    for event in reversed(list(client.fine_tuning.jobs.list_events(job.id))):
        print(event.message)
    if now.status != "succeeded":
        print(f"the job is {now.status}: {now.error}", file=sys.stderr)
        return 1
    print(client.files.content(now.result_files[0]).text)
    request = urllib.request.Request(
        f"{url}/v1/fine_tuning/jobs/{job.id}/weights", headers={"authorization": f"Bearer {key}"}
    )
    with urllib.request.urlopen(request) as answer:
        names = [entry["name"] for entry in json.load(answer)["data"]]
    checkpoint = client.fine_tuning.jobs.checkpoints.list(job.id).data[-1].fine_tuned_model_checkpoint
    for name in (base, checkpoint, now.fine_tuned_model):
        print(f"{name}: {_answer(client, name)!r}")
    print(json.dumps({"model": now.fine_tuned_model, "trained_tokens": now.trained_tokens, "weights": names}))
    return 0 if any(Path(name).suffix == ".safetensors" for name in names) else 1


def _answer(client: OpenAI, model: str) -> str:
    """Return what a model says; the first request starts the inference server."""
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "7 + 1?"}], max_tokens=8, temperature=0, stream=True
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)


def _first_model(client: OpenAI) -> str:
    """Return the first base model, once the server answers."""
    deadline = time.monotonic() + 60
    while True:
        try:
            return client.models.list().data[0].id
        except OpenAIError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())

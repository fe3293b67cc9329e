#!/usr/bin/env python3
"""Runs configs/smoke/lora.yaml and shows what the model learnt; the last line is JSON.

    python launch/smoke.py [a.b=value ...]

What `make smoke` does. Exit code: that of `dist-ft train`; 1 if fewer than 0.9 of the tuned model's answers are right.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEARNT = 0.9


def main() -> int:
    """Trains, prints base against tuned, ends with the JSON line."""
    name = f"run.name=smoke-{time.strftime('%Y%m%d-%H%M%S')}"
    command = [
        str(Path(sys.executable).parent / "dist-ft"),
        "train",
        "configs/smoke/lora.yaml",
        name,
        *sys.argv[1:],
    ]
    done = subprocess.run([*command, "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        return done.returncode
    result = json.loads(done.stdout.splitlines()[-1])
    evaluation = result["evaluation"]
    first_loss = json.loads((Path(result["run_dir"]) / "eval.jsonl").read_text().splitlines()[0])["eval_loss"]
    print(f"\n{'':14}{'base':>10}{'tuned':>10}")
    print(f"{'held-out loss':14}{first_loss:10.4f}{result['eval_loss']:10.4f}")
    print(f"{'exact match':14}{evaluation['base']['exact_match']:10.3f}{evaluation['tuned']['exact_match']:10.3f}")
    sample = evaluation["samples"][0]
    print(f"\nrequest  {sample['prompt']}")
    print(f"base     {' '.join(sample['base'].split())[:160]}")
    print(f"tuned    {sample['tuned'].strip()}")
    print(f"wanted   {sample['reference']}")
    print(f"\nadapter  {result['export_dir']}\n")
    scores = {f"{who}_exact_match": round(evaluation[who]["exact_match"], 4) for who in ("base", "tuned")}
    print(json.dumps({**scores, "train_s": result["train_s"]}))
    return 0 if scores["tuned_exact_match"] >= LEARNT else 1


if __name__ == "__main__":
    sys.exit(main())

"""The smoke run, cut short: a real pretrained model begins to learn the task, and the adapter loads with stock peft.

`make smoke` runs it to its end and fails if the model has not learnt the task.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dist_ft.run.log import read_evals
from tests.helpers.paths import ROOT

STEPS = 8


@pytest.mark.timeout(1500)
def test_the_smoke_run_teaches_the_task(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "launch/smoke.py", f"run.output_dir={tmp_path}", f"train.max_steps={STEPS}",
         "eval.max_rows=8"], cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == {"base_exact_match", "tuned_exact_match", "train_s"}
    assert result["base_exact_match"] == 0
    assert done.returncode == (0 if result["tuned_exact_match"] >= 0.9 else 1), "what was learnt decides"
    (run_dir,) = tmp_path.glob("smoke-*")
    before, after = (row.metrics["eval_loss"] for row in read_evals(run_dir / "eval.jsonl").values())
    assert before > 2.5
    assert after < 0.3
    code = """
import sys, json
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.paths import ROOT
export, base = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), export)
tokenizer = AutoTokenizer.from_pretrained(export)
turns = [{"role": "system", "content": "Turn the request into JSON."},
         {"role": "user", "content": "Please send two red mugs to Anna in Oslo."}]
inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
tokens = model.generate(**inputs, max_new_tokens=48, do_sample=False)
print(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
"""
    find_base = "from dist_ft.model.embedded import materialise; print(materialise('smollm2-135m-instruct'))"
    base = subprocess.run([sys.executable, "-c", find_base], capture_output=True, text=True, check=True).stdout.strip()
    answer = subprocess.run(
        [sys.executable, "-c", code, str(run_dir / "exports" / "final"), base],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()[-1]  # fmt: skip
    assert set(json.loads(answer)) == {"name", "item", "count", "color", "city", "priority"}

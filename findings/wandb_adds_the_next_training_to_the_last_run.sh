#!/usr/bin/env bash
# Two trainings in one process, each with a Trainer of its own, report_to="wandb" and a run_name of
# its own: a sweep, folds, a student and its control. One expects two runs. There is one, under the
# first name: Trainer's callback makes a run only where wandb has none, and never ends it. The
# second training is logged on behind the first, and its learning rate replaces the first one's in
# the configuration of the run. Call wandb.finish() after each train().
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 \
  numpy==2.4.6 wandb==0.31.0
cd "$work"
export HOME="$work" WANDB_MODE=offline WANDB_SILENT=true WANDB_DIR="$work/without"
mkdir "$work/without" "$work/with"
cat >train.py <<'PY'
import glob
import os
import sys

import torch, transformers, wandb
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

rows = [{"input_ids": list(range(5, 15)), "labels": list(range(5, 15))}] * 4
config = BertConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                    intermediate_size=32)
print(f"transformers {transformers.__version__}, wandb {wandb.__version__}")
seen = []
for name, rate in (("first", 1e-3), ("second", 1e-5)):
    arguments = TrainingArguments(
        f"out-{name}", max_steps=3, learning_rate=rate, logging_steps=1, run_name=name,
        report_to="wandb", use_cpu=True, save_strategy="no", disable_tqdm=True,
    )
    trainer = Trainer(BertForMaskedLM(config), arguments, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    seen.append((wandb.run.name, wandb.run.id, wandb.config["learning_rate"], wandb.run.step))
    if "finish" in sys.argv:
        wandb.finish()
wandb.finish()
for name, one in zip(("first", "second"), seen):
    print(f"seen: training {name!r} in run {one[0]!r} ({one[1]}), lr {one[2]:g}, log line {one[3]}")
runs = glob.glob(os.environ["WANDB_DIR"] + "/wandb/offline-run-*")
print(f"seen: {len(runs)} run(s)")
together = len(runs) == 1 and seen[0][:2] == seen[1][:2] and seen[1][3] > seen[0][3]
if [one[2] for one in seen] != [1e-3, 1e-5]:
    sys.exit("changed: the learning rate of the run")
apart = len(runs) == 2 and [one[0] for one in seen] == ["first", "second"]
if not (apart if "finish" in sys.argv else together):
    sys.exit("changed: " + ("finish() does not part them" if "finish" in sys.argv else "apart"))
PY
echo "expected: two runs, 'first' and 'second'"
"$work/venv/bin/python" train.py 2>log.txt || { cat log.txt >&2; exit 1; }
echo "with wandb.finish() after each:"
export WANDB_DIR="$work/with"
"$work/venv/bin/python" train.py finish 2>log.txt || { cat log.txt >&2; exit 1; }

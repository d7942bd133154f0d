#!/usr/bin/env bash
# Training again into the same output_dir, from the start, with other settings: checkpoints of the
# first run are still there. The second run is stopped and called again with
# resume_from_checkpoint=True, documented as the last checkpoint that an earlier Trainer saved. One
# expects the one written last, as save_total_limit goes by time: it deletes the old run's files
# first and keeps the new one. Resuming goes by the number in the name. So the old run's end is
# opened, all steps count as done, nothing is trained, and what is saved is the first run's model
# under the second run's settings, without a warning. Use a new output_dir for each run, or name
# the checkpoint.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cd "$work"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
"$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import os, sys, time
from pathlib import Path

import torch, transformers
from transformers import (BertConfig, BertForMaskedLM, Trainer, TrainerCallback, TrainingArguments,
                          set_seed)

torch.manual_seed(0)
rows = [{"input_ids": row, "labels": row} for row in torch.randint(5, 50, (64, 4))]
config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                    intermediate_size=64)


class Stop(TrainerCallback):
    """Stands for a machine that goes away during the third step."""

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 3


def trained(rate, stop=False, resume=None):
    set_seed(0)
    arguments = TrainingArguments(
        "out", learning_rate=rate, max_steps=8, save_steps=2, save_total_limit=2,
        per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
        logging_strategy="no")
    trainer = Trainer(BertForMaskedLM(config), arguments, train_dataset=rows,
                      callbacks=[Stop()] if stop else [])
    sys.stdout = open(os.devnull, "w")
    trainer.train(resume_from_checkpoint=resume)
    sys.stdout = sys.__stdout__
    return trainer.model.state_dict()


def folders():
    return sorted(path.name for path in Path("out").glob("checkpoint-*"))


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("expected: the stopped run goes on from the checkpoint that it has just written")
first = trained(1e-2)
left = folders()
time.sleep(2)  # Rotation goes by time where the folders are at least a second apart.
trained(1e-3, stop=True)
rotated = folders()
print(f"seen: the first run left {left}; the second, stopped after step 3, {rotated}")
resumed = trained(1e-3, resume=True)
print(f"seen: resumed with True, the model is the first run's: {same(resumed, first)}")
named = trained(1e-3, resume="out/checkpoint-2")
whole = trained(1e-3)
print(f"seen: resumed from checkpoint-2 by name, it is that of the second run without a stop: "
      f"{same(named, whole)}, and the first run's: {same(named, first)}")
if left != ["checkpoint-6", "checkpoint-8"] or rotated != ["checkpoint-2", "checkpoint-8"]:
    sys.exit("changed: the rotation")
if not same(resumed, first):
    sys.exit("changed: what True resumes")
if not same(named, whole) or same(named, first):
    sys.exit("changed: what helps")
PY

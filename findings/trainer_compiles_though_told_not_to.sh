#!/usr/bin/env bash
# A training script with TrainingArguments(torch_compile=False), started by accelerate launch, where
# the saved accelerate config names a dynamo backend, answered once for another project. One
# expects the script's word to count, as it does with torch_compile=True, or a warning. For False,
# Trainer hands accelerate no backend, which reads that as "not said" and takes the one of the
# environment. The model is compiled while the arguments say false, so the same script is another
# program under accelerate launch than under python, without a word. Look at trainer.model_wrapped,
# or set ACCELERATE_DYNAMO_BACKEND=no within the script.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cd "$work"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
cat >train.py <<'PY'
import os, sys
import accelerate, torch, torch._dynamo, transformers
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

if sys.argv[1] == "helped":
    os.environ["ACCELERATE_DYNAMO_BACKEND"] = "no"
rows = [{"input_ids": row, "labels": row} for row in torch.randint(5, 50, (8, 4))]
config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                    intermediate_size=64)
arguments = TrainingArguments(
    "out", torch_compile=False, max_steps=2, per_device_train_batch_size=4, save_strategy="no",
    report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no")
trainer = Trainer(BertForMaskedLM(config), arguments, train_dataset=rows)
sys.stdout = open(os.devnull, "w")
trainer.train()
sys.stdout = sys.__stdout__
compiled = isinstance(trainer.model_wrapped, torch._dynamo.OptimizedModule)
if sys.argv[1] == "no":
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, "
          f"accelerate {accelerate.__version__}")
    print("expected: not compiled, whatever the config")
print(f"seen: config {sys.argv[1]}, torch_compile={arguments.torch_compile}: "
      f"{type(trainer.model_wrapped).__name__}, graphs compiled: "
      f"{torch._dynamo.utils.counters['stats']['unique_graphs']}")
if compiled != (sys.argv[1] == "eager"):
    sys.exit(f"changed: {sys.argv[1]}")
PY
for backend in no eager helped; do
    cat >config.yaml <<YAML
compute_environment: LOCAL_MACHINE
distributed_type: 'NO'
mixed_precision: 'no'
num_machines: 1
num_processes: 1
use_cpu: true
YAML
    if [ "$backend" != no ]; then
        printf 'dynamo_config:\n  dynamo_backend: EAGER\n' >>config.yaml
    fi
    "$work/venv/bin/accelerate" launch --config_file config.yaml train.py "$backend" 2>log.txt ||
        { cat log.txt >&2; exit 1; }
done

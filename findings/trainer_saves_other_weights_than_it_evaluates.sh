#!/usr/bin/env bash
# A schedule-free optimizer in Trainer: optim="schedule_free_adamw". These keep two sets of
# weights, one to take gradients at and an average, which is the model that is meant to be used;
# the optimizer's eval() and train() exchange them. Trainer documents the optimizer and calls both.
# One expects save_model() after train() to write the model that evaluate() measures. Trainer calls
# eval() at evaluations alone, so it saves the other weights, and checkpoints hold them too, unless
# an evaluation came just before. The saved student is the noisier one: its loss is higher than the
# loss that evaluate() reports a line later, and no warning is given. Call evaluate() right before
# save_model(), and evaluate at the steps that save.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 \
  schedulefree==1.4.1
cd "$work"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
"$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import importlib.metadata, sys
import torch, transformers
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
likely = (torch.randn(50, 50) * 2).softmax(-1)  # A word's label, at random.


def texts(number):
    ids = torch.randint(5, 50, (number, 4))
    return [{"input_ids": row, "labels": torch.multinomial(likely[row], 1)[:, 0]} for row in ids]


train, held_out = texts(2048), texts(512)
config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                    intermediate_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                    tie_word_embeddings=False)


def saved_loss(folder):
    model = BertForMaskedLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return float(model(**{name: torch.stack([row[name] for row in held_out])
                              for name in ("input_ids", "labels")}).loss)


def run(optim, **more):
    torch.manual_seed(0)
    arguments = TrainingArguments(
        optim, optim=optim, lr_scheduler_type="constant", learning_rate=0.01, num_train_epochs=2,
        per_device_train_batch_size=4, per_device_eval_batch_size=512, report_to=[], use_cpu=True,
        disable_tqdm=True, logging_strategy="no", save_strategy="epoch", **more)
    trainer = Trainer(BertForMaskedLM(config), arguments, train_dataset=train, eval_dataset=held_out)
    trainer.train()
    trainer.save_model(f"{optim}/end")
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model(f"{optim}/later")
    return {"evaluate": loss, "save_model": saved_loss(f"{optim}/end"),
            "checkpoint": saved_loss(f"{optim}/checkpoint-1024"),
            "save_model after evaluate": saved_loss(f"{optim}/later")}


print(f"torch {torch.__version__}, transformers {transformers.__version__}, "
      f"schedulefree {importlib.metadata.version('schedulefree')}")
print("expected: one held-out loss of what evaluate() measures and of what is saved")
usual, free = run("adamw_torch"), run("schedule_free_adamw")
for name, losses in (("adamw_torch", usual), ("schedule_free_adamw", free)):
    print(f"seen: {name}: {({key: round(loss, 4) for key, loss in losses.items()})}")
both = run("schedule_free_adamw", eval_strategy="epoch")
print(f"seen: with an evaluation before each checkpoint: {both['checkpoint']:.4f}")
if max(usual.values()) - min(usual.values()) > 1e-3:
    sys.exit("changed: AdamW")
if min(free["save_model"], free["checkpoint"]) - free["evaluate"] < 0.01:
    sys.exit("changed: what is saved is what is evaluated")
if abs(free["save_model after evaluate"] - free["evaluate"]) > 1e-3:
    sys.exit("changed: what helps")
if abs(both["checkpoint"] - both["evaluate"]) > 1e-3:
    sys.exit("changed: an evaluation before a checkpoint")
PY

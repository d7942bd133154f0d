#!/usr/bin/env bash
# Gradient accumulation in Trainer with a masked LM. One expects one batch of 8, and 4 batches of 2
# that are accumulated, to give the same loss and gradient; they do for ModernBERT. For BERT and
# RoBERTa both are 4 times as large with 4 batches. Trainer divides neither by 4, since the forward
# pass takes extra arguments and so could divide by the number of labels in all batches; these
# models leave that number unused. One who changes the accumulation to fit a smaller card trains
# with other clipping, and reads losses that do not compare. Give Trainer a compute_loss_func that
# divides.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import sys, torch, transformers
from transformers import (AutoConfig, AutoModelForMaskedLM, PrinterCallback, Trainer,
                          TrainerCallback, TrainingArguments)

transformers.logging.set_verbosity_error()
small = dict(vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
             intermediate_size=64, max_position_embeddings=64, pad_token_id=0, bos_token_id=1,
             eos_token_id=2, cls_token_id=1, sep_token_id=2)
still = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


class Norm(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **rest):
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.norm = float(torch.cat(gradients).norm())


def divided(outputs, labels, num_items_in_batch=None):
    logits = outputs.logits.flatten(0, 1)
    total = torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
    return total / num_items_in_batch


def step(kind, batch, loss=None):
    torch.manual_seed(0)
    dropout = {} if kind == "modernbert" else still
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(kind, **small, **dropout))
    ids = torch.randint(5, 90, (8, 16))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    norm = Norm()
    settings = TrainingArguments("out", per_device_train_batch_size=batch, max_steps=1,
                                 gradient_accumulation_steps=8 // batch, max_grad_norm=0,
                                 use_cpu=True, report_to=[], save_strategy="no",
                                 disable_tqdm=True)
    trainer = Trainer(model=model, args=settings, train_dataset=rows, callbacks=[norm],
                      compute_loss_func=loss)
    trainer.remove_callback(PrinterCallback)
    return trainer.train().training_loss, norm.norm


print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("expected: 4 batches of 2 give 1.00 of the loss and the gradient of one batch of 8")
seen = {}
for kind, loss in (("bert", None), ("roberta", None), ("modernbert", None), ("bert", divided)):
    whole, parts = step(kind, 8, loss), step(kind, 2, loss)
    name = kind if loss is None else f"{kind}, divided"
    seen[name] = [b / a for a, b in zip(whole, parts)]
    print(f"seen: {name:13s} loss {seen[name][0]:.2f}, gradient {seen[name][1]:.2f}")
right = {"bert": 4, "roberta": 4, "modernbert": 1, "bert, divided": 1}
if any(abs(x - right[name]) > 0.01 for name, pair in seen.items() for x in pair):
    sys.exit("changed: the accumulation has another effect on the loss or gradient")
PY

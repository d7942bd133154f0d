#!/usr/bin/env bash
# A classifier on top of a masked LM, trained as a LoRA adapter of task type SEQ_CLS. One expects
# the adapter to hold all that the checkpoint lacks. A masked LM of BERT, ALBERT or DeBERTa-v2 has
# no pooler, so the pooler is drawn at random, as the classifier is. peft trains and saves modules
# named "classifier" or "score" alone. The random pooler stays as it was drawn, goes into no file,
# and is drawn anew when the adapter is opened: other predictions than in training, without an
# error. RoBERTa and ELECTRA have no pooler there and are right. Pass
# modules_to_save=["classifier", "pooler"].
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import sys
import peft, torch, transformers
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSequenceClassification

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
small = dict(vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
             intermediate_size=64, pad_token_id=0, initializer_range=0.2)
ids = torch.randint(5, 90, (32, 12))


def opened(seed):
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained("mlm", num_labels=3)


def predictions(model):
    with torch.no_grad():
        return model.eval()(ids).logits.argmax(-1)


def kept(kind, modules):
    """The share of predictions that are the same after saving and opening."""
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(AutoConfig.for_model(kind, **small)).save_pretrained("mlm")
    target = ["query_proj", "value_proj"] if kind == "deberta-v2" else ["query", "value"]
    model = get_peft_model(opened(1), LoraConfig(task_type=TaskType.SEQ_CLS, r=4,
                                                 target_modules=target, modules_to_save=modules))
    before = predictions(model)
    model.save_pretrained("adapter")
    after = predictions(PeftModel.from_pretrained(opened(2), "adapter"))
    return float((before == after).float().mean())


print(f"torch {torch.__version__}, transformers {transformers.__version__}, "
      f"peft {peft.__version__}")
print("expected: 100 % of the predictions are the same after saving and opening")
for kind in ("bert", "albert", "deberta-v2", "roberta", "electra"):
    usual = kept(kind, None)
    pooled = kind not in ("roberta", "electra")
    line = f"seen: {kind:10s} {usual:.0%}"
    if pooled:
        named = kept(kind, ["classifier", "pooler"])
        line += f"; with the pooler in modules_to_save {named:.0%}"
        if named != 1:
            sys.exit(f"changed: modules_to_save does not keep the pooler of {kind}")
    print(line)
    if (usual < 1) != pooled:
        sys.exit(f"changed: {kind}")
PY

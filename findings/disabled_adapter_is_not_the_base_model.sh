#!/usr/bin/env bash
# A LoRA adapter whose own base model is the teacher: one model in memory, and its answers without
# the adapter, "with model.disable_adapter()", which peft documents as the way to run the base
# model. One expects that of any LoRA. With init_lora_weights="pissa" or "olora" peft takes the
# first directions of each weight out of the base and puts them into the adapter. So the base
# without the adapter lacks what matters most, before any training: here its answers are about as
# far from the base model's as those of another model. peft does not warn. The student learns from
# a damaged teacher. Open the base model a second time, or save the
# adapter with path_initial_model_for_weight_conversion and open that on the base model.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$work"
export HF_HUB_OFFLINE=1
"$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import sys, warnings
import peft, torch, transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertForMaskedLM

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
BertForMaskedLM(BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                           intermediate_size=64, initializer_range=0.2)).save_pretrained("base")
ids = torch.randint(5, 60, (16, 12))


def base():
    return BertForMaskedLM.from_pretrained("base").eval()


def answers(model):
    with torch.no_grad():
        return model(input_ids=ids).logits


def without_adapter(model):
    with model.disable_adapter():
        return answers(model)


def lora(kind):
    return get_peft_model(base(), LoraConfig(r=8, target_modules=["query", "key", "value", "dense"],
                                             exclude_modules=".*predictions.*",
                                             init_lora_weights=kind)).eval()


def distance(logits):
    """Mean KL from the base model, in nats, and how often the first choice is the same."""
    told, said = teacher.log_softmax(-1), logits.log_softmax(-1)
    kl = (told.exp() * (told - said)).sum(-1).mean()
    same = (teacher.argmax(-1) == logits.argmax(-1)).float().mean()
    return round(float(kl), 4), round(float(same), 2)


teacher = answers(base())
print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}")
print("expected: KL 0.0, agreement 1.0, with the adapter disabled")
seen = {}
for kind in (True, "gaussian", "orthogonal", "pissa", "olora"):
    model = lora(kind)
    if distance(answers(model)) != (0.0, 1.0):
        sys.exit("changed: a new adapter alters the answers")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        seen[kind] = distance(without_adapter(model))
    print(f"seen: init_lora_weights={kind!r}: KL {seen[kind][0]}, agreement {seen[kind][1]}, "
          f"{len(said)} warnings")
    if said:
        sys.exit("changed: peft warns")
if any(seen[kind] != (0.0, 1.0) for kind in (True, "gaussian", "orthogonal")):
    sys.exit("changed: other beginnings")
if any(seen[kind][0] < 0.05 or seen[kind][1] > 0.8 for kind in ("pissa", "olora")):
    sys.exit("changed: the disabled adapter leaves the base model")
model = lora("pissa")
model.peft_config["default"].init_lora_weights = True
model.save_pretrained("start")
model.peft_config["default"].init_lora_weights = "pissa"
step = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], 0.1)
model(input_ids=ids, labels=ids).loss.backward()
step.step()
trained = answers(model)
model.save_pretrained("adapter", path_initial_model_for_weight_conversion="start")
opened = PeftModel.from_pretrained(base(), "adapter").eval()
if not torch.allclose(answers(opened), trained, atol=1e-4):
    sys.exit("changed: the converted adapter")
print(f"seen: converted and opened on the base model: {distance(without_adapter(opened))}")
if distance(without_adapter(opened)) != (0.0, 1.0):
    sys.exit("changed: what helps")
PY

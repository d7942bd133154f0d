#!/usr/bin/env bash
# LoRA on the LM head of a BERT or RoBERTa whose head shares its weight with the word embeddings,
# as nearly all do. One expects merge_and_unload to give the model that was trained. The adapter
# adds to the head alone, but merging adds to the shared weight, so the word embeddings change
# with it and the merged model answers otherwise. There is no error, and no warning for these
# names of modules. Keep the head out of target_modules, or give it a copy of the weight and set
# tie_word_embeddings=False in the configuration first.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import sys, warnings
import peft, torch, transformers
from peft import LoraConfig, get_peft_model
from torch.nn import Parameter
from transformers import AutoConfig, AutoModelForMaskedLM

small = dict(vocab_size=90, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
             intermediate_size=64, pad_token_id=0)
torch.manual_seed(0)
ids = torch.randint(5, 90, (4, 12))


def moved(kind, modules, untie=False):
    """The largest change of a logit by merging, over the logits' deviation; words of warnings."""
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(kind, **small)).eval()
    if untie:
        model.config.tie_word_embeddings = False
        decoder = model.get_output_embeddings()
        decoder.weight = Parameter(decoder.weight.detach().clone())
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        model = get_peft_model(model, LoraConfig(r=4, target_modules=modules)).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        before = model(ids).logits
        after = model.merge_and_unload()(ids).logits
    said = sum("tied" in str(one.message) or "tie_word" in str(one.message) for one in caught)
    return float((before - after).abs().max() / before.std()), said


print(f"torch {torch.__version__}, transformers {transformers.__version__}, "
      f"peft {peft.__version__}")
print("expected: the same logits before merging and after")
for kind in ("bert", "roberta"):
    head, said = moved(kind, ["query", "value", "decoder"])
    layers, untied = moved(kind, ["query", "value"])[0], moved(kind, ["decoder"], untie=True)[0]
    print(f"seen: {kind:7s} the largest logit moves by {head:.1f} deviations, {said} warnings "
          f"about tied weights; LoRA in the layers alone {layers:.0e}, untied head {untied:.0e}")
    if head < 0.1 or said:
        sys.exit(f"changed: merging into the head of {kind} keeps the logits, or warns")
    if layers > 1e-4 or untied > 1e-4:
        sys.exit(f"changed: another merge in {kind} moves the logits")
PY

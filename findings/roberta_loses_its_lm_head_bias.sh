#!/usr/bin/env bash
# RoBERTa's LM head has one bias by two names, lm_head.bias and lm_head.decoder.bias. Saved models
# hold it by the first. One expects from_pretrained to give back what save_pretrained wrote. In
# transformers 4.44 to 4.48 the second name, which is not in the file, is filled with zeros, and the
# tie then goes from there: predictions are those of a model without that bias. No error is raised.
# 4.51 and 5 give it back. The same holds for XLM-RoBERTa, CamemBERT, Longformer, Data2Vec, I-BERT
# and X-MOD. What helps where old versions read: write the bias into the file by both names.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
versions="4.44.2 4.48.3 4.51.3 5.24.0"
for version in $versions; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q torch==2.13.0 "transformers==$version" "numpy<2.3"
done
cd "$work"
cat > ask.py <<'PY'
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import CamembertConfig, CamembertForMaskedLM, RobertaConfig, RobertaForMaskedLM
from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

transformers.logging.set_verbosity_error()
shape = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
         "num_attention_heads": 2, "max_position_embeddings": 40}
ids = torch.arange(5, 25)[None]
lost = kept = 0
for config, model_class in ((RobertaConfig, RobertaForMaskedLM), (CamembertConfig, CamembertForMaskedLM),
                            (XLMRobertaConfig, XLMRobertaForMaskedLM)):
    torch.manual_seed(0)
    model = model_class(config(**shape)).eval()
    with torch.no_grad():
        model.lm_head.bias.normal_()
        wanted = model(ids).logits
        model.save_pretrained("saved")
        found = model_class.from_pretrained("saved").eval()
        gap = (found(ids).logits - wanted).abs().max()
        lost += bool(gap > 1) and not found.lm_head.bias.any()
        tensors = load_file("saved/model.safetensors")
        tensors["lm_head.decoder.bias"] = tensors["lm_head.bias"].clone()
        save_file(tensors, "saved/model.safetensors", metadata={"format": "pt"})
        both = model_class.from_pretrained("saved").eval()
        kept += torch.allclose(both(ids).logits, wanted, atol=1e-5)
print(f"transformers {transformers.__version__}: bias lost by {lost} of 3, kept by {kept} of 3 from both names")
PY
export HF_HUB_OFFLINE=1
for version in $versions; do "$version/bin/python" ask.py 2>/dev/null | tee -a seen; done
for version in 4.44.2 4.48.3; do grep -q "$version: bias lost by 3 of 3, kept by 3" seen || exit 1; done
for version in 4.51.3 5.24.0; do grep -q "$version: bias lost by 0 of 3, kept by 3" seen || exit 1; done
echo "seen: 4.44 to 4.48 open a saved RoBERTa without its bias, unless it is there by both names"

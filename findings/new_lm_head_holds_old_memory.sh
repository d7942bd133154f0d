#!/usr/bin/env bash
# An encoder that was saved without its LM head (a sentence encoder, a classifier) and is opened as
# a masked LM, to train it further or to start a student from it. One expects a new head: random
# weights, and zeros for the bias, as the constructor makes them, and transformers says that they
# were "newly initialized". That holds for BERT, RoBERTa and most others. For Longformer,
# Data2VecText, FNet and Nystromformer nothing is written into the bias of the logits: it is
# whatever lay in that memory. torch can fill such memory with NaN, to show it. Set the bias to zero
# after opening.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import sys
import torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

transformers.logging.set_verbosity_error()
torch.use_deterministic_algorithms(True)  # Fills memory that nothing was written to with NaN.
kinds = {"bert": {}, "roberta": {}, "longformer": {"attention_window": 8}, "data2vec-text": {},
         "fnet": {}, "nystromformer": {}}
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
print("expected: biases of the logits that are missing in the file are zeros, as in a new model")
seen = {}
for kind, more in kinds.items():
    config = AutoConfig.for_model(kind, vocab_size=99, hidden_size=32, num_hidden_layers=1,
                                  num_attention_heads=2, intermediate_size=32,
                                  max_position_embeddings=64, pad_token_id=1, **more)
    AutoModel.from_config(config).save_pretrained(kind)
    made = AutoModelForMaskedLM.from_config(config), AutoModelForMaskedLM.from_pretrained(kind)
    biases = [model.get_output_embeddings().bias.detach() for model in made]
    seen[kind] = bool(biases[1].isnan().any())
    print(f"seen: {kind}: of 99 biases {int((biases[0] != 0).sum())} are not zero in a new model; "
          f"{int(biases[1].isnan().sum())} are never written in one that was opened")
    if biases[0].any():
        sys.exit("changed: a new model has other biases than zeros")
if list(seen.values()) != [False] * 2 + [True] * 4:
    sys.exit("changed: other models leave their bias unwritten")
PY

#!/usr/bin/env bash
# A RoBERTa, or a CamemBERT or XLM-R, whose padding token has id 0, as BERT's has: one gets it by
# training a tokenizer and a model of one's own. Positions begin at pad_token_id + 1, here at 1. One
# expects CTranslate2's converter to follow that, as it does for the published vocabularies, where
# the padding is 1: their states agree to the last digits, so a trial passes. It skips the rows
# before the first position only where the padding is not 0. With 0 each token gets the position of
# the one before it, and the first the row of the padding: other states in every layer, without a
# word. After converting, compare the states of one text. Where you train one yourself, give the
# padding another id than 0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==4.57.6 ctranslate2==4.8.5 numpy==2.3.5
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import sys

import ctranslate2, numpy, torch, transformers
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NAMES = {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>", "bos_token": "<s>",
         "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}


def folder_of(kind, pad):
    """A model of random weights that is saved with a tokenizer of its own."""
    words = ["<s>", "</s>", "<unk>", "<mask>", *(f"word{number}" for number in range(45))]
    words.insert(pad, "<pad>")
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = getattr(transformers, kind + "Config")(
        vocab_size=50, hidden_size=32, num_attention_heads=2, num_hidden_layers=2,
        intermediate_size=64, max_position_embeddings=40, pad_token_id=pad, initializer_range=0.2)
    model = getattr(transformers, kind + "ForMaskedLM")(config).eval()
    folder = f"{kind}-{pad}"
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=inner, **NAMES).save_pretrained(folder)
    return folder, model


def converted_states(folder, ids):
    """The last hidden states (tokens, width) that CTranslate2 gives."""
    TransformersConverter(folder).convert(folder + "-converted")
    encoder = ctranslate2.Encoder(folder + "-converted", compute_type="float32")
    return torch.from_numpy(numpy.array(encoder.forward_batch([ids]).last_hidden_state)[0])


print(f"ctranslate2 {ctranslate2.__version__}, transformers {transformers.__version__}")
print("expected: the converted model gives the model's own states, whichever id the padding has")
ids = list(range(10, 20))
for kind in ("Roberta", "XLMRoberta", "Camembert"):
    for pad in (0, 1, 4):
        folder, model = folder_of(kind, pad)
        states = converted_states(folder, ids)
        with torch.no_grad():
            own = model.base_model(torch.tensor([ids])).last_hidden_state[0]
            early = model.base_model(  # Positions from 0 on, the row of the padding first.
                torch.tensor([ids]), position_ids=torch.arange(len(ids))[None]).last_hidden_state[0]
        off = float((states - own).abs().max())
        print(f"seen: {kind:10s} padding {pad}: differs by up to {off:.6f}, states are of size "
              f"{float(own.abs().mean()):.2f}")
        if pad and off > 1e-4:
            sys.exit("changed: other padding")
        if not pad and (off < 0.1 or float((states - early).abs().max()) > 1e-4):
            sys.exit("changed: padding 0")
print("seen: with padding 0 the states are those of positions 0, 1, 2 ... in place of 1, 2, 3 ...")
PY

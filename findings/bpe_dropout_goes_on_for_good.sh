#!/usr/bin/env bash
# BPE dropout: a BPE that skips merges at random while a model is trained, so that it meets words
# in other pieces, too. One expects it to end with training, as dropout of a model ends with eval().
# It is a field of the tokenizer, which goes into tokenizer.json, and each opening of the file cuts
# at random again. torch.manual_seed does not seed it. A teacher whose answers were stored read
# another cut than the student will, and the same model scores otherwise each time. Set
# backend_tokenizer.model.dropout to None, after training or after opening.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3
cd "$work"
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error
"$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import sys
import tokenizers, torch, transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

torch.manual_seed(0)
special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
texts = [f"the {a} {b} walks slowly over the {c} bridge" for a in ("old", "young", "tired")
         for b in ("woman", "soldier", "doctor") for c in ("narrow", "wooden", "broken")]
made = Tokenizer(models.BPE(dropout=0.1))
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
made.train_from_iterator(texts, trainers.BpeTrainer(
    vocab_size=400, special_tokens=special, show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
model = BertForMaskedLM(BertConfig(vocab_size=made.get_vocab_size(), hidden_size=32,
                                   num_hidden_layers=1, num_attention_heads=2,
                                   intermediate_size=64)).eval()
roles = {f"{name}_token": f"<{name}>" for name in ("pad", "unk", "mask")}
print(f"torch {torch.__version__}, transformers {transformers.__version__}, "
      f"tokenizers {tokenizers.__version__}")
print("expected: an opened tokenizer cuts a text in one way")
PreTrainedTokenizerFast(tokenizer_object=made, **roles).save_pretrained("saved")
opened = AutoTokenizer.from_pretrained("saved")
cuts, losses = set(), set()
for _ in range(50):
    torch.manual_seed(0)
    ids = opened(texts[0], add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        losses.add(round(float(model(ids, labels=ids).loss), 4))
    cuts.add(tuple(ids[0].tolist()))
print(f"seen: {len(cuts)} cuts of one text in 50 readings, of {min(map(len, cuts))} to "
      f"{max(map(len, cuts))} tokens; {len(losses)} losses of one model")
opened.backend_tokenizer.model.dropout = None
opened.save_pretrained("without")
again = AutoTokenizer.from_pretrained("without")
after = [len({tuple(one(texts[0]).input_ids) for _ in range(50)}) for one in (opened, again)]
print(f"seen: with model.dropout = None {after[0]} cut, saved and opened again {after[1]}")
if min(len(cuts), len(losses)) < 10:
    sys.exit("changed: dropout ends when a tokenizer is saved or opened")
if after != [1, 1]:
    sys.exit("changed: what helps")
PY

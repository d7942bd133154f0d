#!/usr/bin/env bash
# Pairs of texts (inference, questions), and the tokenizers of Funnel, of a Japanese BERT, and of
# the general class PreTrainedTokenizerFast with a BERT's rules in tokenizer.json. One expects them
# to tell the second text by token types of 1, as in transformers 4, and as BERT's tokenizer does.
# In transformers 5 these three give no token types unless they are asked to. The model takes both
# texts for one and gives other logits. There is no error and no warning. Pass
# return_token_type_ids=True, or add "token_type_ids" to model_input_names in
# tokenizer_config.json.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 4.57.6 5.24.0; do
  python3 -m venv "$work/$version"
done
"$work/4.57.6/bin/pip" install -q transformers==4.57.6 tokenizers==0.22.2
"$work/5.24.0/bin/pip" install -q torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3
cd "$work"
export HF_HUB_OFFLINE=1
cat >look.py <<'PY'
import json, sys
from pathlib import Path
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

transformers.logging.set_verbosity_error()
old = transformers.__version__.startswith("4.")
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
roles = {f"{word[1:-1].lower()}_token": word for word in words[:5]}
for name in ("FunnelTokenizerFast", "BertJapaneseTokenizer", "PreTrainedTokenizerFast",
             "BertTokenizerFast"):
    first = 2 if name == "FunnelTokenizerFast" else 0  # the type of [CLS]
    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single=f"[CLS]:{first} $A:0 [SEP]:0", pair=f"[CLS]:{first} $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    folder = Path(f"{name}-{old}")
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    if name != "BertJapaneseTokenizer":  # whose words are cut at spaces, if no way is named
        backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": name, **roles}
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = tokenizer("a", "b").get("token_type_ids")
    print(f"seen: transformers {transformers.__version__}, {name}: {found}")
    wanted = [first, 0, 0, 1, 1]
    if found != (wanted if old or name == "BertTokenizerFast" else None):
        sys.exit(f"changed: {name}")
    asked = tokenizer("a", "b", return_token_type_ids=True)["token_type_ids"]
    names = ["input_ids", "token_type_ids", "attention_mask"]
    path.write_text(json.dumps(settings | {"model_input_names": names}))
    if not asked == AutoTokenizer.from_pretrained(folder)("a", "b")["token_type_ids"] == wanted:
        sys.exit(f"changed: {name}, what helps")
PY
echo "expected: token types [0, 0, 0, 1, 1] of each class, and 2 for Funnel's first token"
for version in 4.57.6 5.24.0; do
  "$version/bin/python" look.py 2>log.txt || { cat log.txt >&2; exit 1; }
done
"$work/5.24.0/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import sys
import torch, transformers
from transformers import BertConfig, BertForMaskedLM, FunnelConfig, FunnelForMaskedLM

torch.manual_seed(0)
models = {BertForMaskedLM: BertConfig(vocab_size=7, hidden_size=32, num_hidden_layers=1,
                                      num_attention_heads=2, intermediate_size=64,
                                      initializer_range=0.3),
          FunnelForMaskedLM: FunnelConfig(vocab_size=7, d_model=32, n_head=2, d_head=16, d_inner=64,
                                          block_sizes=[1, 1], num_decoder_layers=1,
                                          initializer_std=0.3)}
ids = torch.tensor([[2, 5, 3, 6, 3]])
print(f"torch {torch.__version__}, transformers {transformers.__version__}")
for kind, config in models.items():
    first = 2 if kind is FunnelForMaskedLM else 0
    model = kind(config).eval()
    with torch.no_grad():
        told = model(ids, token_type_ids=torch.tensor([[first, 0, 0, 1, 1]])).logits
        gap = float((model(ids).logits - told).abs().max() / told.std())
    print(f"seen: {kind.__name__}: without token types logits move by {gap:.2g} deviations")
    if gap < 0.02:
        sys.exit("changed: what token types do")
PY

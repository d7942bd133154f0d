#!/usr/bin/env bash
# XLM of several languages with embeddings of languages (use_lang_emb), as its masked LMs for
# English and German or French. One expects what the tokenizer gives to be all that the model needs,
# or an error, or the lang_id of its configuration. The language goes in as a tensor of its own,
# langs. Neither the tokenizer nor the fill-mask pipeline makes one, and lang_id is for generating
# alone; without langs nothing is added, which the model never met in training. Here what a masked
# word is depends on the language: without it the answers are now of one, now of the other. A
# teacher that is run over a corpus as any BERT is wastes what it knows, without a word. Pass
# langs=torch.full_like(ids, language).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import sys
import torch, transformers
from transformers import AutoModelForMaskedLM, XLMConfig, XLMWithLMHeadModel

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
MASK, FIRST, WORDS = 5, 10, 20
model = XLMWithLMHeadModel(XLMConfig(
    vocab_size=60, emb_dim=32, n_layers=2, n_heads=2, n_langs=2, use_lang_emb=True, lang_id=1,
    lang2id={"en": 0, "de": 1}, dropout=0.0, attention_dropout=0.0, max_position_embeddings=32))


def batch(size=64):
    """A word and a mask: in one language the word comes again, in the other its translation."""
    word, language = torch.randint(WORDS, (size,)), torch.randint(2, (size,))
    ids = torch.stack([word + FIRST, torch.full_like(word, MASK)], 1)
    return ids, language, word + FIRST + WORDS * language


optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(300):
    ids, language, answer = batch()
    logits = model(ids, langs=language[:, None].expand_as(ids)).logits[:, 1]
    loss = torch.nn.functional.cross_entropy(logits, answer)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
model.save_pretrained("xlm")
model = AutoModelForMaskedLM.from_pretrained("xlm").eval()
ids, language, answer = batch(1000)
print(f"torch {torch.__version__}, transformers {transformers.__version__}; lang_id is "
      f"{model.config.lang_id}")
print("expected: without langs the answers of the language lang_id, or an error")
seen = {}
for name, langs in (("langs", language), ("lang_id", torch.full_like(language, 1)), ("none", None)):
    given = None if langs is None else langs[:, None].expand_as(ids)
    with torch.no_grad():
        logits = model(ids, langs=given).logits[:, 1]
    right = logits.argmax(-1) == answer
    loss = float(torch.nn.functional.cross_entropy(logits, answer))
    seen[name] = [float(right[language == code].float().mean()) for code in (0, 1)] + [loss]
    print(f"seen: langs of {name:7s} {seen[name][0]:.0%} of the English and {seen[name][1]:.0%} of "
          f"the German words right, loss {loss:.2f}")
if min(seen["langs"][:2]) < 0.99 or seen["lang_id"][1] < 0.99 or seen["lang_id"][0] > 0.01:
    sys.exit("changed: langs no longer tell the language")
if seen["none"][2] < 10 * seen["langs"][2] or seen["none"][0] < 0.01 and seen["none"][1] > 0.99:
    sys.exit("changed: without langs the model takes lang_id")
PY

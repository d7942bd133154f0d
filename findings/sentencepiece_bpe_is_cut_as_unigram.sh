#!/usr/bin/env bash
# A SentencePiece model says of which kind it is: BPE, which merges pairs in their order, or Unigram,
# which looks for the likeliest cut. One expects AutoTokenizer to heed that where sentencepiece.bpe.model
# or spm.model is all there is, as transformers 4 did. transformers 5 has one kind for each class: that
# of XLM-RoBERTa, mBART, DeBERTa-v2 and BigBird takes every file for a Unigram. The scores of a BPE are
# the order of its merges, so that whole words fall into pieces that the model saw elsewhere, and
# nothing says so. CamemBERT's class fails. What helps: a tokenizer.json that transformers 4 has saved,
# with "tokenizer_class": "PreTrainedTokenizerFast".
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.24.0 sentencepiece==0.2.3 protobuf==7.36.2
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - <<'PY'
import random, sys
from pathlib import Path

import sentencepiece, transformers
from transformers import AutoTokenizer, DebertaV2Config, MBartConfig, XLMRobertaConfig

transformers.logging.set_verbosity_error()
random.seed(0)
words = "office full width model paper ten cat number word list fine flow walked slowly".split()
Path("text").write_text("\n".join(" ".join(random.choices(words, k=8)) for _ in range(500)))
text = "walked slowly office model"
families = [("spm.model", DebertaV2Config), ("sentencepiece.bpe.model", XLMRobertaConfig),
            ("sentencepiece.bpe.model", MBartConfig)]
print(f"transformers {transformers.__version__}, sentencepiece {sentencepiece.__version__}")
print("expected: the pieces of sentencepiece, for a BPE as for a Unigram")
for kind in ("unigram", "bpe"):
    sentencepiece.SentencePieceTrainer.train(
        input="text", model_prefix=kind, model_type=kind, vocab_size=60, minloglevel=2,
        hard_vocab_limit=False)
    wanted = sentencepiece.SentencePieceProcessor(model_file=f"{kind}.model").encode(text, out_type=str)
    for name, config in families:
        folder = Path(f"{kind}-{config.model_type}")
        folder.mkdir()
        config().save_pretrained(folder)
        (folder / name).write_bytes(Path(f"{kind}.model").read_bytes())
        found = AutoTokenizer.from_pretrained(folder).tokenize(text)
        print(f"seen: {kind}, {config.model_type}: {' '.join(found)} (file: {' '.join(wanted)})")
        if (found == wanted) != (kind == "unigram"):
            sys.exit(f"changed: a {kind} is read {'rightly' if found == wanted else 'wrongly'}")
PY

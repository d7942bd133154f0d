#!/usr/bin/env bash
# RoFormer's tokenizer, which cuts Chinese words by jieba: Python code that the Rust library calls.
# The class has methods that take this code out when it is pickled and put it back afterwards, so
# one expects that it can be pickled and copied. Its __getstate__ writes the tokenizer as JSON
# before it takes the code out, and that fails. So copy.copy, copy.deepcopy and pickle.dumps fail.
# Save it with save_pretrained, and open that folder again.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.24.0 tokenizers==0.23.3 rjieba==0.2.2
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import copy, pickle, sys
import tokenizers, transformers
from transformers import AutoTokenizer, RoFormerTokenizer

transformers.logging.set_verbosity_error()
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "今", "天", "气", "非常", "好"]
made = RoFormerTokenizer(vocab={word: i for i, word in enumerate(words)})
made.save_pretrained("saved")
print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}")
print("expected: the class defines __getstate__ and __setstate__, so it is copied and pickled")
if not {"__getstate__", "__setstate__"} <= vars(RoFormerTokenizer).keys():
    sys.exit("changed: the class no longer defines them")
for way in (copy.copy, copy.deepcopy, pickle.dumps):
    try:
        way(made)
    except Exception as error:
        print(f"seen: {way.__name__}: {error}")
        if "Custom PreTokenizer cannot be serialized" not in str(error):
            sys.exit("changed: another error")
    else:
        sys.exit(f"changed: {way.__name__} works")
text = "今天天气非常好"
if AutoTokenizer.from_pretrained("saved").tokenize(text) != made.tokenize(text):
    sys.exit("changed: what was saved cuts otherwise")
PY

#!/usr/bin/env bash
# A context that is longer than a model takes, as in SQuAD: truncation with a stride gives it in
# overlapping pieces, and one expects the pieces to cover it. With tokenizers 0.23.1 and 0.23.2
# there is one overflowing piece, however long the text is: all that follows is dropped without a
# word, and so are the answers in it. 0.22.2 and 0.23.3 give all pieces.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/cut.py" <<'PY'
import sys
import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

words = [f"w{i}" for i in range(50)]
ids = {word: i for i, word in enumerate(["[CLS]", "[SEP]", *words])}
tokenizer = Tokenizer(models.WordLevel(ids, unk_token="w0"))
tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer.post_processor = processors.TemplateProcessing(
    single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
)
tokenizer.enable_truncation(16, stride=4)
whole = tokenizer.encode(" ".join(words))
pieces = [whole, *whole.overflowing]
found = {token for piece in pieces for token in piece.tokens} & set(words)
nested = sum(len(piece.overflowing) for piece in whole.overflowing)
print(f"seen: tokenizers {tokenizers.__version__}: {len(pieces)} pieces of 16 tokens, stride 4, "
      f"hold {len(found)} of {len(words)} words; {nested} pieces inside of the pieces")
expected = 16 if tokenizers.__version__ in ("0.23.1", "0.23.2") else 50
if len(found) != expected or nested:
    sys.exit(f"changed: {expected} words were expected")
PY
echo "expected: pieces that hold all 50 words"
for version in 0.22.2 0.23.1 0.23.2 0.23.3; do
  python3 -m venv "$work/$version"
  "$work/$version/bin/pip" install -q "tokenizers==$version"
  "$work/$version/bin/python" "$work/cut.py"
done

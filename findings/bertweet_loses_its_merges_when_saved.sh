#!/usr/bin/env bash
# BERTweet's tokenizer, with vocab.txt and bpe.codes as they are published: each line of bpe.codes
# has a merge and how often it was seen. One expects of save_pretrained a copy that cuts text in
# the same way. The class drops the last column of a line when it reads, and writes lines without
# that column. Whoever opens the copy loses the second half of each merge in this way, and with it
# all merges. There is no error and no warning: words fall into single characters, and a model that
# is saved beside its tokenizer reads other ids than it was trained with. PhoBERT's class, of the
# same files, copies the file and keeps them. Copy bpe.codes by hand.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.24.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import sys
from pathlib import Path
import transformers
from transformers import BertweetTokenizer, PhobertTokenizer

transformers.logging.set_verbosity_error()
Path("vocab.txt").write_text("".join(f"{token} 1\n" for token in (
    "love", "the@@", "ater", "l@@", "o@@", "v@@", "e", "t@@", "h@@", "a@@", "e@@", "r")))
Path("bpe.codes").write_text("".join(f"{merge} 1\n" for merge in (
    "l o", "lo v", "lov e</w>", "t h", "th e", "a t", "at e", "ate r</w>")))
TEXT = "love theater"
print(f"transformers {transformers.__version__}")
print("expected: the saved copy cuts as before, love the@@ ater")
for cls, wanted in ((BertweetTokenizer, "l@@ o@@ v@@ e t@@ h@@ e@@ a@@ t@@ e@@ r"),
                    (PhobertTokenizer, "love the@@ ater")):
    first = cls("vocab.txt", "bpe.codes")
    first.save_pretrained("saved")
    copy = cls.from_pretrained("saved")
    before, after = (" ".join(t.tokenize(TEXT)) for t in (first, copy))
    print(f"seen: {cls.__name__}: {before!r}, its copy {after!r}")
    if before != "love the@@ ater" or after != wanted:
        sys.exit(f"changed: {cls.__name__}")
    Path("saved/bpe.codes").write_text(Path("bpe.codes").read_text())
    if cls.from_pretrained("saved").tokenize(TEXT) != first.tokenize(TEXT):
        sys.exit("changed: what helps")
    if [len(t(TEXT)["input_ids"]) for t in (first, copy)] != [5, 2 + len(wanted.split())]:
        sys.exit(f"changed: ids of {cls.__name__}")
PY

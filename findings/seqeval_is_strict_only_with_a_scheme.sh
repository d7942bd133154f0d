#!/usr/bin/env bash
# Named entities measured with seqeval. f1_score(..., mode="strict") is meant to count an entity
# only if its tags are well formed, and scheme=IOB2 to say what that means. One expects each of
# the two to have an effect, or an error where one asks for the other. Either one alone is
# ignored: the score is that of the lenient mode. With IOB2 tags there is no warning, and a model
# that never predicts a B- tag can get 1.0. With BILOU the warnings are of the tags alone, each of
# which "seems not to be NE tag"; a model that joins two entities that touch gets 1.0. Pass
# mode="strict" and scheme= together.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q seqeval==1.2.2 scikit-learn==1.9.1 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import sys, warnings
from importlib.metadata import version
from seqeval.metrics import f1_score
from seqeval.scheme import BILOU, IOB2

cases = [
    ("IOB2, no B- predicted", IOB2, [["B-PER", "I-PER", "O", "B-LOC"]],
     [["I-PER", "I-PER", "O", "I-LOC"]]),
    ("BILOU, two places joined", BILOU, [["U-LOC", "U-LOC", "O"]], [["B-LOC", "L-LOC", "O"]]),
]
print(f"seqeval {version('seqeval')}")
print('expected: mode="strict" is strict, or asks for a scheme; scheme= is used')
for name, scheme, truth, guess in cases:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        lenient = f1_score(truth, guess)
        mode_alone = f1_score(truth, guess, mode="strict")
        scheme_alone = f1_score(truth, guess, scheme=scheme)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = f1_score(truth, guess, mode="strict", scheme=scheme)
    said = sorted({str(entry.message) for entry in warned})
    print(f"seen: {name}: F1 is {both} with both, {lenient} with neither, {mode_alone} with the "
          f"mode alone, {scheme_alone} with the scheme alone; warnings {said}")
    if scheme is IOB2 and said or not all("seems not to be NE tag" in line for line in said):
        sys.exit("changed: the warnings")
    if (both, lenient, mode_alone, scheme_alone) != (0, 1, 1, 1):
        sys.exit(f"changed: {name}")
PY

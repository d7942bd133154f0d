#!/usr/bin/env bash
# Tokens drawn from a teacher's distribution with torch.multinomial(p, n, replacement=True), to
# keep a sample of its tail. One expects float32 to cost digits, not tokens. On a CPU it adds the
# probabilities up in their own type, one after the other. Once the sum is near 1, a probability
# below 3e-8 changes nothing: such a token has no share at all. Here a tail of 250,000 ids holds
# half a percent of the mass; the ids before the likely token get their share, those after it are
# never drawn in two million draws. Categorical.sample does the same. An estimate from such
# samples is off by the whole tail. Draw from p.double().
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import sys
import torch
from torch.distributions import Categorical

VOCABULARY, DRAWS = 250_000, 2_000_000
p = torch.full((VOCABULARY,), 2e-8)
likely = VOCABULARY // 2
p[likely] = 1 - 2e-8 * (VOCABULARY - 1)
ways = {"multinomial": lambda: torch.multinomial(p, DRAWS, replacement=True),
        "Categorical": lambda: Categorical(probs=p).sample((DRAWS,)),
        "multinomial of p.double()":
            lambda: torch.multinomial(p.double(), DRAWS, replacement=True)}
print(f"torch {torch.__version__}")
print(f"expected: of {DRAWS:,} draws some {2e-8 * likely * DRAWS:,.0f} fall before the likely "
      "token and as many after it")
seen = {}
for name, draw in ways.items():
    torch.manual_seed(0)
    drawn = draw()
    seen[name] = int((drawn < likely).sum()), int((drawn > likely).sum())
    print(f"seen: {name:26s} {seen[name][0]:,} before, {seen[name][1]:,} after")
double = seen.pop("multinomial of p.double()")
if any(after for _, after in seen.values()):
    sys.exit("changed: ids after a likely one are drawn")
if any(not 4500 < count < 5500 for count in (*double, *(before for before, _ in seen.values()))):
    sys.exit("changed: the other ids have another share")
PY

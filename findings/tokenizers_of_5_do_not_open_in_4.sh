#!/usr/bin/env bash
# Transformers 5 saves a tokenizer of the general class (PreTrainedTokenizerFast, as ModernBERT's)
# under its new name, TokenizersBackend, and further special tokens as a list, extra_special_tokens.
# One expects version 4 to open what it once wrote. The class does not exist there, and the list is
# taken for a dict: both raise an error, for CamemBERT's and XLNet's tokenizers as well. What helps:
# put "PreTrainedTokenizerFast" and "additional_special_tokens" back into tokenizer_config.json,
# with "model_input_names", as version 4 adds token types by itself; version 5 reads both names.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for version in 4.57.6 5.24.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "transformers==$version" protobuf==7.36.2
done
cd "$work"
cat > make.py <<'PY'
import sys
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, __version__

words = ["[PAD]", "[UNK]", "[MASK]", "<low>", "sea", "boat"]
made = Tokenizer(models.WordLevel(dict(zip(words, range(6))), unk_token="[UNK]"))
made.pre_tokenizer = pre_tokenizers.Whitespace()
names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(f"{sys.argv[1]}/plain")
more = PreTrainedTokenizerFast(tokenizer_object=made, additional_special_tokens=["<low>"], **names)
more.save_pretrained(f"{sys.argv[1]}/more")
PY
cat > mend.py <<'PY'
import json
from pathlib import Path

for path in Path("five").glob("*/tokenizer_config.json"):
    settings = json.loads(path.read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    if "extra_special_tokens" in settings:
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    path.write_text(json.dumps(settings))
PY
cat > open.py <<'PY'
import sys
from transformers import AutoTokenizer, PreTrainedTokenizerFast, __version__

for name in ("plain", "more"):
    for opener in (AutoTokenizer, PreTrainedTokenizerFast):
        place = f"{sys.argv[1]}/{name}"
        try:
            found = dict(opener.from_pretrained(place)("sea <low> boat"))
        except Exception as error:
            found = f"{type(error).__name__}: {error}"[:70]
        print(f"{__version__} {opener.__name__} {place}: {found}")
PY
export HF_HUB_OFFLINE=1
for version in 4.57.6 5.24.0; do "$version/bin/python" make.py "${version%%.*}" 2>/dev/null; done
mv 4 four; mv 5 five
5.24.0/bin/python open.py four 2>/dev/null | tee -a seen
4.57.6/bin/python open.py five 2>/dev/null | tee -a seen
5.24.0/bin/python mend.py
for version in 4.57.6 5.24.0; do "$version/bin/python" open.py five 2>/dev/null | tee -a mended; done
[ "$(grep -c "^4.57.6 .*TokenizersBackend does not exist" seen)" = 2 ] &&
    [ "$(grep -c "^4.57.6 .*has no attribute 'keys'" seen)" = 1 ] &&
    [ "$(grep -c "\], 'attention_mask'" mended)" = 8 ] &&
    [ "$(grep -c '\[4, 3, 5\]' mended)" = 4 ] ||
    { echo "changed: version 4 opens what version 5 saves, or the remedy no longer helps"; exit 1; }
echo "seen: version 4 opens neither by AutoTokenizer, and the list of special tokens by no class"

#!/usr/bin/env bash
# A checkpoint of a type that transformers holds itself, whose config.json names code in its own
# repository as well (auto_map), as those do that were published before their type came into the
# library. It is opened with transformers' own class and saved with save_pretrained. One expects the
# copy to open in any way that the first opens. save_pretrained writes auto_map and not the code. So
# the copy opens without trust_remote_code; with trust_remote_code=True, which the card of such a
# model asks for, it is an OSError: the file of code is not there. Delete auto_map from the
# configuration before saving.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0
cd "$work"
HF_HUB_OFFLINE=1 HF_HOME="$work/home" "$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import json, sys
import torch, transformers
from transformers import AutoModelForMaskedLM, BertConfig, BertForMaskedLM

torch.manual_seed(0)
small = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                   intermediate_size=64)
BertForMaskedLM(small).save_pretrained("first")
with open("first/own.py", "w") as file:
    file.write("from transformers import BertConfig as OwnConfig, BertForMaskedLM as Own\n")
with open("first/config.json") as file:
    values = json.load(file)
values["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForMaskedLM": "own.Own"}
with open("first/config.json", "w") as file:
    json.dump(values, file)
AutoModelForMaskedLM.from_pretrained("first", trust_remote_code=False).save_pretrained("copy")


def opens(folder, trust):
    try:
        AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=trust)
    except OSError as error:
        return f"OSError: {str(error).splitlines()[0]}"
    return "opens"


seen = {(f, trust): opens(f, trust) for f in ("first", "copy") for trust in (False, True)}
print(f"transformers {transformers.__version__}; expected: all four open")
for (folder, trust), found in seen.items():
    print(f"seen: {folder}, trust_remote_code={trust}: {found}")
failed = {key for key, found in seen.items() if found != "opens"}
if failed != {("copy", True)} or "own.py" not in seen["copy", True]:
    sys.exit("the behaviour has changed")
PY

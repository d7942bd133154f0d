#!/usr/bin/env bash
# A Japanese BERT's tokenizer, and two texts. A BERT tells the second text by token types of 1, and
# in transformers 4 BertJapaneseTokenizer gave them. In transformers 5 it gives none unless it is
# asked (return_token_type_ids=True), nor does PreTrainedTokenizerFast with a BERT's rules in
# tokenizer.json. The model takes zeros for what is missing and reads both texts as the first: a
# model that was fine-tuned on pairs under transformers 4 answers otherwise, without a line.
# model_input_names in tokenizer_config.json brings them back.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/look.py" <<'PY'
import json, sys
from pathlib import Path
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

transformers.logging.set_verbosity_error()
version = int(transformers.__version__.split(".")[0])
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"]
roles = {f"{word[1:-1].lower()}_token": word for word in words[:5]}
backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
backend.normalizer = normalizers.BertNormalizer()
backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
for name in ("BertJapaneseTokenizer", "PreTrainedTokenizerFast", "BertTokenizerFast"):
    folder = Path(name)
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    if name != "BertJapaneseTokenizer":  # whose words are cut at spaces, if no way is named
        backend.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": name, **roles}
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(settings))
    found = AutoTokenizer.from_pretrained(folder)("a", "b").get("token_type_ids")
    print(f"seen: transformers {transformers.__version__}, {name}: {found}")
    wanted = [0, 0, 0, 1, 1]
    gives = version == 4 or name == "BertTokenizerFast"
    if found != (wanted if gives else None):
        sys.exit(f"changed: {name}")
    names = ["input_ids", "token_type_ids", "attention_mask"]
    path.write_text(json.dumps(settings | {"model_input_names": names}))
    if AutoTokenizer.from_pretrained(folder)("a", "b")["token_type_ids"] != wanted:
        sys.exit(f"changed: {name} with model_input_names")
PY
echo "expected: token types [0, 0, 0, 1, 1] of each class"
for version in 4.57.3 5.24.0; do
    python3 -m venv "$work/$version"
    "$work/$version/bin/pip" install -q "transformers==$version"
    mkdir "$work/of-$version"
    (cd "$work/of-$version" && HF_HUB_OFFLINE=1 "$work/$version/bin/python" ../look.py 2>../log.txt)
done

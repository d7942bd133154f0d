#!/usr/bin/env bash
# FlauBERT with norms before attention and feed-forward (pre_norm), as its published large model
# has them, in transformers 5. Models with norms after them run. One expects the others to run as
# well: loading reports no missing and no unexpected tensor, and pre_norm is a documented field. No
# forward pass gets through, with or without the LM head: each layer takes its part of a cache by
# its number, and the cache that the model makes has no numbered parts. The error is
# "'EncoderDecoderCache' object is not subscriptable". use_cache=False does not help. What helps is
# to pass cache=, an object of one's own, which says that its length is 0 and that the part of each
# layer is None.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" - 2>log.txt <<'PY' || { cat log.txt >&2; exit 1; }
import sys
import torch, transformers
from transformers import FlaubertConfig, FlaubertModel, FlaubertWithLMHeadModel

transformers.logging.set_verbosity_error()


class NoCache:
    """What a model with norms first asks of a cache, and what is answered where there is none."""

    def get_seq_length(self):
        return 0

    def __getitem__(self, layer):
        return None


def run(model, **given):
    ids = torch.arange(10, 20)[None]
    try:
        with torch.no_grad():
            logits = model(ids, **given)[0]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "finite" if logits.isfinite().all() else "not finite"


seen = {}
for norms_first in (False, True):
    torch.manual_seed(0)
    config = FlaubertConfig(vocab_size=60, emb_dim=32, n_layers=2, n_heads=2, pre_norm=norms_first,
                            max_position_embeddings=32)
    FlaubertWithLMHeadModel(config).save_pretrained("model")
    model, loading = FlaubertWithLMHeadModel.from_pretrained("model", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    model.eval()
    seen[norms_first] = run(model)
    print(f"seen: pre_norm={norms_first}: {seen[norms_first]}")
model.config.use_cache = False
uncached, bare = run(model), run(FlaubertModel(config).eval())
helped = run(model, cache=NoCache())
print(f"seen: pre_norm=True, use_cache=False: {uncached}; FlaubertModel: {bare}")
print(f"seen: pre_norm=True with a cache that gives each layer None: {helped}")
print(f"torch {torch.__version__}, transformers {transformers.__version__}; expected: finite logits")
broken = "TypeError: 'EncoderDecoderCache' object is not subscriptable"
if (seen[False], seen[True], uncached, bare, helped) != ("finite", broken, broken, broken, "finite"):
    sys.exit("changed: which calls run")
PY

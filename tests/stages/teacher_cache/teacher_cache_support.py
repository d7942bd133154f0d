"""Of the tests of stage one: dense forwards of the teacher, and what a look at files tells."""

import shutil
from pathlib import Path

import numpy as np
import torch

from distilcache.data.cache.shards import shard_path

V = 120
DRAWN = {
    "positions": "masked+0.3",
    "top_p": 0.6,
    "tail_samples": 6,
    "residual_samples": 8,
    "hidden_quality": 1e-2,
}


def one_line(error) -> str:
    """What a caught error says, all of it on one line."""
    text = str(error.value)
    assert "\n" not in text
    return text


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Of every file: it is the same one, and nobody has written to it."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_ino)
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def interrupted(whole, tmp_path):
    """A copy of a finished cache as it was before its second shard."""
    out = shutil.copytree(whole, tmp_path / "c")
    (out / "manifest.json").unlink()
    shard_path(out, 0, 1).with_suffix(".json").unlink()
    return out


def dense_forward(model, block):
    """Logits and hidden states of every sequence, one at a time and without padding."""
    start = 0
    for length in block["lengths"].tolist():
        ids = torch.from_numpy(block["input_ids"][start : start + length].astype(np.int64))
        with torch.no_grad():
            out = model(input_ids=ids[None], output_hidden_states=True)
        yield out.logits[0].double(), [h[0] for h in out.hidden_states]
        start += length


def rows_of(block, policy, signal):
    """Flat token index of each position of a signal, sequence by sequence."""
    names = ("masked_counts", "masked_positions")
    if policy.startswith("masked+"):
        names = (f"{signal}_position_counts", f"{signal}_positions")
    counts, positions = (block[name].astype(np.int64) for name in names)
    rows, start, at = [], 0, 0
    for length, count in zip(block["lengths"].tolist(), counts.tolist(), strict=True):
        own = range(length) if policy == "all" else positions[at : at + count].tolist()
        rows += [start + position for position in own]
        start, at = start + length, at + count
    return rows


def expected_signals(model, block, positions, layers, logit_positions=None):
    """Logits and hidden states where they should lie, of a dense forward."""
    logits, hidden = [], {layer: [] for layer in layers}
    for z, states in dense_forward(model, block):
        logits.append(z)
        for layer in layers:
            hidden[layer].append(states[layer])
    rows = rows_of(block, positions, "hidden")
    logit_rows = rows_of(block, logit_positions or positions, "logit")
    return torch.cat(logits)[logit_rows], {n: torch.cat(h)[rows] for n, h in hidden.items()}


def replayed_logits(cache, block):
    """By the head of the cache, of the decoded hidden states of its last layer."""
    layer = cache.encoding.hidden_layer()
    planes = torch.from_numpy(block[layer.column].copy()).reshape(layer.planes, -1)
    with torch.no_grad():
        return cache.teacher.lm_head()(cache.teacher.hidden_decoder()({layer.column: planes}))

"""A student with fewer ids than its teacher: which ones, and the cache's batches in them.

Which ids are kept follows from the cache and from their number alone, so a finished student, its
checkpoints and a resumed run need no record of them.

The teacher's distribution is the one over the kept ids, ``p(v) = exp(z_v / T) / sum_{w kept}
exp(z_w / T)``, with z the replayed logits, and the stored ones where there are any. The decoder's
rows are cut once, so replay is cheaper, too. Masked positions whose token was dropped have no
L_mlm; the other losses stay. A dropped token's relations are learnt by the first of its pieces.

Shapes: ``B`` sequences, ``L`` positions, ``T`` the teacher's tokens, ``V`` its ids, ``n`` the
student's.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.schema import Encoding, HiddenEncoding
from distilcache.data.errors import require, tell
from distilcache.data.loader.batch import Batch
from distilcache.data.loader.dataset import CachedBatches
from distilcache.data.masks.positions import flat_rows
from distilcache.stages.models.families import family_of
from distilcache.stages.models.pieces import takes_pieces
from distilcache.stages.models.special_tokens import closing_tokens
from distilcache.stages.models.tokenizers import load_tokenizer
from distilcache.stages.models.trimmed_ids import TrimmedIds, read_tokenizer
from distilcache.stages.models.trimmed_tokenizer import choose, ids_of, trim
from distilcache.stages.student_train.weights import config_in

Array = npt.NDArray[Any]
COUNTED = 1 << 24
"""Tokens that are counted at most, in blocks that lie evenly over the first round."""
SETS = {
    "masked_index": ("labels",),
    "hidden_index": ("hidden_weight",),
    "ce_index": ("ce_weight", "logit_ids", "logit_values", "log_odds"),
}
"""Positions of a batch, and what is known of each; hidden states belong to the second."""


def trimmed_ids(cache: Cache, wanted: float) -> TrimmedIds | None:
    """The ids of a student.

    Args:
        cache: An open cache.
        wanted: Their number, or a share below 1 of the corpus's tokens; 1: all.

    Returns:
        None where the student has all ids of its teacher.

    Raises:
        UserError: The tokenizer cannot be trimmed, or needs more ids.
    """
    if wanted == 1:
        return None
    theirs = read_tokenizer(cache.tokenizer_dir)
    ids = ids_of(theirs)
    require(
        wanted >= len(ids) or not takes_pieces(theirs),
        f"student: vocabulary must be 1, all {len(ids):,} ids, of a tokenizer that cuts text by "
        f"Python code, got {wanted:g}; leave it out",
    )
    if wanted >= len(ids):
        if wanted > len(ids):
            tell(
                f"student: vocabulary={wanted:,.0f} keeps all ids, as the teacher has {len(ids):,}"
            )
        return None
    config = config_in(cache.teacher_dir)
    even = "" if config is None else family_of(config).even
    require(
        not even,
        f"student: vocabulary must be 1, all {len(ids):,} ids, of a model of type "
        f"{getattr(config, 'model_type', '')!r}, got {wanted:g}: {even}, and texts in fewer ids "
        "are of several lengths; leave it out",
    )
    # Where positions are counted from the padding's id, this must stay as it is.
    counted = config is not None and family_of(config).positions_from_pad
    always = range(1 + int(config.pad_token_id or 0)) if counted else ()
    kept = choose(theirs, token_counts(cache), wanted, always)
    if len(kept) == len(ids):
        return None
    closing = closing_tokens(load_tokenizer(cache.tokenizer_dir))
    return TrimmedIds(theirs, trim(theirs, kept), cache.encoding.vocab_size, closing)


def ids_of_student(cache: Cache, config: Any) -> TrimmedIds | None:
    """The ids of a student from its configuration, as :func:`trimmed_ids`."""
    size = int(config.vocab_size)
    return trimmed_ids(cache, size) if size < cache.encoding.vocab_size else None


def token_counts(cache: Cache) -> npt.NDArray[np.int64]:
    """How often the text of a cache has each id, before masking; int64 [V]."""
    first = cache.round_range(0)
    total = int(cache.index["tokens"][first.start : first.stop].sum())
    counts_V = np.zeros(cache.encoding.vocab_size, np.int64)
    for block in first[:: max(1, math.ceil(total / COUNTED))]:
        columns = cache.read_block(block)
        ids = columns["input_ids"].copy()
        masked = flat_rows(
            columns["lengths"], columns["masked_counts"], columns["masked_positions"]
        )
        ids[masked] = columns["labels"]
        counts_V += np.bincount(ids, minlength=len(counts_V))
    return counts_V


class TrimmedBatches(CachedBatches):
    """``CachedBatches`` in the student's ids."""

    def __init__(self, cache: Cache, *, trimmed: TrimmedIds, **options: Any) -> None:
        self._trimmed = trimmed
        super().__init__(cache, **options)

    def __getitem__(self, k: int) -> Batch:
        """See ``CachedBatches``; positions that are cut off are gone."""
        return trimmed_batch(super().__getitem__(k), self._trimmed, self.cache.encoding)


def trimmed_batch(batch: Batch, trimmed: TrimmedIds, encoding: Encoding) -> Batch:
    """A batch of ``CachedBatches`` in the student's ids; no sequence is longer than the corpus's.

    Dropped tokens of the input are cut into pieces. Stored logits of dropped tokens become padding.
    Where relations are read, ``relation_ids`` int64 [B, L] are the teacher's tokens and
    ``relation_places`` the student's positions of these, -1 at padding. Where positions have
    weights, ``their_tokens`` is the number of the teacher's tokens that are left.
    """
    columns = {name: tensor.numpy() for name, tensor in batch.items()}
    there_BL = columns["attention_mask"] > 0
    lengths = there_BL.sum(1)
    recut = trimmed.recut(columns["input_ids"][there_BL], lengths, encoding.max_length)
    width = int(recut.lengths.max())
    new_BL = np.arange(width) < recut.lengths[:, None]
    ids_BL = np.full(new_BL.shape, trimmed.new_V[encoding.pad_id], np.int64)
    ids_BL[new_BL] = recut.ids
    made: dict[str, Any] = {"input_ids": ids_BL, "attention_mask": new_BL.astype(np.int64)}
    starts_T = np.repeat(np.arange(len(lengths)) * width, lengths)
    index_T = np.where(recut.places_T < 0, -1, starts_T + recut.places_T)
    if "ce_weight" in columns or "hidden_weight" in columns:
        made["their_tokens"] = np.array((index_T >= 0).sum())
    token_of = np.cumsum(there_BL.ravel()) - 1
    for name, known in SETS.items():
        if name not in columns:
            continue
        index = index_T[token_of[columns[name]]]
        stays = index >= 0
        if name == "masked_index":
            labels = trimmed.new_V[columns["labels"]]
            columns["labels"], stays = labels, stays & (labels >= 0)
        made[name] = index[stays]
        made |= {other: columns[other][stays] for other in known if other in columns}
        if name == "hidden_index":
            for layer in encoding.hidden:
                if layer.column in columns:
                    made[layer.column] = _taken(columns[layer.column], layer, stays)
    if encoding.relation is not None and encoding.relation.column in columns:
        column = encoding.relation.column
        made[column] = _taken(columns[column], encoding.relation, index_T >= 0)
        made |= _relation_places(columns["input_ids"][there_BL], lengths, recut.places_T)
    if "ce_rows" in columns:
        made["ce_rows"] = np.searchsorted(made["hidden_index"], made["ce_index"])
    if "logit_ids" in made:
        ids_NK = trimmed.new_V[made["logit_ids"]]
        made["logit_values"] = np.where(ids_NK < 0, -np.inf, made["logit_values"])
        made["logit_ids"] = np.maximum(ids_NK, 0)
    return {name: torch.from_numpy(array) for name, array in made.items()}


def _taken(rows: Array, stored: HiddenEncoding, stays: Array) -> Array:
    """Some of a batch's states; codes lie plane by plane."""
    return rows.T[stays].T if stored.dtype == "coded" else rows[stays]


def _relation_places(ids_T: Array, lengths_B: Array, places_T: Array) -> dict[str, Array]:
    """The teacher's tokens whose relations are learnt, and the student's positions of these."""
    stays = places_T >= 0
    row_T = np.repeat(np.arange(len(lengths_B)), lengths_B)
    left_B = np.bincount(row_T[stays], minlength=len(lengths_B))
    present_BL = np.arange(left_B.max()) < left_B[:, None]
    ids_BL, places_BL = np.zeros(present_BL.shape, np.int64), np.full(present_BL.shape, -1)
    ids_BL[present_BL], places_BL[present_BL] = ids_T[stays], places_T[stays]
    return {
        "relation_ids": ids_BL,
        "relation_places": places_BL,
        "relation_index": np.flatnonzero(present_BL),
    }

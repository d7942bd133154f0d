"""A tokenizer with fewer tokens: which are kept, and how the others are cut into them.

Functions of the content of a ``tokenizer.json`` and of how often a text uses each id. The kept
tokenizer is of the same kind (WordPiece, BPE, Unigram) and cuts text by the same rules; kept tokens
are numbered anew, in their old order. Always kept are

- added and special tokens, those put around a text, and the one for unknown text;
- the smallest pieces of every token that the text uses, so that text which the old tokenizer knows
  does not become unknown: WordPiece: its characters, at the beginning and within a word; byte-level
  BPE: all bytes; other BPE and Unigram: its characters, also at the end of a word where these are
  marked; and the pieces of single bytes, where the tokenizer falls back on these. Characters of
  Latin-1 are kept whether the text uses them or not;
- a token that the text uses and that has no smaller pieces.

A token of a BPE can only be made through its merges. So it is kept together with the tokens that it
is merged from (measured: docs/benchmarks.md).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from distilcache.data.errors import require
from distilcache.stages.models.tokenizer_kinds import Kind, State, byte_names, cut_model, kind_of

Ids = npt.NDArray[np.int64]


def ids_of(state: State) -> dict[str, int]:
    """Every token and its id, added ones included; of two pieces of one name the last."""
    vocabulary = state["model"]["vocab"]
    if not isinstance(vocabulary, dict):
        vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in state["added_tokens"]}}


def choose(state: State, counts_V: Ids, wanted: float, always: Iterable[int] = ()) -> list[int]:
    """The ids that are kept, ascending.

    Those that the text uses most, after the ones that are always kept. Equal arguments give equal
    ids, and a share gives the same ids as the number that it comes to.

    Args:
        state: The tokenizer.
        counts_V: How often the text uses each id.
        wanted: Number of ids, or a share below 1 of the text's tokens: as many as that takes.
        always: Further ids that are kept.

    Raises:
        UserError: The tokenizer is of another kind, or more than ``wanted`` ids are always kept.
    """
    kind, ids = kind_of(state), ids_of(state)
    tokens = {index: token for token, index in ids.items()}
    kept = _always(state, kind, ids, counts_V).union(always)
    total, covered = int(counts_V.sum()), int(counts_V[list(kept)].sum())
    least, size = len(kept), len(ids) if wanted < 1 else int(wanted)
    require(
        least <= size,
        f"student: vocabulary must be at least {least:,} for this corpus (special tokens, and the "
        f"pieces without which text would become unknown), got {size:,}; use --set "
        f"student.vocabulary={least} or more",
    )
    for index in np.argsort(-counts_V, kind="stable").tolist():
        if len(kept) == size or (wanted < 1 and covered >= wanted * total):
            break
        if index in kept or index not in tokens:
            continue
        more = {index, *(ids[part] for part in kind.parts(tokens[index]))} - kept
        if len(kept) + len(more) <= size:
            kept |= more
            covered += int(counts_V[list(more)].sum())
    return sorted(kept)


def _always(state: State, kind: Kind, ids: Mapping[str, int], counts_V: Ids) -> set[int]:
    """Ids that are kept whatever their number, see the head of this module."""
    model = state["model"]
    kept = {token["id"] for token in state["added_tokens"]}
    kept |= _ids_in(state.get("post_processor")) | _ids_in(state.get("padding"))
    if model.get("unk_token") in ids:
        kept.add(ids[model["unk_token"]])
    if model.get("unk_id") is not None:
        kept.add(ids[model["vocab"][model["unk_id"]][0]])
    if model.get("byte_fallback"):
        kept |= {ids[name] for name in byte_names(range(256)) if name in ids}
    if _is_byte_level(state):
        kept |= {ids[c] for c in tokenizers.pre_tokenizers.ByteLevel.alphabet() if c in ids}
    symbols = [form for c in map(chr, range(1, 256)) for form in kind.forms(c)]
    kept |= {ids[symbol] for symbol in symbols if symbol in ids}
    for token, index in ids.items():
        if not counts_V[index] or index in kept:
            continue
        symbols = kind.symbols(token)
        if all(symbol in ids for symbol in symbols):
            forms = (form for symbol in symbols for form in kind.forms(symbol))
            kept |= {ids[form] for form in forms if form in ids}
        else:
            kept |= {index, *(ids[part] for part in kind.parts(token))}
    return kept


def trim(state: State, kept: Sequence[int]) -> dict[str, Any]:
    """The content of the ``tokenizer.json`` with the ids that :func:`choose` has kept."""
    new = {old: index for index, old in enumerate(kept)}
    ids = ids_of(state)
    model = cut_model(state["model"], {t: new[i] for t, i in ids.items() if i in new})
    return {
        **state,
        "added_tokens": [{**token, "id": new[token["id"]]} for token in state["added_tokens"]],
        "post_processor": _renumbered(state.get("post_processor"), new),
        "padding": _renumbered(state.get("padding"), new),
        "model": model,
    }


def _ids_in(part: Any) -> set[int]:
    """The ids that a post-processor, or padding, names."""
    if part is None:
        return set()
    found = set[int]().union(*map(_ids_in, part.get("processors", ())))
    found |= {part[name][1] for name in ("sep", "cls") if isinstance(part.get(name), list)}
    if isinstance(part.get("special_tokens"), dict):
        found |= {i for token in part["special_tokens"].values() for i in token["ids"]}
    return found | ({part["pad_id"]} if "pad_id" in part else set())


def _renumbered(part: Any, new: Mapping[int, int]) -> Any:
    """A post-processor, or padding, with the new ids of its tokens."""
    if part is None:
        return None
    if "processors" in part:
        return {**part, "processors": [_renumbered(p, new) for p in part["processors"]]}
    made = dict(part)
    for name in ("sep", "cls"):  # of BertProcessing and RobertaProcessing: [token, id]
        if isinstance(part.get(name), list):
            made[name] = [part[name][0], new[part[name][1]]]
    if isinstance(part.get("special_tokens"), dict):
        made["special_tokens"] = {
            name: {**token, "ids": [new[i] for i in token["ids"]]}
            for name, token in part["special_tokens"].items()
        }
    if "pad_id" in part:
        made["pad_id"] = new[part["pad_id"]]
    return made


def pieces_of(theirs: State, own: State) -> list[list[int]]:
    """How the kept tokenizer writes each token of the old one.

    Returns:
        New ids by old id, in order; one for a kept token and for what has become unknown. Ids that
        no token has are unknown as well.

    Raises:
        UserError: It is not a part of the old tokenizer.
    """
    ids, kept = ids_of(theirs), ids_of(own)
    strange = next((token for token in kept if token not in ids), None)
    require(
        strange is None,
        "student: tokenizer must hold tokens of the teacher's alone, got another one with "
        f"{strange!r}; use the files that were saved with the student",
    )
    kind = kind_of(theirs)
    unknown = [_unknown(own, kept)]
    found = [unknown] * (1 + max(ids.values()))
    for token, index in ids.items():
        if token in kept:
            found[index] = [kept[token]]
        else:
            cut = kind.cut(token, kept)
            found[index] = [kept[piece] for piece in cut] if cut else unknown
    return found


def _unknown(state: State, ids: Mapping[str, int]) -> int:
    """What stands for text that cannot be written: the unknown token, else any special one."""
    model = state["model"]
    if model.get("unk_id") is not None:
        return int(model["unk_id"])
    if model.get("unk_token") in ids:
        return ids[model["unk_token"]]
    special = [token["id"] for token in state["added_tokens"] if token["special"]]
    require(
        bool(special),
        "student: tokenizer must have special tokens, got none; use that of a masked LM",
    )
    return int(special[-1])


def _is_byte_level(state: State) -> bool:
    """Whether text is turned into characters that stand for bytes."""
    found = [state.get("pre_tokenizer"), state.get("decoder")]
    for part in found:
        found += (part or {}).get("pretokenizers") or (part or {}).get("decoders") or []
    return any(part is not None and part["type"] == "ByteLevel" for part in found)

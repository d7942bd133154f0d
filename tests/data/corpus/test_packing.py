import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distilcache.data.corpus.packing import pack_blocks, pack_lines

CLS, SEP, UNK = 1, 2, 3
SHORTEST = 12
DOCUMENTS = st.lists(st.lists(st.integers(3, 40), max_size=60), max_size=12)


def flat(documents: list[list[int]], dtype=np.uint16):
    ids = np.array([i for document in documents for i in document], dtype=dtype)
    return ids, np.array([len(document) for document in documents], dtype=np.int64)


def sequences(packed) -> list[list[int]]:
    assert packed.lengths.sum() == len(packed.ids)
    ends = np.cumsum(packed.lengths)
    pairs = zip(ends - packed.lengths, ends, strict=True)
    return [packed.ids[a:b].tolist() for a, b in pairs]


def shape(max_length, shortest=SHORTEST):
    return {"max_length": max_length, "min_tokens": shortest, "cls_id": CLS, "sep_id": SEP}


def blocks(documents, max_length, keep_tail=False):
    return pack_blocks(*flat(documents), keep_tail=keep_tail, **shape(max_length))


def lines(documents, max_length, unk=UNK, shortest=SHORTEST):
    return pack_lines(*flat(documents), unk_id=unk, **shape(max_length, shortest))


def test_blocks_known_answer():
    packed = blocks([[7, 8, 9], [5, 6]], 6)
    assert sequences(packed) == [[1, 7, 8, 9, 2, 2]]
    assert packed.dropped_tokens == 2
    assert packed.ids.dtype == np.uint16


@given(documents=DOCUMENTS, max_length=st.integers(8, 40), keep_tail=st.booleans())
def test_a_class_token_may_come_last(documents, max_length, keep_tail):
    """The same bodies, with the special tokens where XLNet has them."""
    ids, lengths = flat(documents)
    size = shape(max_length)
    for pack, more in ((pack_blocks, {"keep_tail": keep_tail}), (pack_lines, {"unk_id": UNK})):
        first = pack(ids, lengths, **size, **more)
        last = pack(ids, lengths, **size, **more, cls_last=True)
        assert sequences(last) == [[*s[1:], s[0]] for s in sequences(first)]
        assert last.dropped_tokens == first.dropped_tokens


@given(documents=DOCUMENTS, max_length=st.integers(8, 40))
def test_sequences_may_not_be_closed(documents, max_length):
    """As those of DNA models."""
    ids, lengths = flat(documents)
    size = {**shape(max_length, 1), "sep_id": -1}
    body = max_length - 1
    packed = pack_blocks(ids, lengths, **size)
    whole = [ids[i : i + body].tolist() for i in range(0, len(ids) - body + 1, body)]
    assert sequences(packed) == [[CLS, *part] for part in whole]
    assert packed.dropped_tokens == len(ids) - len(whole) * body
    if 0 < len(ids) < body:
        kept = pack_blocks(ids, lengths, keep_tail=True, **size)
        assert sequences(kept) == [[CLS, *ids.tolist()]]
    packed = pack_lines(ids, lengths, unk_id=-1, **size)
    assert sequences(packed) == [
        [CLS, *d[i : i + body]] for d in documents for i in range(0, len(d), body)
    ]


@given(documents=DOCUMENTS, max_length=st.integers(8, 40))
def test_blocks_joined_again_are_the_documents_in_order(documents, max_length):
    packed = blocks(documents, max_length)
    joined = [i for d in documents if d for i in [*d, SEP]]
    found = sequences(packed)
    assert all(len(s) == max_length and s[0] == CLS and s[-1] == SEP for s in found)
    body = [i for s in found for i in s[1:-1]]
    assert body == joined[: len(body)]
    tail = joined[len(body) :]
    assert len(tail) < max_length - 2
    assert packed.dropped_tokens == sum(i != SEP for i in tail)


@given(documents=DOCUMENTS)
def test_blocks_keep_a_lone_tail_that_is_long_enough(documents):
    packed = blocks(documents, 1000, keep_tail=True)
    joined = [i for d in documents if d for i in [*d, SEP]]
    if len(joined) + 1 >= SHORTEST:
        assert sequences(packed) == [[CLS, *joined]]
        assert packed.dropped_tokens == 0
    else:
        assert sequences(packed) == []
        assert packed.dropped_tokens == sum(map(len, documents))


def test_lines_known_answer():
    document = list(range(10, 33))
    packed = lines([document, [4] * 9, [4] * 10], 14)
    assert sequences(packed) == [
        [CLS, *document[:12], SEP],
        [CLS, *document[12:], SEP],
        [CLS, *[4] * 10, SEP],
    ]
    assert packed.dropped_tokens == 9  # 9 + 2 special tokens are fewer than 12
    assert (packed.short, packed.unknown) == (1, 0)
    packed = lines([[4], [5, 6], [UNK, UNK]], 14, shortest=4)
    assert sequences(packed) == [[CLS, 5, 6, SEP]]
    assert (packed.short, packed.unknown, packed.dropped_tokens) == (1, 1, 3)


def test_lines_unknown_share_counts_special_tokens():
    half = [UNK] * 6 + [9] * 4  # 6 of 12
    less = [UNK] * 5 + [9] * 5
    packed = lines([half, less], 20)
    assert sequences(packed) == [[CLS, *less, SEP]]
    assert packed.dropped_tokens == 10
    assert len(lines([half, less], 20, unk=-1).lengths) == 2


@given(documents=DOCUMENTS, max_length=st.integers(8, 40))
def test_lines_against_a_plain_loop(documents, max_length):
    expected, dropped = [], 0
    for document in documents:
        for start in range(0, len(document), max_length - 2):
            piece = document[start : start + max_length - 2]
            sequence = [CLS, *piece, SEP]
            if len(sequence) < SHORTEST or sequence.count(UNK) / len(sequence) >= 0.5:
                dropped += len(piece)
            else:
                expected.append(sequence)
    packed = lines(documents, max_length)
    assert sequences(packed) == expected
    assert packed.dropped_tokens == dropped


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_dtype_is_kept_and_nothing_gives_nothing(dtype):
    ids, lengths = flat([], dtype)
    for packed in (
        pack_blocks(ids, lengths, keep_tail=True, **shape(8)),
        pack_lines(ids, lengths, unk_id=-1, **shape(8)),
    ):
        assert packed.ids.dtype == dtype
        assert len(packed.ids) == len(packed.lengths) == packed.dropped_tokens == 0

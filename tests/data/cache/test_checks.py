"""A block that does not fit its encoding is refused in one line; one that passes can be read."""

import numpy as np
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from distilcache.data.cache.checks import check_columns, column_layout
from distilcache.data.cache.frames import decode_block, encode_block
from distilcache.data.cache.schema import SCHEMA_VERSION
from distilcache.data.errors import UserError
from tests.damage import fuzzed
from tests.data.encodings import ENCODINGS, read_everything, read_or_refuse
from tests.stages.corpus.text.streams import compress

VERSION = {"schema_version": SCHEMA_VERSION}


@pytest.mark.parametrize("kind", ENCODINGS)
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
def test_what_fits_passes_and_can_be_read(made_up, kind, padded):
    encoding = made_up.encoding(**ENCODINGS[kind])
    blocks = [made_up.block(encoding, seed, padded=padded) for seed in range(3)]
    for block in blocks:
        assert set(block) == set(column_layout(encoding))
        check_columns(block, encoding)
    read_everything(made_up.cache(encoding, blocks))


def test_blocks_of_stage_one_pass(small_cache):
    from distilcache.data.cache.cache import Cache

    for settings_ in (
        {"positions": "masked+0.2", "top_p": 0.5, "tail_samples": 4, "residual_samples": 6},
        {"rounds": 2, "hidden_layers": (1, -1)},
    ):
        cache = Cache.open(small_cache(**settings_))
        for number in range(cache.num_blocks):
            columns = cache.read_block(number)
            layout = column_layout(cache.encoding)
            found = {n: v.dtype.name for n, v in columns.items()}
            assert found == {n: column.dtype for n, column in layout.items()}


CHANGES = ["cut", "extend", "drop", "type", "set", "swap", "reverse", "empty", "move", "random"]
COLUMNS = sorted(
    {"lengths", "input_ids", "masked_counts", "masked_positions", "labels", "logit_ids",
     "logit_position_counts", "logit_positions", "hidden_position_counts", "hidden_positions",
     "logit_lengths", "logit_values", "logit_base", "logit_scale", "log_odds", "tail_ids",
     "residual_ids", "residual_mass", "hidden_1", "hidden_3"}
)  # fmt: skip
CHANGE = st.tuples(
    st.sampled_from(COLUMNS), st.sampled_from(CHANGES), st.integers(0, 1 << 16), st.integers(0, 99)
)


def changed(block: dict, name: str, change: str, number: int, place: int) -> dict:
    """A copy of a block with one column made wrong, or only different."""
    if name not in block:
        return block
    values = block[name].copy()
    n = len(values)
    at = place % n if n else 0
    if change == "drop":
        return {key: column for key, column in block.items() if key != name}
    if change == "cut":
        values = values[: -1 - place % 3]
    elif change == "extend":
        values = np.concatenate([values, values[: 1 + place % 3]])
    elif change == "empty":
        values = values[:0]
    elif change == "type":
        others = ["int8", "uint8", "int16", "uint32", "int64", "uint64", "float16", "float64"]
        values = values.astype(others[number % len(others)])
    elif change == "random":
        raw = np.random.default_rng(number).bytes(values.nbytes)
        values = np.frombuffer(raw, values.dtype)
    elif n:
        if change == "set" and values.dtype.kind == "u":
            values[at] = number % (np.iinfo(values.dtype).max + 1)
        elif change == "set" and values.dtype.kind == "f":
            values[at] = [np.nan, np.inf, -np.inf, 0.0][number % 4]
        elif change == "swap":
            values[at], values[number % n] = values[number % n], values[at]
        elif change == "reverse":
            values = values[::-1]
        elif change == "move" and values.dtype.kind == "u":
            # One less here and one more there: sums of counts and lengths stay.
            values[at] -= values[at] > 0
            values[number % n] += 1
    return {**block, name: values}


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # stored infinities
@fuzzed(100)
@given(
    kind=st.sampled_from(sorted(ENCODINGS)),
    seed=st.integers(0, 20),
    padded=st.booleans(),
    changes=st.lists(CHANGE, min_size=1, max_size=3),
)
@example("default", 0, True, [("lengths", "set", 0, 0)])
@example("default", 0, True, [("lengths", "type", 6, 0)])
@example("drawn", 0, True, [("hidden_positions", "set", 65535, 2)])
@example("logits apart", 1, True, [("masked_counts", "move", 3, 1)])
def test_a_changed_block_is_refused_or_read(made_up, kind, seed, padded, changes):
    encoding = made_up.encoding(**ENCODINGS[kind])
    sound_blocks = [made_up.block(encoding, seed + i, padded=padded) for i in range(2)]
    block = sound_blocks[1]
    for change in changes:
        block = changed(block, *change)
    cache = made_up.cache(encoding, [sound_blocks[0], block], sound_blocks)
    found = read_or_refuse(lambda: cache.read_block(1))
    if found is None:
        return
    assert all(np.array_equal(found[n], block[n], equal_nan=found[n].dtype.kind == "f")
               for n in block)  # fmt: skip
    read_everything(cache)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("labels"), "a block must have the column 'labels', got none"),
        (lambda b: b.update(lengths=b["lengths"].astype("f4")), "lengths must be uint16"),
        (lambda b: b["lengths"].__setitem__(0, 13), "lengths must hold at most max_length 12"),
        (lambda b: b["lengths"].__setitem__(0, 0), "lengths must hold a length of 1 or more"),
        (lambda b: b["input_ids"].__setitem__(3, 90), "token ids below 90, got 90"),
        (lambda b: b["logit_ids"].__setitem__(-1, 99), "logit_ids must hold token ids below 90"),
        (lambda b: b["residual_ids"].__setitem__(2, 90), "residual_ids must hold token ids"),
        (lambda b: b["logit_lengths"].__setitem__(0, 5), "logit_lengths must hold 1 to 4"),
        (lambda b: b["logit_lengths"].__setitem__(0, 0), "logit_lengths must hold 1 to 4, got 0"),
        (lambda b: b.update(log_odds=b["log_odds"][1:]), "log_odds must hold .* values"),
        (lambda b: b.update(residual_mass=b["residual_mass"][1:]), "residual_mass must hold"),
        (lambda b: b.update(hidden_3=b["hidden_3"][1:]), "hidden_3 must hold .* values"),
        (lambda b: b["hidden_positions"].__setitem__(0, 900), "within their sequences"),
    ],
)
def test_the_column_is_named(made_up, change, message):
    encoding = made_up.encoding(**ENCODINGS["drawn"])
    block = made_up.block(encoding)
    change(block)
    with pytest.raises(UserError, match=message):
        check_columns(block, encoding)


@pytest.mark.parametrize("name", ["masked_positions", "hidden_positions", "logit_positions"])
def test_positions_must_ascend(made_up, name):
    encoding = made_up.encoding(**ENCODINGS["drawn"])
    block = made_up.block(encoding, padded=False)
    counts = block[name.replace("positions", "counts" if "masked" in name else "position_counts")]
    sequence = int(np.flatnonzero(counts > 1)[0])
    at = int(counts[:sequence].sum())
    check_columns(block, encoding)
    for change in ([at + 1, at], [at, at]):  # another order, and one twice
        wrong = {**block, name: block[name].copy()}
        wrong[name][at : at + 2] = block[name][change]
        with pytest.raises(UserError, match=f"{name} must hold ascending positions"):
            check_columns(wrong, encoding)


def test_stored_logits_are_as_many_as_the_lengths_say(made_up):
    encoding = made_up.encoding(**ENCODINGS["drawn"])
    block = made_up.block(encoding)
    shorter = {name: block[name][:-1] for name in ("logit_ids", "logit_values")}
    with pytest.raises(UserError, match=r"logit_ids must hold \d+ values, got"):
        check_columns({**block, **shorter}, encoding)


@pytest.mark.parametrize("signal", ["hidden", "logit"])
def test_a_masked_position_without_its_signal_is_seen(made_up, signal):
    """Weights and rows are looked up by the masked positions."""
    encoding = made_up.encoding(**ENCODINGS["drawn"])
    block = made_up.block(encoding, padded=False)
    first = int(block["masked_positions"][0])
    sequence = int(np.flatnonzero(block["masked_counts"])[0])
    start = int(block[f"{signal}_position_counts"][:sequence].sum())
    own = block[f"{signal}_positions"][start : start + block[f"{signal}_position_counts"][sequence]]
    free = np.setdiff1d(np.arange(12), own)[0]
    own[own == first] = free
    own.sort()
    with pytest.raises(UserError, match=f"{signal}_positions must hold all masked positions"):
        check_columns(block, encoding)


def test_a_block_of_another_place_is_refused(made_up):
    encoding = made_up.encoding()
    blocks = [made_up.block(encoding, seed) for seed in range(2)]
    cache = made_up.cache(encoding, blocks[::-1], blocks)
    with pytest.raises(UserError, match=r"input_ids must hold \d+ values \(index\), got"):
        cache.read_block(0)


def test_blocks_with_no_masked_position_can_be_read(made_up):
    for kind in ENCODINGS:
        encoding = made_up.encoding(**ENCODINGS[kind])
        for seed in range(300):
            block = made_up.block(encoding, seed, sequences=1)
            if not len(block["labels"]):
                check_columns(block, encoding)
                read_everything(made_up.cache(encoding, [block, block]))
                break
        else:
            raise AssertionError("none found")


# ---- bytes ---------------------------------------------------------------------------------------


def damaged(raw: bytes, kind: str, at: int, value: int) -> bytes:
    at %= len(raw)
    if kind == "flip":
        return raw[:at] + bytes([raw[at] ^ (1 << value % 8)]) + raw[at + 1 :]
    if kind == "set":
        return raw[:at] + bytes([value]) + raw[at + 1 :]
    if kind == "cut":
        return raw[:at]
    if kind == "insert":
        return raw[:at] + bytes([value]) * (1 + value % 9) + raw[at:]
    if kind == "remove":
        return raw[:at] + raw[at + 1 + value % 9 :]
    return raw[:at] + bytes(value % 40) + raw[at + value % 40 :]


DAMAGE = st.tuples(
    st.sampled_from(["flip", "set", "cut", "insert", "remove", "zero"]),
    st.integers(0, 1 << 20),
    st.integers(0, 255),
)


@fuzzed(100)
@given(kind=st.sampled_from(sorted(ENCODINGS)), hits=st.lists(DAMAGE, min_size=1, max_size=3))
def test_damaged_bytes_are_refused_or_the_same_columns(made_up, kind, hits):
    encoding = made_up.encoding(**ENCODINGS[kind])
    block = made_up.block(encoding)
    frame = encode_block(block, VERSION, {"hidden_1": 7, "hidden_3": 7})
    for hit in hits:
        frame = damaged(frame, *hit) or b"\0"
    found = read_or_refuse(lambda: decode_block(frame)[0])
    assert found is None or {n: v.tobytes() for n, v in found.items()} == {
        n: v.tobytes() for n, v in block.items()
    }


@fuzzed(100)
@given(kind=st.sampled_from(sorted(ENCODINGS)), hits=st.lists(DAMAGE, min_size=1, max_size=3))
def test_a_damaged_arrow_stream_is_refused_or_read_within_its_bounds(made_up, kind, hits):
    """With a checksum that fits: what a faulty writer, or a hostile one, could make."""
    encoding = made_up.encoding(**ENCODINGS[kind])
    sound_block = made_up.block(encoding)
    said = made_up.metadata(encoding, 1)
    raw = zstandard.ZstdDecompressor().decompress(encode_block(sound_block, said))
    for hit in hits:
        raw = damaged(raw, *hit) or b"\0"
    frame = compress(raw)
    cache = made_up.cache(encoding, [sound_block] * 2)
    made_up.frames[str(cache.path)][1] = frame
    if read_or_refuse(lambda: cache.read_block(1)) is not None:
        read_everything(cache)

"""Packed codes: the layout of the docstring, byte for byte, and nothing outside it on damage."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distilcache.data.codecs.planes import Packing

CPU = torch.device("cpu")
LIMITS = st.lists(
    st.one_of(
        st.integers(0, 3),
        st.integers(0, 127),
        st.sampled_from([127, 128, 255, 256, 383, 384, 32767]),
        st.integers(0, 32767),
    ),
    min_size=1,
    max_size=24,
)


@st.composite
def limits_and_codes(draw):
    limits = draw(LIMITS)
    row = st.tuples(*(st.one_of(st.integers(-n, n), st.sampled_from([-n, n])) for n in limits))
    return limits, draw(st.lists(row, max_size=5))


def plain_pack(limits, codes):
    """One position, in plain Python from the words of the docstring."""
    low, narrow, high = [], [], []
    for limit, code in zip(limits, codes, strict=True):
        value, values = code + limit, 2 * limit + 1
        if values <= 256:
            narrow.append((value, values))
        else:
            low.append((value % 256, 256))
            high.append((value // 256, -(-values // 256)))
    planes, room = [], 0
    for digit, values in low + narrow + high:
        if not planes or room * values > 256:
            planes.append(0)
            room = 1
        planes[-1] = planes[-1] * values + digit
        room *= values
    return planes


@settings(max_examples=250, deadline=None)
@given(case=limits_and_codes())
def test_every_code_comes_back_and_bytes_are_those_of_the_docstring(case):
    limits, rows = case
    packing = Packing(tuple(limits))
    table = packing.table(CPU)
    codes = torch.tensor(rows, dtype=torch.int32).reshape(len(rows), len(limits)).T
    packed = table.pack(codes.clone())
    assert packed.dtype == torch.uint8
    assert packed.shape == (packing.planes, len(rows))
    assert packed.is_contiguous()
    assert packed.T.tolist() == [plain_pack(limits, row) for row in rows]
    assert torch.equal(table.unpack(packed), codes)


@settings(max_examples=250, deadline=None)
@given(limits=LIMITS)
def test_planes_hold_what_is_in_them_and_no_neighbours_would_fit_one(limits):
    packing = Packing(tuple(limits))
    sizes = [1] * packing.planes
    firsts = [0] * packing.planes
    for (_, span, _), (plane, _) in zip(packing.digits, packing.places, strict=True):
        assert 1 <= span <= 256
        firsts[plane] = firsts[plane] or span
        sizes[plane] *= span
    assert max(sizes) <= 256
    assert all(size * first > 256 for size, first in zip(sizes, firsts[1:], strict=False))
    assert packing.planes <= len(limits) + sum(2 * limit + 1 > 256 for limit in limits)
    assert [plane for plane, _ in packing.places] == sorted(plane for plane, _ in packing.places)


@settings(max_examples=250, deadline=None)
@given(limits=LIMITS, seed=st.integers(0, 1 << 30))
def test_any_bytes_give_codes_that_the_layout_can_hold(limits, seed):
    packing = Packing(tuple(limits))
    generator = torch.Generator().manual_seed(seed)
    planes = torch.randint(0, 256, (packing.planes, 9), generator=generator, dtype=torch.uint8)
    planes[:, 0], planes[:, 1] = 0, 255
    found = packing.table(CPU).unpack(planes)
    assert found.shape == (len(limits), 9)
    for limit, row in zip(limits, found.tolist(), strict=True):
        values = 2 * limit + 1
        most = limit if values <= 256 else 256 * -(-values // 256) - 1 - limit
        assert -limit <= min(row)
        assert max(row) <= most


def test_known_answer():
    """Ranges 3, 5, 7, 601, 3: low byte | 3 * 5 * 7 = 105 | 3 and the carry's 3 digits."""
    packing = Packing((1, 2, 3, 300, 1))
    assert packing.digits == [(3, 256, 1), (0, 3, 1), (1, 5, 1), (2, 7, 1), (4, 3, 1), (3, 3, 256)]
    assert packing.places == [(0, 1), (1, 35), (1, 7), (1, 1), (2, 3), (2, 1)]
    codes = torch.tensor([[1, -2, 3, 299, 0], [-1, 0, -3, -300, -1], [0, 0, 0, 0, 1]]).int().T
    packed = packing.table(CPU).pack(codes.clone())
    # 300 + 299 = 599 = 2 * 256 + 87;  2 * 35 + 0 * 7 + 6 = 76;  1 * 3 + 2 = 5
    assert packed.tolist() == [[87, 0, 300 - 256], [76, 14, 35 + 14 + 3], [5, 0, 2 * 3 + 1]]
    assert torch.equal(packing.table(CPU).unpack(packed), codes)


def test_a_coordinate_that_never_moves_takes_no_room():
    assert Packing((0,) * 9).planes == 1
    assert Packing((127, *(0,) * 9)).planes == 1
    assert Packing((0, 127, 127)).planes == 2
    assert Packing(()).planes == 0


@pytest.mark.parametrize("limit", [127, 128, 32767])
def test_the_edges_of_one_and_two_digits(limit):
    packing = Packing((limit,))
    assert packing.planes == (1 if limit <= 127 else 2)
    codes = torch.arange(-limit, limit + 1, dtype=torch.int32)[None]
    table = packing.table(CPU)
    assert torch.equal(table.unpack(table.pack(codes.clone())), codes)

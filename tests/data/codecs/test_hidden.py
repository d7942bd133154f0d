"""The transform codec: half a step at most, what clips is counted, parameters survive."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.codecs.hidden import INT8_LIMIT, INT16_LIMIT, HiddenCodec, HiddenDecoder
from data.errors import UserError


def make_codec(width=8, step=0.1, wide=2, seed=0) -> HiddenCodec:
    """A codec with a well-conditioned, non-orthogonal basis."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    r, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    scale = torch.linspace(2.0, 0.5, width, dtype=torch.float64)
    analysis = q * scale @ r
    return HiddenCodec(
        mean=torch.randn(width, generator=generator),
        analysis=analysis.float(),
        synthesis=torch.linalg.inv(analysis).float(),
        step=step,
        wide_planes=wide,
    )


def hidden(rows, width=8, seed=1, scale=1.0) -> torch.Tensor:
    return scale * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 20),
    width=st.integers(1, 12),
    wide=st.integers(0, 12),
    step=st.floats(0.05, 3.0),
    seed=st.integers(0, 1000),
)
def test_an_unclipped_code_is_off_by_half_a_step_at_most(rows, width, wide, step, seed):
    codec = make_codec(width, step, min(wide, width), seed)
    states = hidden(rows, width, seed)
    high, low, clipped = codec.encode(states)
    assert (high.dtype, low.dtype) == (torch.int16, torch.int8)
    assert high.shape == (codec.wide_planes, rows)
    assert low.shape == (width - codec.wide_planes, rows)
    assert high.is_contiguous()
    assert low.is_contiguous()
    coordinates = (states.double() - codec.mean.double()) @ codec.analysis.double()
    codes = torch.cat([high.double(), low.double()]).T
    limits = torch.tensor([INT16_LIMIT] * codec.wide_planes + [INT8_LIMIT] * len(low))
    inside = (coordinates / step).abs() < limits - 0.5
    error = (codes * step - coordinates).abs()
    assert (error[inside] <= step / 2 * (1 + 1e-3) + 1e-5).all()
    decoded = codec.decode(high, low)
    again = (decoded.double() - codec.mean.double()) @ codec.analysis.double()
    torch.testing.assert_close(again, codes * step, rtol=1e-4, atol=1e-4)
    assert int(clipped) <= int((~inside).sum())


def test_clipping_is_counted_and_saturates():
    codec = HiddenCodec(torch.zeros(2), torch.eye(2), torch.eye(2), 1.0, 1)
    states = torch.tensor(
        [[32767.4, 127.4], [32768.0, 0.0], [0.0, 128.0], [-1e9, -1e9], [-5, -128.0]]
    )
    high, low, clipped = codec.encode(states)
    assert high.tolist() == [[32767, 32767, 0, -32767, -5]]
    assert low.tolist() == [[127, 0, 127, -127, -127]]
    assert int(clipped) == 5


def test_wide_planes_carry_what_int8_cannot():
    codec = HiddenCodec(torch.zeros(2), torch.eye(2), torch.eye(2), 0.01, 1)
    states = torch.tensor([[100.0, 1.0]])
    high, low, clipped = codec.encode(states)
    assert (high.item(), low.item(), int(clipped)) == (10000, 100, 0)
    torch.testing.assert_close(codec.decode(high, low), states)


def test_known_answer():
    """Plane-major, wide planes first; decode is step * codes^T @ synthesis + mean."""
    codec = HiddenCodec(
        mean=torch.tensor([1.0, -1.0, 0.0]),
        analysis=torch.diag(torch.tensor([4.0, 2.0, 1.0])),
        synthesis=torch.diag(torch.tensor([0.25, 0.5, 1.0])),
        step=0.5,
        wide_planes=1,
    )
    states = torch.tensor([[2.0, 0.0, 0.3], [1.1, -3.0, -0.7]])
    high, low, _ = codec.encode(states)
    assert high.tolist() == [[8, 1]]
    assert low.tolist() == [[4, -8], [1, -1]]
    np.testing.assert_allclose(
        codec.decode(high, low), [[2.0, 0.0, 0.5], [1.125, -3.0, -0.5]], rtol=1e-6
    )


def test_save_and_load(tmp_path):
    codec = make_codec(step=0.1 + 1e-17, wide=3)
    codec.save(tmp_path / "codec.safetensors")
    found = HiddenCodec.load(tmp_path / "codec.safetensors")
    for name in ("mean", "analysis", "synthesis"):
        assert torch.equal(getattr(found, name), getattr(codec, name))
    assert (found.step, found.wide_planes) == (codec.step, 3)
    codec.save(tmp_path / "again.safetensors")
    raw = [(tmp_path / f"{n}.safetensors").read_bytes() for n in ("codec", "again")]
    assert raw[0] == raw[1]


@pytest.mark.parametrize("damage", ["missing", "cut", "names"])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "codec.safetensors"
    make_codec().save(path)
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.write_bytes(path.read_bytes().replace(b'"step"', b'"slip"'))
    with pytest.raises(UserError, match="codec.safetensors must hold the hidden-state codec"):
        HiddenCodec.load(path)


def test_decoder_of_a_batch():
    codec = make_codec(wide=3)
    states = hidden(11)
    high, low, _ = codec.encode(states)
    decoder = HiddenDecoder(codec)
    assert list(decoder.parameters()) == []
    assert decoder.state_dict() == {}
    with torch.autocast("cpu", torch.bfloat16):
        found = decoder({"hidden_wide": high, "hidden_narrow": low})
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, codec.decode(high, low))
    raw = HiddenDecoder()({"hidden_raw": states.half()})
    assert raw.dtype == torch.float32
    assert torch.equal(raw, states.half().float())


def test_encoding_happens_in_float32_whatever_the_input():
    codec = make_codec(wide=0)
    states = hidden(5).bfloat16()
    expected = codec.encode(states.float())
    for a, b in zip(codec.encode(states), expected, strict=True):
        assert torch.equal(a, b)

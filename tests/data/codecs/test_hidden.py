"""The transform codec: half a step at most, what clips is counted, parameters survive."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from distilcache.data.codecs.hidden import LIMIT_MAX, HiddenCodec, HiddenDecoder
from distilcache.data.errors import UserError


def make_codec(width=8, step=0.1, limit=127, seed=0, **further) -> HiddenCodec:
    """A codec with a well-conditioned, non-orthogonal basis."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    r, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    scale = torch.linspace(2.0, 0.5, width, dtype=torch.float64)
    analysis = q * scale @ r
    limits = (limit,) * width if isinstance(limit, int) else tuple(limit)
    return HiddenCodec(
        mean=torch.randn(width, generator=generator),
        analysis=analysis.float(),
        synthesis=torch.linalg.inv(analysis).float(),
        step=step,
        limits=limits,
        **further,
    )


def plain(step=1.0, limits=(300, 127)) -> HiddenCodec:
    """Coordinates are the hidden states themselves."""
    width = len(limits)
    return HiddenCodec(torch.zeros(width), torch.eye(width), torch.eye(width), step, limits)


def unpacked(codec, planes) -> torch.Tensor:
    """Codes [N, D] of the planes."""
    return codec.packing.table(planes.device).unpack(planes).T


def hidden(rows, width=8, seed=1, scale=1.0) -> torch.Tensor:
    return scale * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(0, 20),
    limits=st.lists(st.one_of(st.integers(0, 6), st.integers(0, 400)), min_size=1, max_size=12),
    step=st.floats(0.02, 3.0),
    seed=st.integers(0, 1000),
)
def test_an_unclipped_code_is_off_by_half_a_step_at_most(rows, limits, step, seed):
    width = len(limits)
    codec = make_codec(width, step, limits, seed)
    states = hidden(rows, width, seed)
    planes, clipped = codec.encode(states)
    assert planes.dtype == torch.uint8
    assert planes.shape == (codec.packing.planes, rows)
    assert planes.is_contiguous()
    codes = unpacked(codec, planes).double()
    coordinates = (states.double() - codec.mean.double()) @ codec.analysis.double()
    bounds = torch.tensor(limits, dtype=torch.float64)
    assert (codes.abs() <= bounds).all()
    # Coordinates are computed in float32; one that is as good as half-way may go either way.
    inside = (coordinates / step).abs() < bounds + 0.5 - 1e-3
    error = (codes * step - coordinates).abs()
    assert (error[inside] <= step / 2 * (1 + 1e-3) + 1e-5).all()
    decoded = codec.decode(planes)
    again = (decoded.double() - codec.mean.double()) @ codec.analysis.double()
    torch.testing.assert_close(again, codes * step, rtol=1e-4, atol=1e-4)
    outside = (coordinates / step).abs() > bounds + 0.5 + 1e-3
    assert int(outside.sum()) <= int(clipped) <= int((~inside).sum())
    assert (codes.abs() == bounds)[outside].all()


def test_clipping_is_counted_and_saturates():
    states = torch.tensor([[300.4, 127.4], [300.6, 0.0], [0.0, 128.0], [-1e9, -1e9], [-5, -127.4]])
    planes, clipped = plain().encode(states)
    assert unpacked(plain(), planes).T.tolist() == [[300, 300, 0, -300, -5],
                                                    [127, 0, 127, -127, -127]]  # fmt: skip
    assert int(clipped) == 4


def test_two_digits_carry_what_one_byte_cannot():
    codec = plain(0.01, (LIMIT_MAX, 127))
    states = torch.tensor([[100.0, 1.0], [-327.67, -1.0]])
    planes, clipped = codec.encode(states)
    assert planes.shape == (3, 2)
    assert (unpacked(codec, planes)[0].tolist(), int(clipped)) == ([10000, 100], 0)
    torch.testing.assert_close(codec.decode(planes), states)


def test_known_answer():
    """Plane-major; decode is step * codes^T @ synthesis + mean."""
    codec = HiddenCodec(
        mean=torch.tensor([1.0, -1.0, 0.0]),
        analysis=torch.diag(torch.tensor([4.0, 2.0, 1.0])),
        synthesis=torch.diag(torch.tensor([0.25, 0.5, 1.0])),
        step=0.5,
        limits=(10, 5, 1),
    )
    states = torch.tensor([[2.0, 0.0, 0.3], [1.1, -2.0, -0.7]])
    planes, _ = codec.encode(states)
    assert unpacked(codec, planes).tolist() == [[8, 4, 1], [1, -4, -1]]
    # Ranges 21 * 11 = 231, then 3: (8 + 10) * 11 + (4 + 5), (1 + 10) * 11 + (-4 + 5) | 2, 0.
    assert planes.tolist() == [[207, 122], [2, 0]]
    np.testing.assert_allclose(
        codec.decode(planes), [[2.0, 0.0, 0.5], [1.125, -2.0, -0.5]], rtol=1e-6
    )


def test_save_and_load(tmp_path):
    codec = make_codec(step=0.1 + 1e-17, limit=range(100, 900, 100))
    codec.save(tmp_path / "codec.safetensors")
    found = HiddenCodec.load(tmp_path / "codec.safetensors")
    for name in ("mean", "analysis", "synthesis"):
        assert torch.equal(getattr(found, name), getattr(codec, name))
    assert (found.step, found.limits) == (codec.step, codec.limits)
    assert (found.replay_bias, found.temperatures) == (None, ())
    assert found.packing.digits == codec.packing.digits
    codec.save(tmp_path / "again.safetensors")
    raw = [(tmp_path / f"{n}.safetensors").read_bytes() for n in ("codec", "again")]
    assert raw[0] == raw[1]


def test_the_replay_bias_is_saved_with_its_temperatures(tmp_path):
    bias = hidden(2, 30, seed=7)
    codec = make_codec(replay_bias=bias, temperatures=(1.0, 2.0000000001))
    path = tmp_path / "codec.safetensors"
    codec.save(path)
    raw = path.read_bytes()
    found = HiddenCodec.load(path)
    assert torch.equal(found.replay_bias, bias)
    assert found.temperatures == codec.temperatures
    found.save(path)
    assert path.read_bytes() == raw
    types = {name: (t.dtype, tuple(t.shape)) for name, t in load_file(path).items()}
    assert types == {
        "mean": (torch.float32, (8,)),
        "analysis": (torch.float32, (8, 8)),
        "synthesis": (torch.float32, (8, 8)),
        "step": (torch.float64, (1,)),
        "limits": (torch.int32, (8,)),
        "replay_bias": (torch.float32, (2, 30)),
        "temperatures": (torch.float64, (2,)),
    }


def test_the_bias_of_a_temperature():
    bias = hidden(2, 30)
    codec = make_codec(replay_bias=bias, temperatures=(2.0, 1.0))
    assert torch.equal(codec.bias_at(1.0), bias[1])
    assert torch.equal(codec.bias_at(2), bias[0])
    assert codec.bias_at(4.0) is None
    assert make_codec().bias_at(1.0) is None


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
    codec = make_codec(limit=range(3, 400, 50))
    states = hidden(11)
    planes, _ = codec.encode(states)
    decoder = HiddenDecoder("hidden_6", codec)
    assert list(decoder.parameters()) == []
    assert decoder.state_dict() == {}
    exact = decoder({"hidden_6": planes})
    torch.testing.assert_close(exact, codec.decode(planes))
    with torch.autocast("cpu", torch.bfloat16):
        found = decoder({"hidden_6": planes})
    assert found.dtype == torch.float32
    rounded, coded = (found - exact).square().mean(), (exact - states).square().mean()
    assert 0 < rounded < coded / 100
    raw = HiddenDecoder("hidden_0")({"hidden_0": states.half(), "hidden_6": planes})
    assert raw.dtype == torch.float32
    assert torch.equal(raw, states.half().float())


def test_encoding_happens_in_float32_whatever_the_input():
    codec = make_codec()
    states = hidden(5).bfloat16()
    expected = codec.encode(states.float())
    for a, b in zip(codec.encode(states), expected, strict=True):
        assert torch.equal(a, b)

"""The codec of relations: its metric against second derivatives, its rounding, its file."""

import pytest
import torch
from torch.func import hessian

from distilcache.data.codecs.hidden import HiddenCodec
from distilcache.data.codecs.relation_spec import KINDS, TOKENS
from distilcache.data.codecs.relations import RelationMaps, Relations, relation_kl
from distilcache.stages.teacher_cache import calibrate_relations as module
from distilcache.stages.teacher_cache.calibrate_relations import Texts, calibrate_relations

D, E, HEADS = 12, 7, 2


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make_maps():
    return RelationMaps({f"{kind}.weight": draw(D, D, seed=i) for i, kind in enumerate(KINDS)})


def texts(count=40):
    """Half of each state follows from the token, as a linear map of its embedding tells."""
    words = draw(9, E, seed=5)
    by_token = draw(E, D, seed=6)
    spread = torch.logspace(0.5, -1.0, D)
    read, embedded = [], []
    for number in range(count):
        length = 4 + number % 9
        ids = torch.randint(9, (length,), generator=torch.Generator().manual_seed(number))
        embedded.append(words[ids])
        read.append(words[ids] @ by_token + spread * draw(length, D, seed=100 + number) + 3)
    return Texts(read, embedded)


@pytest.mark.parametrize("length", [4, 3])
def test_the_metric_is_the_second_derivative_of_the_relation_kl(length):
    """By the queries of one position; padding has no part in it."""
    x_LP = draw(4, 6, dtype=torch.float64)
    felt = module._felt(x_LP[None], HEADS, torch.arange(4)[None] < length)

    def kl(noise_d, position, head):
        own = x_LP[:length].split(3, 1)[head]
        other = own + torch.eye(length, dtype=own.dtype)[position][:, None] * noise_d
        p, q = ((h @ h.T / 3**0.5).log_softmax(-1) for h in (own, other))
        return (p.exp() * (p - q)).sum()

    nothing = torch.zeros(3, dtype=torch.float64)
    for head in range(HEADS):
        wanted = sum(hessian(kl)(nothing, position, head) for position in range(length))
        torch.testing.assert_close(felt[head] / 3, wanted)


def test_the_quality_is_reached_on_the_calibration_text():
    maps, text = make_maps(), texts()
    for quality in (0.01, 0.1):
        codec = calibrate_relations(text, maps, HEADS, quality)
        assert module.codec_kl(codec, text, maps, HEADS) == pytest.approx(quality, rel=0.2)
        total = 0.0
        for read, embedded in zip(text.read, text.embedded, strict=True):  # one by one
            decoded = codec.decode(codec.encode(read, embedded)[0], embedded)
            total += relation_kl(maps(read[None]), maps(decoded[None]), HEADS).mean()
        assert total / sum(map(len, text.read)) == pytest.approx(quality, rel=0.2)


def test_students_read_what_is_right_on_average():
    """On other text, by coordinate: the slope of what comes back is 1, and less without gains."""
    text, other = texts(400), texts(800)
    codec = calibrate_relations(text, make_maps(), HEADS, 0.1)
    assert codec.gains.min() >= 1
    assert codec.gains.max() < module.MOST_GAIN
    read, embedded = torch.cat(list(other.read)), torch.cat(list(other.embedded))
    planes, _ = codec.encode(read, embedded)
    roles = {f"{kind}.weight": torch.eye(D) for kind in KINDS}
    decoder = Relations("relation_1", codec, {**roles, TOKENS: embedded})
    known = codec.predicted(embedded) + codec.mean
    true = (read - known) @ codec.analysis

    def slopes(found):
        return (((found - known) @ codec.analysis) * true).sum(0) / true.square().sum(0)

    ids = torch.arange(len(read))
    torch.testing.assert_close(slopes(decoder.read(planes, ids)), torch.ones(D), rtol=0, atol=0.05)
    assert slopes(codec.decode(planes, embedded)).min() < 0.8


def test_the_gain_of_a_coordinate_is_limited():
    """Of a coarse code most coordinates are always 0."""
    codec = calibrate_relations(texts(), make_maps(), HEADS, 1.0)
    assert codec.gains.max() == module.MOST_GAIN


def test_codes_and_their_file(tmp_path):
    """Rounded up from 0.6 of a step on; decoded to the mean of what was rounded so."""
    text = texts()
    codec = calibrate_relations(text, make_maps(), HEADS, 0.05)
    codec.save(tmp_path / "codec.safetensors")
    again = HiddenCodec.load(tmp_path / "codec.safetensors")
    assert torch.equal(again.gains, codec.gains)
    read, embedded = torch.cat(list(text.read)), torch.cat(list(text.embedded))
    planes, clipped = again.encode(read, embedded)
    assert torch.equal(planes, codec.encode(read, embedded)[0])
    assert clipped == 0
    scaled = (read - embedded @ codec.prediction - codec.mean) @ codec.analysis / codec.step
    codes = codec.packing.table(read.device).unpack(planes).T.float()
    wanted = scaled.sign() * ((scaled.abs() + 0.4).floor())
    assert torch.equal(codes, wanted + 0.0)
    for coordinate in range(D):
        own = codes[:, coordinate] != 0
        if own.any():
            beyond = (scaled.abs() - codes.abs())[own, coordinate].mean()
            assert codec.offsets[coordinate] == pytest.approx(float(beyond), abs=1e-5)
    decoded = again.decode(planes, embedded)
    values = codes + codes.sign() * codec.offsets
    by_hand = values * codec.step @ codec.synthesis + codec.mean + embedded @ codec.prediction
    torch.testing.assert_close(decoded, by_hand)


def test_calibration_is_deterministic():
    first, second = (calibrate_relations(texts(), make_maps(), HEADS, 0.05) for _ in range(2))
    assert first.step == second.step
    assert torch.equal(first.analysis, second.analysis)

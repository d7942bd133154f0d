"""What a cache's encoding says of itself, and that it survives JSON."""

import json

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from distilcache.data.cache.schema import Encoding, HiddenEncoding

ENCODINGS = st.builds(
    Encoding,
    vocab_size=st.integers(1, 1 << 20),
    max_length=st.integers(8, 4096),
    pad_id=st.integers(0, 5),
    hidden_positions=st.sampled_from(["masked", "all", "masked+0.1"]),
    logit_positions=st.sampled_from(["masked", "all", "masked+0.25"]),
    temperatures=st.lists(st.floats(0.5, 8), max_size=3).map(tuple),
    top_k=st.integers(0, 100),
    top_p=st.floats(0.1, 1.0),
    tail_samples=st.integers(0, 50),
    residual_samples=st.integers(0, 25).map(lambda half: 2 * half),
    logits_dtype=st.sampled_from(["float16", "float32", "uint8"]),
    hidden=st.lists(
        st.builds(
            HiddenEncoding,
            layer=st.integers(0, 12),
            width=st.integers(1, 1024),
            dtype=st.sampled_from(["coded", "float16", "float32"]),
            planes=st.integers(0, 9),
            codec_sha256=st.text("0123456789abcdef", max_size=64),
        ),
        max_size=3,
    ).map(tuple),
    num_layers=st.integers(0, 24),
)


@given(encoding=ENCODINGS)
def test_encoding_survives_json(encoding):
    assert Encoding.from_dict(json.loads(json.dumps(encoding.to_dict()))) == encoding


def test_encoding_names_types_and_layers():
    hidden = tuple(HiddenEncoding(layer=n, width=4, dtype="float16") for n in (0, 3))
    encoding = Encoding(vocab_size=1 << 16, max_length=8, pad_id=0, hidden=hidden, num_layers=3)
    assert encoding.token_dtype == np.uint16
    assert Encoding(vocab_size=(1 << 16) + 1, max_length=8, pad_id=0).token_dtype == np.uint32
    assert encoding.hidden_layer() is hidden[1]
    assert encoding.hidden_layer(0) is hidden[0]
    assert encoding.hidden_layer(1) is None
    assert hidden[1].column == "hidden_3"


def test_what_an_encoding_stores_and_where_its_draws_are_made():
    bare = {"vocab_size": 9, "max_length": 8, "pad_id": 0}
    assert not Encoding(**bare).stores_logits
    for name in ("top_k", "tail_samples", "residual_samples"):
        assert Encoding(**bare, **{name: 2}).stores_logits
    assert Encoding(**bare).sample_temperature == 1.0
    assert Encoding(**bare, temperatures=(3.0, 2.0)).sample_temperature == 3.0

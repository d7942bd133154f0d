"""What stage one stores for relations: against the model's own states and a dense formula."""

import math
import shutil

import numpy as np
import pytest
import torch
from transformers import BertForMaskedLM

from distilcache.data.cache.cache import Cache
from distilcache.data.errors import UserError
from distilcache.data.loader.dataset import CachedBatches
from distilcache.data.verify.run import Settings, verify_cache
from distilcache.stages.verify.rerun import RerunSettings, rerun
from tests.stages.teacher_cache.teacher_cache_support import dense_forward, one_line

LINES = {"packing": "lines", "max_length": 24, "documents": 160}
HEADS = 2


def queries_of(model, layer, read_TD):
    """Queries, keys and values of a BERT layer by its own modules, [3, T, D]."""
    attention = model.bert.encoder.layer[layer - 1].attention.self
    maps = (attention.query, attention.key, attention.value)
    with torch.no_grad():
        return torch.stack([m(read_TD) for m in maps])


def relations(x_LD):
    """Log relations of one sequence, written out head by head."""
    units = x_LD.shape[1] // HEADS
    heads = x_LD.double().split(units, 1)
    return torch.stack([(h @ h.T / math.sqrt(units)).log_softmax(-1) for h in heads])


def mean_kl(model, layer, block, stored_TD):
    """Mean relation KL of a block, sequence by sequence."""
    total, start = 0.0, 0
    for _, states in dense_forward(model, block):
        true_LD = states[layer - 1]
        other_LD = stored_TD[start : start + len(true_LD)]
        start += len(true_LD)
        for true, other in zip(
            queries_of(model, layer, true_LD), queries_of(model, layer, other_LD), strict=True
        ):
            p, q = relations(true), relations(other)
            total += float((p.exp() * (p - q)).sum()) / (3 * HEADS)
    return total / start


def read_of(cache, block):
    """What is stored of one block, decoded."""
    decoder, encoding = cache.teacher.relations(), cache.encoding.relation
    stored = torch.from_numpy(block[encoding.column].copy())
    rows = encoding.planes if encoding.dtype == "coded" else -1
    stored = stored.reshape(rows, -1 if encoding.dtype == "coded" else encoding.width)
    return decoder.read(stored, torch.from_numpy(block["input_ids"].astype(np.int64)))


@pytest.mark.parametrize(("corpus", "layer"), [({}, -1), (LINES, 2)], ids=["unpadded", "padded"])
def test_raw_states_are_what_the_layer_reads(small_cache, small_teacher, corpus, layer):
    """At all tokens; masked positions of the last layer as without them."""
    settings = {"hidden_dtype": "float32", "batch_tokens": 100}
    cache = Cache.open(small_cache(corpus=corpus, relation_layer=layer, **settings))
    plain = Cache.open(small_cache(corpus=corpus, **settings))
    model = BertForMaskedLM.from_pretrained(small_teacher).eval()
    number = 3 if layer == -1 else 2
    assert (cache.encoding.relation.layer, cache.encoding.relation.dtype) == (number, "float32")
    for at in range(0, cache.num_blocks, 3):
        block = cache.read_block(at)
        wanted = torch.cat([states[number - 1] for _, states in dense_forward(model, block)])
        torch.testing.assert_close(read_of(cache, block), wanted, rtol=1e-5, atol=2e-5)
        for name, column in plain.read_block(at).items():
            np.testing.assert_array_equal(column, block[name], err_msg=name)


@pytest.mark.parametrize("corpus", [{}, LINES], ids=["unpadded", "padded"])
@pytest.mark.parametrize("dtype", ["float32", "coded", "none"])
def test_a_batch_gives_the_layers_queries(small_cache, small_teacher, corpus, dtype):
    cache = Cache.open(small_cache(corpus=corpus, relation_layer=2, hidden_dtype=dtype))
    model = BertForMaskedLM.from_pretrained(small_teacher).eval()
    batches = CachedBatches(cache, batch_size=6, seed=0, relation=True, signal=None, hidden=False)
    batch = next(b for b in map(batches.__getitem__, range(len(batches)))
                 if ("relation_index" in b) == bool(corpus))  # fmt: skip
    found = cache.teacher.relations()(batch)
    with torch.no_grad():
        output = model.bert(batch["input_ids"], batch["attention_mask"], output_hidden_states=True)
    wanted = queries_of(model, 2, output.hidden_states[1])
    there = batch["attention_mask"] > 0
    assert bool(there.all()) != bool(corpus)
    if dtype == "float32":
        torch.testing.assert_close(found[:, there], wanted[:, there], rtol=1e-5, atol=2e-5)
    else:
        gap = (found - wanted)[:, there].pow(2).mean() / wanted[:, there].var()
        assert 1e-5 < gap < 0.2


@pytest.mark.parametrize("quality", [0.02, 0.002])
def test_the_quality_is_the_mean_relation_kl(small_cache, small_teacher, quality):
    cache = Cache.open(
        small_cache(corpus=LINES, relation_layer=2, relation_quality=quality, rounds=2)
    )
    model = BertForMaskedLM.from_pretrained(small_teacher).eval()
    blocks = [cache.read_block(number) for number in range(0, cache.num_blocks, 4)]
    codec = cache.teacher.codec_of(cache.encoding.relation)
    embeddings = cache.teacher.relations().embeddings

    def nearest(block):
        planes = torch.from_numpy(block["relation_2"].copy()).reshape(codec.packing.planes, -1)
        return codec.decode(planes, embeddings[torch.from_numpy(block["input_ids"].astype(int))])

    found = np.mean([mean_kl(model, 2, block, nearest(block)) for block in blocks])
    assert 0.6 * quality < found < 1.6 * quality
    assert cache.manifest.clipped_fraction < 1e-3


def test_the_codec_spares_bytes_that_the_tokens_tell(small_cache):
    """The prediction from the word embeddings takes off most of a first layer's variance."""
    cache = Cache.open(small_cache(corpus=LINES, relation_layer=1))
    codec = cache.teacher.codec_of(cache.encoding.relation)
    block = Cache.open(
        small_cache(corpus=LINES, relation_layer=1, hidden_dtype="float32")
    ).read_block(0)
    states = torch.from_numpy(block["relation_1"].copy()).reshape(-1, 32)
    ids = torch.from_numpy(block["input_ids"].astype(np.int64))
    left = states - codec.predicted(cache.teacher.relations().embeddings[ids])
    assert left.var(0).sum() < 0.5 * states.var(0).sum()


def test_a_cache_without_relations_is_as_before(small_cache):
    """Neither its identity nor its blocks mention them, so fingerprints stay."""
    cache = Cache.open(small_cache())
    assert "relation" not in cache.encoding.to_dict()
    stored = cache.manifest.provenance["identity"]["cache"]
    assert not [name for name in stored if name.startswith("relation")]
    with_them = Cache.open(small_cache(relation_layer=-1))
    assert with_them.manifest.fingerprint != cache.manifest.fingerprint
    stored = with_them.manifest.provenance["identity"]["cache"]
    assert (stored["relation_layer"], stored["relation_quality"]) == (-1, 0.005)


@pytest.mark.parametrize("dtype", ["coded", "float32"])
def test_verify_and_rerun(small_cache, dtype):
    cache = Cache.open(small_cache(corpus=LINES, relation_layer=-1, hidden_dtype=dtype))
    assert list(verify_cache(cache.path, Settings())) == []
    rows = rerun(cache, RerunSettings(blocks=3, device="cpu"))
    assert [row for row in rows if not row.passed] == []
    found = {row.name: row.value for row in rows}["relations of layer 3, KL (nats)"]
    assert 0.0025 < found < 0.01 if dtype == "coded" else found < 1e-9


def test_rerun_sees_states_of_another_text(small_cache, monkeypatch):
    cache = Cache.open(small_cache(relation_layer=-1))
    read = Cache.read_block

    def turned(self, number):
        columns = dict(read(self, number))
        planes = columns["relation_3"].reshape(self.encoding.relation.planes, -1)
        return columns | {"relation_3": np.roll(planes, 5, axis=1).reshape(-1)}

    monkeypatch.setattr(Cache, "read_block", turned)
    failed = [row.name for row in rerun(cache, RerunSettings(blocks=2, device="cpu"))
              if not row.passed]  # fmt: skip
    assert failed == ["relations of layer 3, KL (nats)", "codes that come out the same"]


def test_a_lost_codec_is_calibrated_again(small_cache, build_cache_in, small_corpus, small_teacher,
                                          tmp_path):  # fmt: skip
    whole = small_cache(corpus=LINES, relation_layer=-1)
    copy = shutil.copytree(whole, tmp_path / "cache")
    codec = copy / "teacher" / "relation_codec_3.safetensors"
    codec.write_bytes(codec.read_bytes()[:-1])
    assert [file.name for fault in verify_cache(copy, Settings()) for file in fault.damaged] == [
        codec.name
    ]
    for path in (codec, copy / "manifest.json"):
        path.unlink()
    build_cache_in(copy, small_corpus(**LINES), small_teacher, relation_layer=-1)
    assert codec.read_bytes() == (whole / "teacher" / codec.name).read_bytes()


@pytest.mark.parametrize("layer", [4, -4])
def test_a_layer_that_is_not_there(small_corpus, small_teacher, build_cache_in, tmp_path, layer):
    with pytest.raises(UserError, match=f"relation_layer must lie between 1 and 3.*got {layer}"):
        build_cache_in(tmp_path / "c", small_corpus(), small_teacher, relation_layer=layer)
    assert not (tmp_path / "c" / "provenance.json").exists()


def test_no_relations_of_several_teachers(small_corpus, small_teacher, build_cache_in, tmp_path):
    with pytest.raises(UserError) as error:
        build_cache_in(
            tmp_path / "c", small_corpus(), small_teacher, ensemble=[small_teacher],
            hidden_dtype="none", relation_layer=-1,
        )  # fmt: skip
    assert one_line(error).startswith("cache: relation_layer must be 0 with teacher.ensemble")

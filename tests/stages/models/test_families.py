"""Teachers of every family, each with its own type of tokenizer, against transformers itself."""

import functools

import numpy as np
import pytest
import torch
import transformers

from distilcache.data.cache.cache import Cache
from distilcache.data.codecs.logits import unpack
from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError
from distilcache.data.masks.masking import MaskingConfig
from distilcache.stages.evaluate.config import EvaluateConfig
from distilcache.stages.evaluate.heldout import read_heldout
from distilcache.stages.evaluate.run import ModelEntry, evaluate_models
from distilcache.stages.teacher_cache.teacher import load_teacher
from distilcache.stages.verify.rerun import RerunSettings, rerun
from tests.builders import build_corpus_of, random_texts, run_stage_one
from tests.stages.models.families_support import (
    FAMOUS,
    make_model,
    open_model,
    plain_outputs,
    save_teacher,
)

EXACT = {"hidden_dtype": "float32", "logits_dtype": "float32", "hidden_layers": (0, 2, -1)}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Made:
    """A teacher of one family and its corpus of padded lines."""

    def __init__(self, kind, folder):
        self.folder = folder
        self.teacher = save_teacher(kind, folder / "teacher")
        settings = {"packing": "lines", "max_length": 32, "heldout_fraction": 0.2}
        text = "\n".join(random_texts(60, seed=1))
        build_corpus_of([text], folder, self.teacher, block_sequences=16, **settings)
        self.corpus = Corpus.open(folder / "corpus")

    def cache(self, **settings):
        out = self.folder / f"cache-{len(list(self.folder.glob('cache-*')))}"
        return Cache.open(run_stage_one(out, self.folder / "corpus", self.teacher, **settings))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """``made(kind)``: once per family."""
    return functools.cache(lambda kind: Made(kind, tmp_path_factory.mktemp(kind)))


@pytest.mark.parametrize("kind", FAMOUS)
def test_sequences_are_the_tokenizers_own(made, kind):
    """Special tokens stand where the family was trained with them: XLNet's are at the end."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(made(kind).teacher)
    lines = (made(kind).folder / "text.txt").read_text().splitlines()
    wanted = {tuple(tokenizer(line)["input_ids"]) for line in lines}
    found = []
    for name in ("train", "heldout"):
        split = made(kind).corpus.split(name)
        for block in range(split.num_blocks):
            ids, lengths = split.block(block)
            found += [tuple(x.tolist()) for x in np.split(ids, np.cumsum(lengths)[:-1])]
    whole = [sequence for sequence in found if len(sequence) < 32]
    assert len(whole) > 15
    assert set(whole) <= wanted | {s for s in whole if cut_off(s, wanted, tokenizer)}
    last = tokenizer.cls_token_id if kind == "xlnet" else tokenizer.sep_token_id
    assert {sequence[-1] for sequence in found} == {last}


def cut_off(sequence, wanted, tokenizer):
    """Whether a sequence is the rest of a line that is longer than a sequence may be."""
    special = {tokenizer.cls_token_id, tokenizer.sep_token_id}
    body = tuple(i for i in sequence if i not in special)
    longer = [tuple(i for i in line if i not in special) for line in wanted if len(line) > 32]
    return any(line[-len(body) :] == body for line in longer)


@pytest.mark.parametrize("kind", FAMOUS)
def test_cache_holds_the_models_own_logits(made, kind):
    """Padded batches of unequal lengths, the head on selected rows, and the replayed head."""
    model = open_model(made(kind).teacher)
    cache = made(kind).cache(**EXACT, top_k=model.config.vocab_size)
    head, compared, padded = cache.teacher.lm_head(), 0, False
    for block in range(cache.num_blocks):
        columns = cache.read_block(block)
        logits, states = plain_block(model, columns)
        stored = unpack(columns, cache.encoding.top_k, 2)
        dense = torch.empty(logits.shape)
        dense.scatter_(
            1, torch.from_numpy(stored.ids.astype(np.int64)), torch.tensor(stored.values)
        )
        torch.testing.assert_close(dense, logits, **CLOSE)
        for layer in (0, 2, 3):
            held = torch.from_numpy(columns[f"hidden_{layer}"].copy()).view(len(logits), -1)
            torch.testing.assert_close(held, states[layer], **CLOSE)
        torch.testing.assert_close(head(held), logits, **CLOSE)
        compared += len(logits)
        padded |= len(set(columns["lengths"].tolist())) > 5
    assert compared > 100
    assert padded
    assert logits.std() > 0.5


def plain_block(model, columns):
    """Logits [M, V] and hidden states per layer [M, D] of a block, one sequence at a time."""
    ends = np.cumsum(columns["lengths"].astype(np.int64))
    masks = np.cumsum(columns["masked_counts"].astype(np.int64))
    parts = []
    for ids, masked in zip(
        np.split(columns["input_ids"].astype(np.int64), ends[:-1]),
        np.split(columns["masked_positions"].astype(np.int64), masks[:-1]),
        strict=True,
    ):
        parts.append(plain_outputs(model, ids, masked.tolist()))
    logits, states = zip(*parts, strict=True)
    return torch.cat(logits), [torch.cat(layer) for layer in zip(*states, strict=True)]


@pytest.mark.parametrize("kind", FAMOUS)
def test_verify_and_evaluate_open_the_teacher(made, kind):
    """The coded cache, calibrated through the family's head, stands up to a second run of it."""
    cache = made(kind).cache(calibration_sequences=24, top_k=4)
    rows = rerun(cache, RerunSettings(blocks=2, device="cpu"))
    assert [row for row in rows if not row.passed] == []
    assert {row.name: row.value for row in rows}["replay, KL (nats), T = 2"] < 5e-3
    config = EvaluateConfig(sequences=6, latency_repeats=1)
    entry = ModelEntry("teacher", "teacher", cache.teacher_dir)
    masking = MaskingConfig(probability=0.3)
    found = evaluate_models(
        [entry], made(kind).folder / "corpus", masking, config, "cpu", "float32"
    )
    heldout = read_heldout(Corpus.open(made(kind).folder / "corpus"), masking, sequences=6,
                           seed=config.seed)  # fmt: skip
    columns = {name: getattr(heldout, name) for name in heldout.__slots__}
    logits, _ = plain_block(open_model(made(kind).teacher), columns)
    nll = torch.nn.functional.cross_entropy(logits, torch.from_numpy(heldout.labels))
    assert found["models"][0]["mlm_nll"] == pytest.approx(float(nll), rel=1e-5)


@pytest.mark.parametrize("kind", FAMOUS)
def test_a_checkpoint_without_head_is_refused(kind, tmp_path):
    make_model(kind, 61).base_model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="teacher: model must hold a trained masked-LM head"):
        load_teacher(str(tmp_path), torch.device("cpu"), torch.float32)


def test_a_discriminator_is_no_teacher(tmp_path):
    config = make_model("electra", 61).config
    transformers.ElectraForPreTraining(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="must hold a trained masked-LM head, got"):
        load_teacher(str(tmp_path), torch.device("cpu"), torch.float32)


def test_xlnet_predicts_masked_positions_alone(made):
    with pytest.raises(UserError, match="cache: positions must be 'masked' for .* 'xlnet'"):
        made("xlnet").cache(positions="all")


def test_what_stands_at_a_masked_position_makes_no_difference_to_xlnet(made):
    """Nobody sees it, so masks, random tokens and kept tokens give the same prediction."""
    teacher = load_teacher(str(made("xlnet").teacher), torch.device("cpu"), torch.float32)
    ids = torch.randint(10, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([1, 5, 14])
    other = ids.flatten().index_fill(0, rows, 6).view(2, 12)
    (found,), (again,) = (teacher.encode(x, None, (3,), rows) for x in (ids, other))
    torch.testing.assert_close(found, again, rtol=0, atol=0)
    changed = ids.clone()
    changed[0, 3] = 7
    (moved,) = teacher.encode(changed, None, (3,), rows)
    assert (moved - found)[:2].abs().max() > 1e-3
    assert torch.equal(moved[2], found[2])

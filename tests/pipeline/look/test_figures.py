"""What is read out of a cache, against the teacher itself and dense formulas."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM

from distilcache.data.cache.cache import Cache
from distilcache.pipeline.look.figures import Histogram, column_costs, signal_histograms
from distilcache.pipeline.look.positions import (
    choose_positions,
    describe,
    log_probs_of,
    temperatures_of,
)
from distilcache.pipeline.look.sample import Sample, choose_blocks, read_samples
from distilcache.pipeline.look.students import Student, name_students, open_student
from distilcache.pipeline.look.teaching import Teaching
from distilcache.pipeline.look.words import Words
from distilcache.stages.models.tokenizers import load_tokenizer
from tests.stages.models.families_support import make_model, plain_outputs
from tests.stages.models.layouts import by_code, counted_merges, moses

EXACT = {"hidden_dtype": "float32", "logits_dtype": "float32"}
SPARSE = {"hidden_dtype": "none", "logits_dtype": "float32", "temperatures": (2.0, 4.0)}
KINDS = {
    "replay": {**EXACT, "top_k": 0},
    "replay+topk": EXACT,
    "of all positions": {**EXACT, "positions": "all", "logit_positions": "masked"},
    "of some positions": {**EXACT, "positions": "masked+0.2", "top_p": 0.4},
    "padded, two rounds": {**EXACT, "corpus": {"packing": "lines"}, "rounds": 2},
    "sparse": SPARSE,
    "sparse, ragged": {**SPARSE, "top_p": 0.4, "top_k": 30},
    "further layers": {**SPARSE, "hidden_dtype": "float32", "hidden_layers": (1,)},
}


def dense_logits(teacher, sample):
    """The Hugging Face model's own logits at the sample's positions, float64 [N, V]."""
    model = AutoModelForMaskedLM.from_pretrained(teacher).eval()
    with torch.no_grad():
        ids = torch.from_numpy(sample.input_ids.astype(np.int64))[None]
        return model(input_ids=ids).logits[0, sample.positions].double()


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_the_teachers_own(small_cache, small_teacher, kind):
    cache = Cache.open(small_cache(**KINDS[kind]))
    teaching = Teaching(cache)
    assert teaching.replays == ("sparse" not in kind and kind != "further layers")
    shown = 0
    for sample in read_samples(cache, 5, seed=1):
        logits_NV = dense_logits(small_teacher, sample)
        chosen = choose_positions(sample)
        temperatures = temperatures_of(teaching)
        entries = describe(teaching, [], sample, chosen, temperatures)
        assert [e["position"] for e in entries] == sample.positions[chosen].tolist()
        for row, entry in zip(chosen, entries, strict=True):
            for number, temperature in enumerate(temperatures):
                true_V = torch.log_softmax(logits_NV[row] / temperature, -1)
                said = log_probs_of(teaching, entry, number, temperature)
                assert said
                for token, log_p in said.items():
                    assert log_p == pytest.approx(float(true_V[token]), abs=2e-3)
                best = int(logits_NV[row].argmax())
                assert best in said
                if teaching.replays:
                    entropy = float(-(true_V.exp() * true_V).sum())
                    assert entry["entropy"][number] == pytest.approx(entropy, abs=2e-3)
                else:
                    assert entry["entropy"][number] <= float(-(true_V.exp() * true_V).sum()) + 1e-3
                shown += 1
    assert shown > 50


def test_coded_states_give_what_the_losses_see(small_cache, small_teacher):
    """At a listed temperature with the codec's bias and the stored tokens in their places."""
    cache = Cache.open(small_cache(top_k=4))
    teaching = Teaching(cache)
    assert teaching.bias_at(2.0) is not None
    assert teaching.bias_at(3.0) is None
    for sample in read_samples(cache, 4, seed=0):
        chosen = choose_positions(sample)
        entries = describe(teaching, [], sample, chosen, (1.0, 2.0, 3.0))
        hidden = teaching.hidden(sample)[chosen]
        true_NV = torch.log_softmax(dense_logits(small_teacher, sample)[chosen] / 2, -1)
        for row, entry in enumerate(entries):
            whole_V = teaching.log_probs(
                teaching.replayed(hidden)[[row]], teaching.stored(sample)[[chosen[row]]], 2.0
            )[0]
            assert float(whole_V.exp().sum()) == pytest.approx(1, abs=1e-4)
            for token, log_p in log_probs_of(teaching, entry, 1, 2.0).items():
                assert log_p == pytest.approx(float(whole_V[token]), abs=1e-4)
            # The stored tokens are exact up to float16.
            for token in entry["tokens"][: entry["stored"]]:
                assert float(whole_V[token]) == pytest.approx(float(true_NV[row, token]), abs=0.01)


@pytest.mark.parametrize("kind", [{"mask_only": True}, {"hidden_dtype": "none", "top_k": 0,
                                                        "tail_samples": 4}])  # fmt: skip
def test_caches_without_probabilities(small_cache, kind):
    cache = Cache.open(small_cache(**kind))
    teaching = Teaching(cache)
    for sample in read_samples(cache, 3, seed=0):
        for entry in describe(teaching, [], sample, choose_positions(sample), (1.0,)):
            assert entry["entropy"] == []
            assert log_probs_of(teaching, entry, 0, 1.0) == {}
    assert signal_histograms(cache, teaching, list(read_samples(cache, 3, 0)), [1.0]) == []


def test_samples_are_the_caches_sequences(small_cache):
    cache = Cache.open(small_cache(rounds=2, corpus={"packing": "lines"}))
    samples = list(read_samples(cache, 9, seed=3))
    assert len(samples) == 9
    assert {s.round for s in samples} == {0, 1}
    assert len({(s.round, s.block, s.row) for s in samples}) == 9
    for sample in samples:
        block = next(
            b for b in cache.round_range(sample.round) if cache.entry(b).block == sample.block
        )
        columns = cache.read_block(block)
        starts = np.cumsum(columns["lengths"]) - columns["lengths"]
        own = slice(starts[sample.row], starts[sample.row] + columns["lengths"][sample.row])
        assert np.array_equal(sample.input_ids, columns["input_ids"][own])
        firsts = np.cumsum(columns["masked_counts"]) - columns["masked_counts"]
        own = slice(firsts[sample.row], firsts[sample.row] + columns["masked_counts"][sample.row])
        assert np.array_equal(sample.labels, columns["labels"][own])
        assert np.array_equal(sample.original_ids[sample.masked], sample.labels)
    again = [(s.round, s.block, s.row) for s in read_samples(cache, 9, seed=3)]
    assert again == [(s.round, s.block, s.row) for s in samples]


def test_choosing_blocks_reads_no_list_of_them():
    """Of 10^12 blocks a list would not fit into memory."""
    many = 10**12
    rounds = SimpleNamespace(
        manifest=SimpleNamespace(rounds=2), round_range=lambda n: range(n * many, (n + 1) * many)
    )
    blocks = choose_blocks(rounds, 6, 0)
    assert blocks == sorted(set(blocks))
    assert [block // many for block in blocks] == [0, 0, 0, 1, 1, 1]


def test_more_sequences_than_there_are(small_cache):
    cache = Cache.open(small_cache())
    blocks = choose_blocks(cache, 10_000, 0)
    assert blocks == list(range(cache.num_blocks))
    every = list(read_samples(cache, 10_000, 0, blocks=10_000))
    assert len(every) == cache.manifest.totals["sequences"]


@pytest.fixture
def student(small_cache, small_teacher):
    """The teacher as its own student: nothing can be nearer."""
    cache = Cache.open(small_cache(**EXACT))
    return open_student(small_teacher, "same", "student", cache, torch.device("cpu"))


def test_a_student_equal_to_the_teacher(small_cache, student):
    cache = Cache.open(small_cache(**EXACT))
    teaching = Teaching(cache)
    for sample in read_samples(cache, 3, seed=0):
        entries = describe(teaching, [student], sample, choose_positions(sample), (1.0, 2.0))
        for entry in entries:
            (told,) = entry["students"]
            assert told["cosine"] == pytest.approx(1, abs=1e-5)
            assert max(told["kl"]) < 1e-4
            for place, token in enumerate(entry["tokens"]):
                log_q = told["logits"][place] / 2 - told["norm"][1]
                log_p = log_probs_of(teaching, entry, 1, 2.0)[token]
                assert log_q == pytest.approx(log_p, abs=2e-3)


@pytest.mark.parametrize("kind", ["replay+topk", "sparse", "sparse, ragged"])
def test_kl_of_a_student(small_cache, small_teacher, kind):
    """In full where the cache replays; else at most that: of head and bucket."""
    cache = Cache.open(small_cache(**KINDS[kind]))
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_pretrained(small_teacher).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    student = Student("noisy", "student", model)
    for sample in read_samples(cache, 3, seed=0):
        chosen = choose_positions(sample)
        dense_NV = dense_logits(small_teacher, sample)[chosen]
        answer_NV = student.answer(sample)[0][chosen].double()
        for row, entry in enumerate(
            describe(Teaching(cache), [student], sample, chosen, (1.0, 2.0))
        ):
            for number, temperature in enumerate((1.0, 2.0)):
                log_p = torch.log_softmax(dense_NV[row] / temperature, -1)
                log_q = torch.log_softmax(answer_NV[row] / temperature, -1)
                full = float((log_p.exp() * (log_p - log_q)).sum())
                found = entry["students"][0]["kl"][number]
                if kind == "replay+topk":
                    assert found == pytest.approx(full, abs=2e-3)
                else:
                    assert found + 1e-4 >= 0
                    assert found <= full + 2e-3


@pytest.mark.parametrize("kind", ["bert", "modernbert", "xlnet", "bart", "esm"])
def test_a_student_is_asked_as_its_family_wants(kind):
    model = make_model(kind, 60)
    ids = np.random.default_rng(0).integers(5, 60, 12)
    masked = np.array([2, 5, 9])
    sample = Sample(0, 0, 0, ids, masked, ids[masked], masked, {})
    logits, hidden = Student("1x32", "student", model).answer(sample)
    wanted, states = plain_outputs(model, ids, masked)
    torch.testing.assert_close(logits, wanted)
    torch.testing.assert_close(hidden, states[-1])


def test_bytes_add_up_to_the_cache(small_cache):
    cache = Cache.open(small_cache())
    columns = column_costs(cache, choose_blocks(cache, 3, 0))
    totals = cache.manifest.totals
    assert sum(c.stored_bytes for c in columns) == pytest.approx(totals["bytes"])
    assert {c.name: c.raw_bytes for c in columns} == totals["column_bytes"]
    assert columns == sorted(columns, key=lambda c: -c.stored_bytes)


def test_histograms_count_everything():
    rng = np.random.default_rng(0)
    for values in (rng.normal(size=500), rng.integers(3, 9, 500), np.full(5, 7), np.full(5, 0.5)):
        found = Histogram.of("x", "", values)
        assert found.counts.sum() == len(values)
        assert len(found.edges) == len(found.counts) + 1
        assert found.edges[0] <= values.min() <= values.max() <= found.edges[-1]
        assert found.mean == pytest.approx(values.mean())


def test_norms_and_masses_against_the_teacher(small_cache, small_teacher):
    cache = Cache.open(small_cache(**EXACT))
    samples = list(read_samples(cache, 8, 0))
    found = {h.name: h for h in signal_histograms(cache, Teaching(cache), samples, [2.0])}
    model = AutoModelForMaskedLM.from_pretrained(small_teacher).eval()
    norms, masses = [], []
    for sample in samples:
        with torch.no_grad():
            ids = torch.from_numpy(sample.input_ids.astype(np.int64))[None]
            said = model(input_ids=ids, output_hidden_states=True)
        norms += said.hidden_states[-1][0, sample.positions].norm(dim=-1).tolist()
        p_NV = torch.softmax(said.logits[0, sample.positions] / 2, -1)
        masses += p_NV.topk(cache.encoding.top_k)[0].sum(-1).tolist()
    assert found["norm of hidden states, layer 3"].mean == pytest.approx(np.mean(norms), rel=1e-4)
    assert found["mass of the stored tokens at T = 2"].mean == pytest.approx(
        np.mean(masses), abs=1e-3
    )


def test_distributions_are_those_of_masked_positions(small_cache):
    """Others may hold no logits, and their tokens are seen by the teacher."""
    few, many = (
        Cache.open(small_cache(**EXACT, **positions))
        for positions in ({}, {"positions": "all", "logit_positions": "masked"})
    )
    found = [
        {h.name: h for h in signal_histograms(c, Teaching(c), list(read_samples(c, 8, 0)), [2.0])}
        for c in (few, many)
    ]
    for name in ("entropy of the teacher at T = 2", "mass of the stored tokens at T = 2"):
        assert found[1][name].counts.sum() == found[0][name].counts.sum()
        assert found[1][name].mean == pytest.approx(found[0][name].mean, rel=1e-4)


def text_of(words, ids):
    texts = words.token_texts([token for token in ids if not words.is_special(token)])
    return "".join(text if glued else f" {text}" for text, glued in texts).strip()


def test_words_read_well(small_cache):
    words = Words(Cache.open(small_cache()).teacher_dir)
    tokenizer = words._tokenizer
    text = "amber bridge of the garden"
    ids = tokenizer(text)["input_ids"]
    assert text_of(words, ids).startswith("amber bridge of")
    assert words.is_special(ids[0])
    assert words.token_text(10_000_000) == ("<10000000>", False)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("wordpiece", "don't (really) say: it's \"over-done\", 5%."),
        ("bytes", "don't (really) say: it’s over-done, 5%."),
    ],
)
def test_text_is_put_together_again(tmp_path, kind, text):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from distilcache.stages.models.wordpiece import train_wordpiece

    if kind == "wordpiece":
        train_wordpiece([text] * 30, 200).save_pretrained(tmp_path)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        marks = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator([text] * 3, trainer)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", cls_token="<s>",
            sep_token="</s>", mask_token="<mask>",
        ).save_pretrained(tmp_path)  # fmt: skip
    words = Words(tmp_path)
    assert text_of(words, words._tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize(
    ("vocabulary", "shown"),
    [
        (["A", "R", "N"], ["A", "R", "N"]),
        (["Ġthe", "re", "."], ["the", "…re", "."]),
        (["▁the", "re", "."], ["the", "…re", "."]),
    ],
)
def test_an_ellipsis_only_where_the_tokenizer_marks_words(tmp_path, vocabulary, shown):
    """Letters for amino acids are no rests of words."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<mask>", *vocabulary]
    level = models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(level), pad_token="<pad>", unk_token="<unk>", mask_token="<mask>"
    ).save_pretrained(tmp_path)
    found = Words(tmp_path)
    assert [found.shown_alone(token) for token in range(3, 6)] == shown


@pytest.mark.parametrize(
    ("name", "files"),
    [("PhobertTokenizer", counted_merges), ("XLMTokenizer", moses)],
)
def test_words_with_a_mark_at_their_end_stay_apart(tmp_path, name, files, monkeypatch):
    """To show tokens, the package that cuts text is not needed."""
    if name == "XLMTokenizer":
        pytest.importorskip("sacremoses")
    _, written = by_code(name, files)()
    for file, content in written.items():
        (tmp_path / file).write_text(content)
    made = load_tokenizer(tmp_path)
    ids = made("amber of")["input_ids"]
    assert len(ids) > 4
    made.save_pretrained(tmp_path)
    made.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setitem(sys.modules, "sacremoses", None)
    words = Words(tmp_path)
    assert words.mask_id == made.mask_token_id
    assert text_of(words, ids) == "amber of"


def test_words_of_byte_pairs_whose_last_one_has_a_mark_stay_apart(tmp_path):
    """As HerBERT's, which is a tokenizer of the library alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder("</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=24, special_tokens=["<pad>", "<unk>", "<mask>"], end_of_word_suffix="</w>",
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(["amber bridge of amber"] * 3, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", mask_token="<mask>"
    ).save_pretrained(tmp_path)
    words = Words(tmp_path)
    ids = words._tokenizer("bridge of amber")["input_ids"]
    assert len(ids) > 3
    assert text_of(words, ids) == "bridge of amber"


def test_students_are_told_apart(tmp_path):
    paths = [tmp_path / "a/students/x", tmp_path / "b/students/x", tmp_path / "b/students/y"]
    assert name_students(paths[:1]) == ["x"]
    assert name_students(paths[1:]) == ["x", "y"]
    assert name_students(paths) == ["a/students/x", "b/students/x", "b/students/y"]

"""Evaluation against plain Hugging Face forward passes."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    DistilBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from data.errors import UserError
from data.masking import MaskingConfig, mask_block
from stages.evaluate.config import EvaluateConfig
from stages.evaluate.heldout import padded_batches, read_heldout
from stages.evaluate.latency import measure_speed, throughput_batch_size
from stages.evaluate.mlm import calibration_gaps, masked_logits, quality_batch_size
from stages.evaluate.run import ModelEntry, evaluate_models

VOCAB = 100
LENGTH = 16
SPECIAL = {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
CPU = torch.device("cpu")
MASKING = MaskingConfig(seed=7)
QUICK = EvaluateConfig(sequences=24, batch_size=5, latency_repeats=2)
FIELDS = {
    "name",
    "role",
    "params",
    "size_mb",
    "mlm_nll",
    "mlm_top1",
    "teacher_kl",
    "teacher_top1_agreement",
    "ece",
    "latency_ms",
    "tokens_per_s",
}


@dataclass
class MemorySplit:
    blocks: list[tuple[np.ndarray, np.ndarray]]

    @property
    def num_blocks(self):
        return len(self.blocks)

    @property
    def block_sequences(self):
        return np.array([len(lengths) for _, lengths in self.blocks], dtype=np.int64)

    def block(self, index):
        return self.blocks[index]


class MemoryCorpus:
    """The part of ``data.corpus.Corpus`` that evaluation reads, without files."""

    def __init__(self, blocks, vocab_size=VOCAB):
        self.path = Path("corpus")
        self.token_counts = np.arange(vocab_size, dtype=np.int64)
        self.manifest = SimpleNamespace(
            vocab_size=vocab_size,
            max_length=LENGTH,
            special_ids=SPECIAL,
            all_special_ids=tuple(SPECIAL.values()),
            fingerprint="f" * 64,
            splits={"heldout": {}} if blocks is not None else {"train": {}},
        )
        self._split = MemorySplit(blocks or [])

    def split(self, name):
        assert name == "heldout"
        return self._split


def random_blocks(sizes=(9, 11, 10), *, full=False, seed=0):
    """Blocks of [CLS] ... [SEP] sequences, of mixed lengths unless ``full``."""
    rng = np.random.default_rng(seed)
    blocks = []
    for size in sizes:
        lengths = np.full(size, LENGTH) if full else rng.integers(6, LENGTH + 1, size)
        rows = [np.r_[2, rng.integers(5, VOCAB, n - 2), 3] for n in lengths]
        blocks.append((np.concatenate(rows).astype(np.uint16), lengths.astype(np.int64)))
    return blocks


def bert(seed=0, vocab=VOCAB, positions=LENGTH, cls=BertForMaskedLM):
    torch.manual_seed(seed)
    return cls(
        BertConfig(
            vocab_size=vocab,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=positions,
            initializer_range=0.5,
        )
    )


def distilbert(seed=1):
    torch.manual_seed(seed)
    return DistilBertForMaskedLM(
        DistilBertConfig(
            vocab_size=VOCAB,
            dim=12,
            n_layers=1,
            n_heads=2,
            hidden_dim=24,
            max_position_embeddings=LENGTH,
            initializer_range=0.5,
        )
    )


def roberta(seed=2):
    torch.manual_seed(seed)
    return RobertaForMaskedLM(
        RobertaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=LENGTH + 2,
            pad_token_id=0,
        )
    )


def save(model, path):
    model.save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products: threads that wait for each other cost up to fifty times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def open_corpus(monkeypatch):
    """Let ``Corpus.open`` answer with a corpus in memory."""

    def install(corpus):
        monkeypatch.setattr("stages.evaluate.run.Corpus.open", lambda path: corpus)
        return corpus

    return install


@pytest.fixture
def models(tmp_path):
    return [
        ModelEntry("teacher", "teacher", save(bert(), tmp_path / "teacher")),
        ModelEntry("1x12", "student", save(distilbert(), tmp_path / "student")),
    ]


def evaluate(entries, config=QUICK, masking=MASKING):
    return evaluate_models(entries, Path("corpus"), masking, config, "cpu", "float32")


def plain_scores(path, blocks, seed=QUICK.seed):
    """(sum of NLL, hits, log-probabilities) of every masked position, one sequence at a time."""
    model = AutoModelForMaskedLM.from_pretrained(path).eval()
    log_p, labels, loss_sum = [], [], 0.0
    for index, (ids, lengths) in enumerate(blocks):
        masked = mask_block(
            ids,
            lengths,
            config=replace(MASKING, seed=seed),
            round_index=0,
            block_index=index,
            special_ids=tuple(SPECIAL.values()),
            mask_id=SPECIAL["mask"],
            vocab_size=VOCAB,
        )
        token, mark = 0, 0
        for length, count in zip(lengths, masked.masked_counts, strict=True):
            row = torch.from_numpy(masked.input_ids[token : token + length].astype(np.int64))
            at = masked.masked_positions[mark : mark + count].astype(np.int64)
            target = torch.full((1, int(length)), -100)
            target[0, at] = torch.from_numpy(ids[token : token + length][at].astype(np.int64))
            with torch.no_grad():
                out = model(input_ids=row[None], labels=target)
            loss_sum += float(out.loss) * int(count)
            log_p.append(out.logits[0, at].double().log_softmax(-1))
            labels.append(target[0, at])
            token, mark = token + int(length), mark + int(count)
    return loss_sum, torch.cat(log_p), torch.cat(labels)


def plain_ece(confidence, hits, bins=15):
    """Mean over bins of |accuracy - confidence|, weighted by their share (Guo et al. 2017)."""
    total = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            gap = hits[inside].double().mean() - confidence[inside].double().mean()
            total += float(inside.double().mean() * gap.abs())
    return total


@pytest.mark.parametrize("full", [True, False])
def test_quality_equals_plain_forward(open_corpus, models, full):
    blocks = random_blocks(full=full)
    open_corpus(MemoryCorpus(blocks))
    result = evaluate(models, replace(QUICK, sequences=1000))

    _, teacher_p, _ = plain_scores(models[0].path, blocks)
    for entry, row in zip(models, result["models"], strict=True):
        loss_sum, log_p, labels = plain_scores(entry.path, blocks)
        best = log_p.argmax(-1)
        kl = (teacher_p.exp() * (teacher_p - log_p)).sum(-1).mean()
        assert row["mlm_nll"] == pytest.approx(loss_sum / len(labels), rel=1e-5)
        assert row["mlm_top1"] == pytest.approx(float((best == labels).double().mean()))
        assert row["teacher_kl"] == pytest.approx(float(kl), rel=1e-4, abs=1e-7)
        agreement = float((best == teacher_p.argmax(-1)).double().mean())
        assert row["teacher_top1_agreement"] == pytest.approx(agreement)
        assert row["ece"] == pytest.approx(plain_ece(log_p.exp().max(-1).values, best == labels))
    assert result["models"][1]["teacher_kl"] > 0.01
    assert result["heldout"]["sequences"] == 30
    assert result["heldout"]["masked_positions"] == len(labels)
    assert result["heldout"]["tokens"] == sum(len(ids) for ids, _ in blocks)
    assert result["heldout"]["masking"]["seed"] == QUICK.seed
    assert result["heldout"]["corpus_fingerprint"] == "f" * 64


def test_calibration_error_by_hand():
    # Bins of width 1/15: 0.2 and 0.9 lie in the third and the fourteenth.
    confidence = torch.tensor([0.19, 0.2, 0.9, 0.9, 0.9, 0.9])
    hits = torch.tensor([False, True, True, True, False, False])
    gaps = calibration_gaps(confidence, hits)
    wanted = torch.zeros(15, dtype=torch.float64)
    wanted[2], wanted[13] = 0.39 - 1, 3.6 - 2
    torch.testing.assert_close(gaps, wanted, atol=1e-6, rtol=0)
    # 2/6 |1/2 - 0.195| + 4/6 |1/2 - 0.9|
    assert float(gaps.abs().sum()) / 6 == pytest.approx(2 / 6 * 0.305 + 4 / 6 * 0.4)
    assert plain_ece(confidence, hits) == pytest.approx(float(gaps.abs().sum()) / 6)


def test_calibration_bins_end_at_zero_and_one():
    gaps = calibration_gaps(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([False, True, False]))
    assert gaps.tolist() == [0.0] * 14 + [1.0]


def test_batches_of_a_calibration_error_add_up():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(4000, generator=generator)
    honest = torch.rand(4000, generator=generator) < confidence
    parts = zip(confidence.split(700), honest.split(700), strict=True)
    gaps = sum(calibration_gaps(c, h) for c, h in parts)
    error = float(gaps.abs().sum()) / 4000
    assert error == pytest.approx(plain_ece(confidence, honest))
    assert error < 0.03, "as often right as it says"
    wrong = calibration_gaps(confidence, torch.zeros(4000, dtype=torch.bool))
    assert float(wrong.abs().sum()) / 4000 == pytest.approx(float(confidence.mean()))


def test_identical_teacher_and_student_agree(open_corpus, models):
    open_corpus(MemoryCorpus(random_blocks()))
    twin = ModelEntry("twin", "student", models[0].path)
    teacher, copy = evaluate([models[0], twin])["models"]
    assert copy["teacher_kl"] == 0.0
    assert copy["teacher_top1_agreement"] == 1.0
    assert copy["mlm_nll"] == teacher["mlm_nll"]
    assert teacher["teacher_kl"] == 0.0


def test_fields_sizes_and_order(open_corpus, models):
    open_corpus(MemoryCorpus(random_blocks()))
    entries = [models[1], models[0]]
    result = evaluate(entries)
    assert [row["name"] for row in result["models"]] == ["1x12", "teacher"]
    for entry, row in zip(entries, result["models"], strict=True):
        assert set(row) >= FIELDS
        # Saved tensors hold tied weights once.
        stored = load_file(entry.path / "model.safetensors")
        assert row["params"] == sum(tensor.numel() for tensor in stored.values())
        assert row["size_mb"] == (entry.path / "model.safetensors").stat().st_size / 1e6
        assert 0 < row["latency_ms_q1"] <= row["latency_ms"] <= row["latency_ms_q3"]
        assert 0 < row["tokens_per_s_q1"] <= row["tokens_per_s"] <= row["tokens_per_s_q3"]
    assert result["machine"]["device"] == "cpu"
    assert result["machine"]["dtype"] == "float32"
    assert result["machine"]["threads"] == torch.get_num_threads()


def test_quality_is_the_same_on_every_run_and_batch_size(open_corpus, models):
    open_corpus(MemoryCorpus(random_blocks()))
    first = evaluate(models)["models"]
    again = evaluate(models)["models"]
    other = evaluate(models, replace(QUICK, batch_size=24))["models"]
    for a, b, c in zip(first, again, other, strict=True):
        assert a["mlm_nll"] == b["mlm_nll"]
        assert a["mlm_nll"] == pytest.approx(c["mlm_nll"], rel=1e-6)


def test_without_a_teacher_agreement_is_null(open_corpus, models):
    open_corpus(MemoryCorpus(random_blocks()))
    (row,) = evaluate(models[1:])["models"]
    assert row["teacher_kl"] is None
    assert row["teacher_top1_agreement"] is None
    assert row["mlm_nll"] > 0


def test_masked_logits_of_every_family_equal_full_logits():
    corpus = MemoryCorpus(random_blocks())
    heldout = read_heldout(corpus, MASKING, sequences=8, seed=1)
    (batch,) = padded_batches(heldout, batch_size=8, pad_id=0, device=CPU)
    assert batch.attention_mask is not None
    for model in (bert().eval(), distilbert().eval(), roberta().eval()):
        with torch.no_grad():
            full = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            cut = masked_logits(model, batch)
            after = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        torch.testing.assert_close(cut, full.flatten(0, 1)[batch.masked_index])
        assert torch.equal(full, after), "the hook must be gone"


def test_sequences_are_spread_and_their_masks_do_not_depend_on_how_many():
    corpus = MemoryCorpus(random_blocks(full=True))
    everything = read_heldout(corpus, MASKING, sequences=1000, seed=1)
    some = read_heldout(corpus, MASKING, sequences=6, seed=1)
    whole = everything.input_ids.reshape(-1, LENGTH)
    np.testing.assert_array_equal(some.input_ids.reshape(-1, LENGTH), whole[[0, 5, 10, 15, 20, 25]])
    other = read_heldout(corpus, MASKING, sequences=1000, seed=2)
    assert not np.array_equal(other.input_ids, everything.input_ids)


def test_smoothed_masking_uses_the_counts_of_the_corpus(open_corpus, models):
    open_corpus(MemoryCorpus(random_blocks()))
    uniform = evaluate(models)["models"][0]["mlm_nll"]
    smoothed = evaluate(models, masking=replace(MASKING, policy="smoothed"))
    assert smoothed["models"][0]["mlm_nll"] != uniform
    assert smoothed["heldout"]["masking"]["policy"] == "smoothed"


def test_full_sequences_need_no_attention_mask():
    corpus = MemoryCorpus(random_blocks(full=True))
    heldout = read_heldout(corpus, MASKING, sequences=7, seed=1)
    batches = list(padded_batches(heldout, batch_size=4, pad_id=0, device=CPU))
    assert [len(b.input_ids) for b in batches] == [4, 3]
    assert all(b.attention_mask is None for b in batches)


def test_batches_shrink_for_large_vocabularies():
    heldout = read_heldout(MemoryCorpus(random_blocks()), MASKING, sequences=30, seed=1)
    assert quality_batch_size(heldout, VOCAB, 32) == 32
    assert quality_batch_size(heldout, 10**9, 32) == 1
    assert throughput_batch_size(32, 128, 30522) == 32
    assert throughput_batch_size(32, 512, 250_000) == 2


def test_models_take_turns():
    calls = []

    class Recorder(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, input_ids):
            calls.append((self.name, tuple(input_ids.shape)))

    measure_speed(
        [Recorder("a"), Recorder("b")],
        max_length=8,
        vocab_size=VOCAB,
        batch_size=3,
        repeats=4,
        device=CPU,
    )
    single = [name for name, shape in calls if shape == (1, 8)]
    batched = [name for name, shape in calls if shape == (3, 8)]
    assert single == list("aabb") + list("ab") * 4
    assert batched == list("ab") + list("ab") * 3


@pytest.mark.parametrize("blocks", [None, []])
def test_no_heldout_text_is_refused(open_corpus, models, blocks):
    open_corpus(MemoryCorpus(blocks))
    with pytest.raises(UserError, match="held-out text, got none"):
        evaluate(models)


def test_missing_folder_is_refused(open_corpus, tmp_path):
    open_corpus(MemoryCorpus(random_blocks()))
    with pytest.raises(UserError, match=r"'gone' must be a folder with a config.json"):
        evaluate([ModelEntry("gone", "student", tmp_path / "nowhere")])


def test_missing_or_pickled_weights_are_refused(open_corpus, models):
    open_corpus(MemoryCorpus(random_blocks()))
    weights = models[0].path / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(UserError, match=r"weights in model\.safetensors, got none"):
        evaluate(models)


def test_damaged_weights_are_refused(open_corpus, models):
    open_corpus(MemoryCorpus(random_blocks()))
    weights = models[0].path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="that transformers can read") as caught:
        evaluate(models)
    assert "\n" not in str(caught.value)


def test_model_without_lm_head_is_refused(open_corpus, tmp_path):
    open_corpus(MemoryCorpus(random_blocks()))
    path = save(bert(cls=BertModel), tmp_path / "headless")
    with pytest.raises(UserError, match=r"got none for cls\.predictions\.") as caught:
        evaluate([ModelEntry("headless", "teacher", path)])
    assert "\n" not in str(caught.value)


def test_other_shape_of_a_weight_is_refused(open_corpus, models):
    open_corpus(MemoryCorpus(random_blocks()))
    weights = models[0].path / "model.safetensors"
    tensors = load_file(weights)
    name = "bert.encoder.layer.0.output.dense.weight"
    save_file({**tensors, name: torch.zeros(3, 3)}, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match="evaluate: model 'teacher' must"):
        evaluate(models)


def test_other_vocabulary_is_refused(open_corpus, tmp_path):
    open_corpus(MemoryCorpus(random_blocks()))
    path = save(bert(vocab=90), tmp_path / "small")
    with pytest.raises(UserError, match="vocabulary must be the corpus's 100 tokens, got 90"):
        evaluate([ModelEntry("small", "student", path)])


def test_too_few_positions_are_refused(open_corpus, tmp_path):
    open_corpus(MemoryCorpus(random_blocks()))
    path = save(bert(positions=8), tmp_path / "short")
    with pytest.raises(UserError, match="max_length 16, got 8"):
        evaluate([ModelEntry("short", "student", path)])


def test_roles_are_checked(models):
    with pytest.raises(UserError, match="role of x must be one of"):
        ModelEntry("x", "pupil", Path("x"))
    with pytest.raises(UserError, match="teacher must be one model, got 2"):
        evaluate([models[0], models[0]])
    with pytest.raises(UserError, match="at least one model"):
        evaluate([])

"""Evaluation against plain Hugging Face forward passes."""
# ruff: noqa: F811

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from distilcache.data.masks.masking import mask_block
from distilcache.stages.evaluate.run import ModelEntry
from tests.stages.evaluate.evaluate_support import (
    MASKING,
    QUICK,
    SPECIAL,
    VOCAB,
    MemoryCorpus,
    evaluate,
    model,
    models,  # noqa: F401
    open_corpus,  # noqa: F401
    plain_ece,
    random_blocks,
    save,
)

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
        nll = -log_p.gather(1, labels[:, None]).double()
        stderr = float(nll.std(correction=0)) / len(labels) ** 0.5
        assert row["mlm_nll_stderr"] == pytest.approx(stderr, rel=1e-4)
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
    assert [row["name"] for row in result["models"]] == ["1x32", "teacher"]
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


def test_smoothed_masking_uses_the_counts_of_the_corpus(open_corpus, models):
    open_corpus(MemoryCorpus(random_blocks()))
    uniform = evaluate(models)["models"][0]["mlm_nll"]
    smoothed = evaluate(models, masking=replace(MASKING, policy="smoothed"))
    assert smoothed["models"][0]["mlm_nll"] != uniform
    assert smoothed["heldout"]["masking"]["policy"] == "smoothed"


def test_rows_of_an_embedding_beyond_the_tokens_do_not_count(open_corpus, models, tmp_path):
    """Probabilities are those among the tokens of the corpus, for models of any number of rows."""
    blocks = random_blocks()
    open_corpus(MemoryCorpus(blocks))
    wide = ModelEntry("wide", "student", save(model("bert", vocab=VOCAB + 24), tmp_path / "wide"))
    rows = evaluate([models[0], wide], replace(QUICK, sequences=1000))["models"]
    _, teacher_p, labels = plain_scores(models[0].path, blocks)
    _, all_p, _ = plain_scores(wide.path, blocks)
    log_p = all_p[:, :VOCAB].log_softmax(-1)
    nll = -log_p.gather(1, labels[:, None]).mean()
    kl = (teacher_p.exp() * (teacher_p - log_p)).sum(-1).mean()
    assert rows[1]["mlm_nll"] == pytest.approx(float(nll), rel=1e-5)
    assert rows[1]["teacher_kl"] == pytest.approx(float(kl), rel=1e-5)
    assert rows[1]["mlm_top1"] == pytest.approx(float((log_p.argmax(-1) == labels).double().mean()))

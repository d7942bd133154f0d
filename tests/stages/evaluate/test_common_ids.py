"""A student with fewer ids beside its teacher, against plain passes of both, one by one."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from distilcache.data.cache.cache import Cache
from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError
from distilcache.data.masks.masking import MaskingConfig
from distilcache.stages.evaluate.common_ids import asked_of, fertilities
from distilcache.stages.evaluate.config import EvaluateConfig
from distilcache.stages.evaluate.heldout import read_heldout
from distilcache.stages.evaluate.run import ModelEntry, evaluate_models
from distilcache.stages.models.trimmed_ids import TrimmedIds
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.run import train_student
from tests.stages.models.families_support import open_model
from tests.stages.student_train.test_trimming import longest_first

MASKING, QUICK = MaskingConfig(probability=0.3), EvaluateConfig(sequences=24, latency_repeats=1)
CORPUS = {"packing": "lines", "max_length": 12, "documents": 200}


@pytest.fixture(scope="module")
def made(small_cache, tmp_path_factory):
    """Students of 90 and 70 ids, and their cache."""
    cache = small_cache(corpus=CORPUS)
    folders = []
    for vocabulary in (90, 70):
        folders.append(tmp_path_factory.mktemp("students") / f"{vocabulary}")
        train_student(
            cache_dir=cache, out=folders[-1], size="2x32",
            student=StudentConfig(sizes=("2x32",), vocabulary=vocabulary),
            train=TrainConfig(steps=1, signal="replay"), device="cpu", dtype="float32",
        )  # fmt: skip
    return Cache.open(cache), folders


def test_losses_of_what_is_comparable(made, small_corpus):
    cache, (larger, smaller) = made
    entries = [
        ModelEntry("teacher", "teacher", cache.teacher_dir),
        ModelEntry("90", "student", larger),
        ModelEntry("70", "student", smaller),
    ]
    folder = small_corpus(**CORPUS)
    found = evaluate_models(entries, folder, MASKING, QUICK, "cpu", "float32")

    before = Tokenizer.from_file(str(cache.teacher_dir / "tokenizer.json"))
    names = {index: token for token, index in before.get_vocab().items()}
    vocabularies = [
        Tokenizer.from_file(str(e.path / "tokenizer.json")).get_vocab() for e in entries
    ]
    common = sorted(set.intersection(*map(set, vocabularies)), key=before.token_to_id)
    heldout = read_heldout(Corpus.open(folder), MASKING, sequences=24, seed=QUICK.seed)
    ends, marks = np.cumsum(heldout.lengths), np.cumsum(heldout.masked_counts)
    models = [open_model(entry.path) for entry in entries]
    log_p = [[] for _ in entries]
    answers, tokens = [], np.zeros(3)
    for row, count in enumerate(heldout.masked_counts):
        ids = heldout.input_ids[ends[row] - heldout.lengths[row] : ends[row]].tolist()
        at = heldout.masked_positions[marks[row] - count : marks[row]].tolist()
        labels = [names[i] for i in heldout.labels[marks[row] - count : marks[row]].tolist()]
        kept = [place for place, label in enumerate(labels) if label in common]
        answers += [common.index(labels[place]) for place in kept]
        original = list(ids)
        for place, label in zip(at, labels, strict=True):
            original[place] = before.token_to_id(label)
        text = before.decode(original)
        for number, (model, own) in enumerate(zip(models, vocabularies, strict=True)):
            cut = [longest_first(names[i], own) for i in ids]
            starts = np.cumsum([0, *map(len, cut)])
            read = torch.tensor([[i for piece in cut for i in piece]])
            with torch.no_grad():
                logits = model(read).logits[0]
            columns = [own[token] for token in common]
            rows = [starts[at[place]] for place in kept]
            log_p[number].append(logits[rows][:, columns].double().log_softmax(-1))
            writer = Tokenizer.from_file(str(entries[number].path / "tokenizer.json"))
            tokens[number] += len(writer.encode(text, add_special_tokens=False))
    log_p = [torch.cat(parts) for parts in log_p]
    answers = torch.tensor(answers)
    assert found["heldout"]["masked_positions"] == len(answers) < len(heldout.labels)
    assert found["heldout"]["compared_share"] == len(answers) / len(heldout.labels)
    assert found["heldout"]["common_ids"] == len(common) == 70
    for number, row in enumerate(found["models"]):
        nll = -log_p[number].gather(1, answers[:, None]).mean()
        kl = (log_p[0].exp() * (log_p[0] - log_p[number])).sum(1).mean()
        agree = (log_p[0].argmax(1) == log_p[number].argmax(1)).double().mean()
        assert row["mlm_nll"] == pytest.approx(float(nll), rel=1e-4)
        assert row["teacher_kl"] == pytest.approx(float(kl), rel=1e-4, abs=1e-6)
        assert row["teacher_top1_agreement"] == pytest.approx(float(agree))
        assert row["fertility"] == pytest.approx(tokens[number] / tokens[0])
        assert row["vocabulary"] == len(vocabularies[number])
    assert tokens[2] > tokens[1] > tokens[0]


def test_saved_truncation_and_padding_do_not_count(made, small_corpus):
    cache, (_, smaller) = made
    heldout = read_heldout(Corpus.open(small_corpus(**CORPUS)), MASKING, sequences=24, seed=0)
    found = []
    for saved in (False, True):
        theirs, trimmed = (
            Tokenizer.from_file(str(folder / "tokenizer.json"))
            for folder in (cache.teacher_dir, smaller)
        )
        for tokenizer in (theirs, trimmed) if saved else ():
            tokenizer.enable_truncation(4)
            tokenizer.enable_padding(length=40)
        own = TrimmedIds(json.loads(theirs.to_str()), json.loads(trimmed.to_str()))
        found.append(fertilities(heldout, theirs, [None, own]))
    assert found[0] == found[1]
    assert found[0][1] > 1.1


def test_no_position_to_compare(made, small_corpus):
    cache, (_, smaller) = made
    heldout = read_heldout(Corpus.open(small_corpus(**CORPUS)), MASKING, sequences=1, seed=0)
    trimmed = TrimmedIds.of_student(cache.teacher_dir, smaller)
    heldout.labels[:] = np.flatnonzero(trimmed.new_V < 0)[0]
    with pytest.raises(UserError, match=r"evaluate: models must have some tokens .* in common"):
        asked_of(heldout, len(trimmed.new_V), 0, [None, trimmed], [None, None])


def test_a_tokenizer_that_is_no_part_of_the_teachers(made, small_corpus, tmp_path):
    cache, (_, smaller) = made
    strange = tmp_path / "strange"
    strange.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (strange / name).write_bytes((smaller / name).read_bytes())
    state = json.loads((strange / "tokenizer.json").read_text())
    words = state["model"]["vocab"]
    words["wordless"] = words.popitem()[1]
    (strange / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"tokens of the teacher's alone, got .* with 'wordless'"):
        evaluate_models(
            [ModelEntry("x", "student", strange)], small_corpus(**CORPUS), MASKING, QUICK,
            "cpu", "float32",
        )  # fmt: skip

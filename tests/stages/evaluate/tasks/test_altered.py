"""Altered copies of examples: what stays, what is drawn, and the runs that read them."""
# ruff: noqa: F811

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, pipeline

from distilcache.data.errors import UserError
from distilcache.pipeline.report.tasks_table import tasks_page
from distilcache.stages.evaluate.masked_lms import ModelEntry, read_model
from distilcache.stages.evaluate.tasks.altered import FRACTIONS, alter, recut_copies, with_copies
from distilcache.stages.evaluate.tasks.catalogue import TASKS
from distilcache.stages.evaluate.tasks.config import TasksConfig
from distilcache.stages.evaluate.tasks.examples import Split
from distilcache.stages.evaluate.tasks.features import encode
from distilcache.stages.evaluate.tasks.finetune import Place
from distilcache.stages.evaluate.tasks.task_models import open_candidate
from distilcache.stages.evaluate.tasks.tensors import read_tensor
from distilcache.stages.models.trimmed_ids import TrimmedIds, read_tokenizer
from distilcache.stages.models.trimmed_tokenizer import choose, ids_of, trim
from tests.builders import random_texts
from tests.stages.evaluate.tasks.tasks_support import (
    data,  # noqa: F401
    entries,  # noqa: F401
    run_on,
)
from tests.stages.models.families_support import (
    FAMOUS,
    make_model,
    save_teacher,
    save_with_tokenizer,
)

COUNT = 3


@pytest.fixture(scope="module")
def pairs(small_teacher):
    """Pairs of texts of unlike lengths as the tokenizer of the tests encodes them."""
    tokenizer = open_candidate(ModelEntry("teacher", "teacher", small_teacher)).tokenizer
    return tokenizer, encode_pairs(tokenizer)


def encode_pairs(tokenizer, examples=150, longest=30):
    texts = [text.split() for text in random_texts(2 * examples, seed=4)]
    first, second = ([" ".join(words[:9]) for words in texts[i::2]] for i in (0, 1))
    split = Split((first, second), [i % 2 for i in range(examples)])
    return encode(TASKS["rte"], split, tokenizer, longest)


def place(folder):
    return Place(device=torch.device("cpu"), dtype=torch.float32, scratch=folder)


def with_bias(folder, bias):
    """A masked LM that says the same of every position: a softmax of its bias."""
    model = read_model(folder, "test")
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
        model.get_output_embeddings().bias.copy_(bias)
    return model


@pytest.mark.parametrize("kind", FAMOUS)
def test_every_family_alters_words_and_nothing_else(kind, tmp_path):
    folder = save_teacher(kind, tmp_path / kind)
    tokenizer = open_candidate(ModelEntry(kind, "teacher", folder)).tokenizer
    encoded = encode_pairs(tokenizer, 40)
    model = read_model(folder, "test")
    found = alter(encoded, model, tokenizer, COUNT, place(tmp_path)).reshape(COUNT, -1)
    assert found.dtype == np.int32
    special = np.isin(encoded.ids, tokenizer.all_special_ids)
    assert (found[:, special] == encoded.ids[special]).all()
    assert not np.isin(found[:, ~special], tokenizer.all_special_ids).any()
    assert found.max() < len(tokenizer)
    changed = (found != encoded.ids).mean()
    assert 0.1 < changed < 0.3
    assert (found[0] != found[1]).any()
    again = alter(encoded, model, tokenizer, COUNT, place(tmp_path))
    np.testing.assert_array_equal(again, found.ravel())


def test_tokens_are_drawn_by_their_probability(pairs, small_teacher, tmp_path):
    tokenizer, encoded = pairs
    words = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    bias = torch.full((len(tokenizer),), -30.0)
    bias[words[:2]] = torch.tensor([0.75, 0.25]).log()
    bias[tokenizer.all_special_ids] = 9.0  # Likely, and never drawn.
    model = with_bias(small_teacher, bias)
    encoded.ids[np.isin(encoded.ids, words[:2])] = words[2]
    found = alter(encoded, model, tokenizer, 8, place(tmp_path)).reshape(8, -1)
    drawn = found[found != encoded.ids]
    assert set(drawn.tolist()) == set(words[:2])
    assert (drawn == words[0]).mean() == pytest.approx(0.75, abs=0.02)

    # Shares are even between the two bounds, and others in each copy.
    counts = np.add.reduceat((found != encoded.ids).astype(int), encoded.bounds[:-1], axis=1)
    shares = counts / (encoded.lengths - 3)
    assert shares.mean() == pytest.approx(sum(FRACTIONS) / 2, abs=0.01)
    assert np.quantile(shares, 0.98) < FRACTIONS[1] + 0.2
    assert (shares.std(axis=0) > 0).mean() > 0.95


def test_an_id_of_no_token_is_never_drawn(small_teacher, tmp_path):
    """The last id of a tokenizer whose ids have a gap is a word as any other."""
    tokenizer = open_candidate(ModelEntry("teacher", "teacher", small_teacher)).tokenizer
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = state["model"]["vocab"]
    last, gap = len(ids) - 1, len(ids) - 2
    del ids[tokenizer.convert_ids_to_tokens(gap)]
    tokenizer.backend_tokenizer.model = Tokenizer.from_str(json.dumps(state)).model
    assert len(tokenizer) == last
    bias = torch.full((last + 1,), -30.0)
    bias[[gap, last]] = torch.tensor([9.0, 0.0])
    encoded = encode_pairs(tokenizer)
    found = alter(encoded, with_bias(small_teacher, bias), tokenizer, 8, place(tmp_path))
    drawn = found[found != np.tile(encoded.ids, 8)]
    assert set(drawn.tolist()) == {last}


def test_rare_tokens_are_left_out(pairs, small_teacher, tmp_path):
    """Of a flat distribution only as many tokens as there are candidates."""
    tokenizer, encoded = pairs
    bias = -torch.arange(len(tokenizer)) / 1000
    found = alter(encoded, with_bias(small_teacher, bias), tokenizer, 8, place(tmp_path))
    drawn = found[found != np.tile(encoded.ids, 8)]
    assert len(set(drawn.tolist())) == 15


def test_copies_lie_behind_their_examples(pairs):
    _, encoded = pairs
    ids = np.arange(COUNT * len(encoded.ids), dtype=np.int32)
    found = with_copies(encoded, ids, COUNT)
    count = len(encoded)
    assert len(found) == (1 + COUNT) * count
    for row in (0, 7, count - 1):
        begin, end = encoded.bounds[row : row + 2]
        for copy in range(1, 1 + COUNT):
            first, last = found.bounds[copy * count + row], found.bounds[copy * count + row + 1]
            wanted = ids.reshape(COUNT, -1)[copy - 1, begin:end]
            np.testing.assert_array_equal(found.ids[first:last], wanted)
            np.testing.assert_array_equal(found.types[first:last], encoded.types[begin:end])
            assert found.labels[copy * count + row] == encoded.labels[row]
    np.testing.assert_array_equal(found.ids[: len(encoded.ids)], encoded.ids)


@pytest.fixture(scope="module")
def fewer(pairs, small_teacher, tmp_path_factory):
    """A student that has 70 of its teacher's ids."""
    _, encoded = pairs
    theirs = read_tokenizer(small_teacher)
    counts = np.bincount(encoded.ids, minlength=len(ids_of(theirs)))
    own = Tokenizer.from_str(json.dumps(trim(theirs, choose(theirs, counts, 70))))
    roles = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, **roles)
    folder = tmp_path_factory.mktemp("students") / "70"
    model = make_model("distilbert", 70, 1, max_position_embeddings=32)
    return ModelEntry("70", "student", save_with_tokenizer(model, tokenizer, folder))


def test_copies_in_the_ids_of_a_student(pairs, fewer, small_teacher):
    """Copies of examples as they are: its own tokenizer writes the same."""
    encoded = encode_pairs(pairs[0], longest=50)
    own = encode_pairs(open_candidate(fewer).tokenizer, longest=50)
    copies = with_copies(encoded, np.tile(encoded.ids, 2), 2)
    found = recut_copies(own, copies, TrimmedIds.of_student(small_teacher, fewer.path), 50)
    assert len(found) == len(found.labels) == 3 * len(own)
    np.testing.assert_array_equal(found.ids[: len(own.ids)], own.ids)
    whole = np.flatnonzero(own.lengths < 50)
    assert 5 < len(whole) < len(own)
    for row in range(len(own)):
        begin, end = found.bounds[row + len(own) :][:2]
        if row in whole:
            wanted = slice(*own.bounds[row : row + 2])
            np.testing.assert_array_equal(found.ids[begin:end], own.ids[wanted])
            np.testing.assert_array_equal(found.types[begin:end], own.types[wanted])
        else:
            assert end - begin == 50
            assert found.ids[end - 1] == own.ids[-1]  # [SEP]


def test_a_student_with_fewer_ids_reads_the_copies(entries, fewer, data, tmp_path):
    settings = {"epochs": 0.3, "distil": True, "distil_copies": 2, "distil_epochs": 0.5,
                "keep": (0,)}  # fmt: skip
    run_on([entries[0], fewer, entries[1]], data, tmp_path, **settings)
    for name in ("70+distil", "1x32+distil"):
        stored = json.loads((tmp_path / "sst2" / f"{name}-seed0.json").read_text())
        assert stored["examples"] == 600
    # The model that is kept has its own tokenizer beside it.
    ask = pipeline("text-classification", str(tmp_path / "sst2" / "70+distil-seed0"))
    assert len(ask.tokenizer) == ask.model.config.vocab_size == 70
    assert 0 < ask("amber bridge")[0]["score"] < 1


def test_copies_are_made_once_and_read_by_the_distilled_rows(entries, data, tmp_path, capsys):
    settings = {"epochs": 0.3, "distil": True, "distil_copies": 2, "distil_epochs": 0.5}
    result = run_on(entries[:2], data, tmp_path, **settings)
    page = tasks_page(result, "toy", "command")
    assert "on 2 altered copies of each" in page
    assert "0.5 passes over all of these" in page
    path = tmp_path / "sst2" / "copies.safetensors"
    before = path.stat().st_mtime_ns
    stored = json.loads((tmp_path / "sst2" / "1x32+distil-seed0.json").read_text())
    assert (stored["examples"], stored["steps"]) == (600, 19)  # half of 38 batches of 16
    teacher = json.loads((tmp_path / "sst2" / "teacher-seed0.json").read_text())
    assert (teacher["examples"], teacher["steps"]) == (200, 4)
    capsys.readouterr()
    run_on(entries[:2], data, tmp_path, **settings)
    assert "3 of 3 runs found" in capsys.readouterr().err

    # Another seed reads the same copies; another number of them is made anew.
    run_on(entries[:2], data, tmp_path, **settings, seeds=(0, 1))
    assert path.stat().st_mtime_ns == before
    assert "3 of 6 runs found" in capsys.readouterr().err
    logits = tmp_path / "sst2" / "teacher-seed1.safetensors"
    assert logits.is_file()
    run_on(entries[:2], data, tmp_path, **{**settings, "distil_copies": 1})
    assert path.stat().st_mtime_ns != before
    assert "1 of 3 runs found" in capsys.readouterr().err
    assert read_tensor(path, "input_ids", "another key") is None


def test_small_tasks_are_passed_over_until_there_are_enough_steps(entries, data, tmp_path, capsys):
    settings = {"epochs": 0.3, "distil": True, "distil_copies": 2, "distil_epochs": 0.5}
    run_on(entries[:2], data, tmp_path, **settings)
    capsys.readouterr()
    run_on(entries[:2], data, tmp_path, **settings, distil_min_steps=19)
    assert "3 of 3 runs found" in capsys.readouterr().err, "it made no difference"
    result = run_on(entries[:2], data, tmp_path, **settings, distil_min_steps=21)
    assert "2 of 3 runs found" in capsys.readouterr().err
    stored = json.loads((tmp_path / "sst2" / "1x32+distil-seed0.json").read_text())
    assert stored["steps"] == 21
    page = " ".join(tasks_page(result, "toy", "command").split())
    assert "0.5 passes over all of these, at least 21 steps" in page
    with pytest.raises(UserError, match="distil_min_steps must be 0 where distil_epochs is"):
        TasksConfig(distil=True, distil_min_steps=21)


def test_copies_need_one_tokenizer_and_the_second_distillation(entries, data, tmp_path):
    with pytest.raises(UserError, match=r"distil_copies must be 0 where distil is false, got 2"):
        TasksConfig(distil_copies=2)
    tokenizer = open_candidate(entries[0]).tokenizer
    tokenizer.add_tokens(["entirely"])
    model = make_model("distilbert", len(tokenizer), 1)
    folder = save_with_tokenizer(model, tokenizer, tmp_path / "other")
    other = ModelEntry(name="other", role="student", path=folder)
    with pytest.raises(UserError, match=r"another tokenizer than the teacher, .* got other"):
        run_on([*entries, other], data, tmp_path / "out", distil=True, distil_copies=1)

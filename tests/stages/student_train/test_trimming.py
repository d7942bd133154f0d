"""A student with fewer ids than its teacher: its batches, losses, weights and folder."""
# ruff: noqa: F811

import json

import pytest
import torch
from transformers import AutoTokenizer

from distilcache.data.cache.cache import Cache
from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError
from distilcache.data.loader.dataset import CachedBatches
from distilcache.stages.models.tokenizers import saved_fingerprint
from distilcache.stages.student_train import vocabulary
from distilcache.stages.student_train.assembly import assemble
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.losses import (
    kl_full,
    masked_cross_entropy,
    squared_error,
)
from distilcache.stages.student_train.model import TERMS
from distilcache.stages.student_train.run import train_student
from distilcache.stages.student_train.signals import count_positions, required_signals
from distilcache.stages.student_train.student import build_student, student_config
from distilcache.stages.student_train.trimming import TrimmedBatches, token_counts, trimmed_ids
from distilcache.stages.student_train.weights import config_in
from tests.builders import build_corpus_of, random_texts, run_stage_one
from tests.stages.models.families_support import (
    make_model,
    make_tokenizer,
    open_model,
    save_teacher,
    save_with_tokenizer,
)
from tests.stages.student_train.losses_support import dense_relations
from tests.stages.student_train.model_support import EXACT
from tests.stages.student_train.trainer_support import same, stopped_at

WANTED = 70
"""Of the 120 ids of the small vocabulary."""
LONGEST = 12
LINES = {"packing": "lines", "max_length": LONGEST}
NONE = float("-inf")


@pytest.fixture(scope="module")
def exact(small_cache):
    """Signals of all positions, bit for bit; sequences of different lengths."""
    return Cache.open(
        small_cache(
            corpus=LINES,
            positions="all",
            logit_positions="masked",
            top_k=4,
            relation_layer=-1,
            **EXACT,
        )  # fmt: skip
    )


@pytest.fixture(scope="module")
def names(exact):
    """The teacher's token of each id."""
    state = json.loads((exact.teacher_dir / "tokenizer.json").read_text())
    return {index: token for token, index in state["model"]["vocab"].items()}


def losses(cache, size="3x32", **train):
    """A student inside its losses, and its batches."""
    student = StudentConfig(sizes=(size,), vocabulary=WANTED, family="teacher")
    trimmed = trimmed_ids(cache, WANTED)
    config = TrainConfig(**{"batch_size": 6, "streams": 2, "row_chunk": 7, **train})
    signals = required_signals(cache.encoding, config, trimmed=True)
    model = build_student(
        size=size, student=student, seed=0, encoding=cache.encoding,
        teacher_dir=cache.teacher_dir, trimmed=trimmed,
    )  # fmt: skip
    return *assemble(cache, model, config, signals, trimmed=trimmed), trimmed


def test_the_corpus_is_counted(exact, small_corpus):
    corpus = Corpus.open(small_corpus(**LINES))
    assert token_counts(exact).tolist() == corpus.token_counts.tolist()


def test_kept_ids_follow_from_their_number(exact, capsys):
    shared = trimmed_ids(exact, 0.93)
    counts = token_counts(exact)
    assert 0.93 <= counts[shared.old_n].sum() / counts.sum() < 0.99
    again = trimmed_ids(exact, len(shared))
    assert again.old_n.tolist() == shared.old_n.tolist()
    assert trimmed_ids(exact, 1) is trimmed_ids(exact, 120) is None
    assert capsys.readouterr().err == ""
    assert trimmed_ids(exact, 30000) is None
    assert "vocabulary=30,000 keeps all ids, as the teacher has 120" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"vocabulary must be at least (\d+) .*, got 20; .*=\1 or"):
        trimmed_ids(exact, 20)


def longest_first(token, kept):
    """The pieces of a token, as WordPiece is defined."""
    if token in kept:
        return [kept[token]]
    text, inner, found = token.removeprefix("##"), token.startswith("##"), []
    while text:
        pieces = ("##" * inner + text[:n] for n in range(len(text), 0, -1))
        piece = next(piece for piece in pieces if piece in kept)
        found.append(kept[piece])
        text, inner = text[len(piece) - 2 * inner :], True
    return found


def test_batches_in_the_students_ids(exact, names):
    """Token by token, with a loop."""
    settings = {"batch_size": 6, "seed": 0, "streams": 2, "signal": "replay+topk"}
    trimmed = trimmed_ids(exact, WANTED)
    kept = trimmed.tokenizer().get_vocab()
    plain, made = (
        CachedBatches(exact, **settings),
        TrimmedBatches(exact, trimmed=trimmed, **settings),
    )
    column = f"hidden_{exact.encoding.num_layers}"
    cut_off = written = 0
    for k in range(plain.steps_per_epoch):
        before, after = plain[k], made[k]
        width, new_width = before["input_ids"].shape[1], after["input_ids"].shape[1]
        places = {}  # of the batch before: where it is now
        for row, there in enumerate(before["attention_mask"].sum(1).tolist()):
            found, starts = [], []
            for index in before["input_ids"][row, :there].tolist():
                starts.append(len(found))
                found += longest_first(names[index], kept)
            written += len(found) - there
            if len(found) > LONGEST:
                cut_off += 1
                found = [*found[: LONGEST - 1], found[-1]]
                starts[-1] = LONGEST - 1
                starts[:-1] = [start if start < LONGEST - 1 else None for start in starts[:-1]]
            for place, start in enumerate(starts):
                if start is not None:
                    places[row * width + place] = row * new_width + start
            padding = [0] * (new_width - len(found))
            assert after["input_ids"][row].tolist() == found + padding
            assert after["attention_mask"][row].sum() == len(found)

        def moved(name, before=before, places=places):
            rows = [row for row, at in enumerate(before[name].tolist()) if at in places]
            return rows, [places[before[name][row].item()] for row in rows]

        labels = [names[label] for label in before["labels"].tolist()]
        rows, index = moved("masked_index")
        left = [(at, kept[labels[row]]) for row, at in zip(rows, index, strict=True)
                if labels[row] in kept]  # fmt: skip
        assert after["masked_index"].tolist() == [at for at, _ in left]
        assert after["labels"].tolist() == [label for _, label in left]
        rows, index = moved("hidden_index")
        assert after["hidden_index"].tolist() == index
        assert torch.equal(after[column], before[column][rows])
        rows, index = moved("ce_index")
        assert after["ce_index"].tolist() == index
        for old, new in zip(rows, range(len(rows)), strict=True):
            ids, values = (before[name][old].tolist() for name in ("logit_ids", "logit_values"))
            there = [kept.get(names[index]) for index in ids]
            assert after["logit_ids"][new].tolist() == [index or 0 for index in there]
            assert after["logit_values"][new].tolist() == [
                NONE if index is None else value for index, value in zip(there, values, strict=True)
            ]
    assert cut_off > 5
    assert written > 100


@pytest.mark.parametrize(("signal", "mask_alone"), [("replay", False), ("replay+topk", True)])
def test_losses_are_over_the_kept_ids(exact, small_teacher, signal, mask_alone):
    """Against the teacher itself, whole, in plain formulas."""
    settings = {"signal": signal, "restrict_ce_to_mask": mask_alone, "alpha_mse": 1.0}
    module, made, trimmed = losses(exact, **settings)
    teacher, student = open_model(small_teacher), module.student.eval()
    plain = CachedBatches(exact, batch_size=6, seed=0, streams=2, signal=signal,
                          restrict_ce_to_mask=mask_alone)  # fmt: skip
    kept = torch.from_numpy(trimmed.old_n)
    for k in range(3):
        before, after = plain[k], made[k]
        _, sums = module(after, count_positions(after))
        with torch.no_grad():
            ids, there = before["input_ids"], before["attention_mask"]
            theirs_NV = teacher(ids, attention_mask=there).logits.flatten(0, 1)[before["ce_index"]]
            ours = student(after["input_ids"], attention_mask=after["attention_mask"]).logits
        stays = trimmed.recut(ids[there > 0].numpy(), there.sum(1).numpy(), LONGEST).places_T >= 0
        rows = torch.from_numpy(stays)[(there.flatten().cumsum(0) - 1)[before["ce_index"]]]
        theirs_Nn, ours_Nn = theirs_NV[rows][:, kept], ours.flatten(0, 1)[after["ce_index"]]
        labels = torch.full_like(after["input_ids"].flatten(), -100)
        labels[after["masked_index"]] = after["labels"]
        wanted = [
            kl_full(ours_Nn, theirs_Nn, 2.0),
            masked_cross_entropy(ours.flatten(0, 1), labels),
            squared_error(ours_Nn, theirs_Nn),
        ]
        ce, mlm, _, mse, _ = sums
        torch.testing.assert_close(
            torch.stack([ce, mlm, mse]), torch.stack(wanted), rtol=1e-3, atol=1e-3
        )
        assert wanted[0] > 0.1  # sequences with dropped tokens read differently


@torch.no_grad()
def queries(model, batch):
    """Queries, keys and values of the last layer of a BERT, each [B, L, P]."""
    found = []
    ends = ("self.query", "self.key", "self.value")
    maps = [module for name, module in model.named_modules() if name.endswith(ends)][-3:]
    for module in maps:
        module.register_forward_hook(lambda *call: found.append(call[-1]))
    model(batch["input_ids"], attention_mask=batch["attention_mask"])
    return found


def test_relations_are_those_among_the_teachers_tokens(exact, small_teacher):
    """Against the two models themselves, sequence by sequence."""
    module, made, trimmed = losses(exact, alpha_rel=1.0)
    plain = CachedBatches(exact, batch_size=6, seed=0, streams=2)
    cut_off = 0
    for k in range(3):
        before, after = plain[k], made[k]
        counts = count_positions(after)
        rel = module(after, counts)[1][TERMS.index("rel")]
        lengths = before["attention_mask"].sum(1).tolist()
        tokens = before["input_ids"][before["attention_mask"] > 0].numpy()
        places = torch.from_numpy(trimmed.recut(tokens, lengths, LONGEST).places_T).split(lengths)
        theirs = [
            [x[: len(at)][at >= 0] for x, at in zip(x_BLP, places, strict=True)]
            for x_BLP in queries(open_model(small_teacher), before)
        ]
        ours = [
            [x[at[at >= 0]] for x, at in zip(x_BLP, places, strict=True)]
            for x_BLP in queries(module.student.eval(), after)
        ]
        left = [len(x) for x in ours[0]]
        cut_off += sum(lengths) - sum(left)
        assert counts["rel"] == sum(left)
        wanted = dense_relations(ours, theirs, module._relation_heads, left)
        torch.testing.assert_close(rel, wanted, rtol=1e-4, atol=1e-4)
    assert cut_off > 5


def test_coded_relations_stay_those_of_their_tokens(small_cache):
    cache = Cache.open(small_cache(corpus=LINES, relation_layer=-1))
    _, made, trimmed = losses(cache, alpha_rel=1.0)
    before, after = CachedBatches(cache, batch_size=6, seed=0, streams=2, relation=True)[1], made[1]
    found, wanted = (cache.teacher.relations()(batch) for batch in (after, before))
    there = before["attention_mask"] > 0
    lengths = there.sum(1).numpy()
    stays = trimmed.recut(before["input_ids"][there].numpy(), lengths, LONGEST).places_T >= 0
    torch.testing.assert_close(
        found[:, after["relation_places"] >= 0], wanted[:, there][:, torch.from_numpy(stays)]
    )


def test_a_student_with_all_layers_is_its_teacher_over_the_kept_ids(exact, small_teacher):
    module, _, trimmed = losses(exact)
    kept = torch.from_numpy(trimmed.old_n)
    ids = torch.randint(len(kept), (4, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = module.student.eval()(ids).logits
        theirs = open_model(small_teacher)(kept[ids]).logits[..., kept]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def run(cache, out, vocabulary=WANTED, **train):
    plain = {"batch_size": 6, "streams": 2, "steps": 6, "logging_steps": 2, "save_steps": 2}
    return train_student(
        cache_dir=cache.path,
        out=out,
        size="2x32",
        student=StudentConfig(sizes=("2x32",), vocabulary=vocabulary),
        train=TrainConfig(**{**plain, **train}),
        device="cpu",
        dtype="float32",
    )


@torch.no_grad()
def test_positions_are_counted_from_the_id_that_the_teacher_names(tmp_path):
    """A ChemBERTa's configuration names another padding than its tokenizer has."""
    words = make_tokenizer("bert")
    teacher = make_model("roberta", len(words), pad_token_id=120, max_position_embeddings=200)
    save_with_tokenizer(teacher, words, tmp_path / "teacher")
    corpus = build_corpus_of(random_texts(20), tmp_path, tmp_path / "teacher")
    cache = Cache.open(run_stage_one(tmp_path / "cache", corpus, tmp_path / "teacher"))
    trimmed = trimmed_ids(cache, 0.5)
    assert trimmed.old_n.tolist() == list(range(121))
    config = StudentConfig(sizes=("3x32",), vocabulary=0.5)
    student = build_student(
        size="3x32", student=config, seed=0, encoding=cache.encoding,
        teacher_dir=cache.teacher_dir, trimmed=trimmed,
    )  # fmt: skip
    ids = torch.arange(40).view(2, 20) + 60
    found, wanted = (model.eval()(ids).logits for model in (student, teacher))
    torch.testing.assert_close(found, wanted[..., :121], rtol=1e-5, atol=1e-5)


def test_a_student_in_its_folder(exact, tmp_path):
    run(exact, tmp_path / "2x32")
    own = AutoTokenizer.from_pretrained(tmp_path / "2x32")
    trimmed = trimmed_ids(exact, WANTED)
    model = open_model(tmp_path / "2x32")
    assert len(own) == model.config.vocab_size == WANTED
    assert len(model.get_output_embeddings().weight) == WANTED
    assert model.config.pad_token_id == own.pad_token_id
    text = "amber bridges under zebras"
    plain = trimmed.tokenizer().encode(text)
    assert own(text)["input_ids"] == plain.ids
    assert "[UNK]" not in plain.tokens
    assert not (tmp_path / "2x32" / "vocab.txt").exists()
    settings = json.loads((tmp_path / "2x32" / "training.json").read_text())["settings"]
    assert settings["student"]["vocabulary"] == WANTED
    fingerprint = saved_fingerprint(tmp_path / "2x32" / "tokenizer.json")
    assert run(exact, tmp_path / "2x32")["steps"] == 6  # reused
    assert saved_fingerprint(tmp_path / "2x32" / "tokenizer.json") == fingerprint


@pytest.mark.parametrize("least", [24, vocabulary.LEAST])
def test_an_interrupted_run_ends_in_the_same_weights(exact, tmp_path, monkeypatch, least):
    """Also where each step draws some of the kept ids."""
    monkeypatch.setattr(vocabulary, "LEAST", least)
    settings = {"vocabulary_fraction": 0.5, "signal": "replay", "batch_size": 2}
    run(exact, tmp_path / "whole", **settings)
    with stopped_at(3, monkeypatch):
        run(exact, tmp_path / "cut", **settings)
    run(exact, tmp_path / "cut", **settings)
    assert same(tmp_path / "cut", tmp_path / "whole")


def test_ranks_read_the_same_sequences(exact):
    settings = {"batch_size": 6, "seed": 0, "streams": 2, "trimmed": trimmed_ids(exact, WANTED)}
    alone = TrimmedBatches(exact, **settings)
    for k in (0, 1):
        rows = [row for rank in (0, 1) for row in TrimmedBatches(
            exact, rank=rank, world=2, **settings)[k]["input_ids"].tolist()]  # fmt: skip
        bare = [[index for index in row if index] for row in rows]
        wanted = [[index for index in row if index] for row in alone[k]["input_ids"].tolist()]
        assert sorted(bare) == sorted(wanted)


def test_a_number_that_keeps_all_ids_changes_nothing(exact, tmp_path):
    run(exact, tmp_path / "all", vocabulary=500)
    run(exact, tmp_path / "plain", vocabulary=1)
    assert same(tmp_path / "all", tmp_path / "plain")


def test_weighted_sums_are_divided_by_the_teachers_tokens(small_cache):
    """Pieces of a token that the student lacks are no tokens of the sum."""
    cache = Cache.open(small_cache(corpus=LINES, positions="masked+0.3", top_k=4, **EXACT))
    model, data, _ = losses(cache, alpha_cos=1.0)
    weights = tokens = 0.0
    for k in range(data.steps_per_epoch):
        batch = data[k]
        counts = count_positions(batch)
        assert counts["ce"] == counts["cos"] == counts["mse"] == int(batch["their_tokens"])
        weights += float(batch["hidden_weight"].sum())
        tokens += counts["cos"]
        assert int(batch["their_tokens"]) < int(batch["attention_mask"].sum())
    assert weights == pytest.approx(tokens, rel=0.1)
    loss, _ = model(data[0], count_positions(data[0]))
    assert loss.isfinite()


def test_models_that_read_padding_keep_all_ids(tmp_path):
    folder = save_teacher("fnet", tmp_path / "m")
    corpus = build_corpus_of(random_texts(), tmp_path, folder, packing="blocks")
    cache = Cache.open(run_stage_one(tmp_path / "cache", corpus, folder))
    with pytest.raises(UserError, match="of type 'fnet', got 60: it mixes padding"):
        trimmed_ids(cache, 60)


@pytest.mark.parametrize("signal", ["sparse", "replay+residual"])
def test_signals_that_need_all_ids_are_refused(exact, signal):
    with pytest.raises(UserError, match=r"signal must be 'replay\+topk' or 'replay' where .*drops"):
        required_signals(exact.encoding, TrainConfig(signal=signal), trimmed=True)


@pytest.mark.parametrize("wanted", [0, -3, 7.5, 1.2])
def test_a_number_of_ids_that_is_none(wanted):
    with pytest.raises(UserError, match=r"vocabulary must be a whole number of ids, or a share"):
        StudentConfig(vocabulary=wanted)


def test_a_start_must_have_the_same_ids(exact, tmp_path):
    run(exact, tmp_path / "first", steps=1)
    shape = {"sizes": ("2x32",), "heads": 2, "ffn": 64}
    student = StudentConfig(**shape, vocabulary=WANTED, init=str(tmp_path / "first"))
    trimmed, encoding = trimmed_ids(exact, WANTED), exact.encoding
    settings = {"size": "2x32", "student": student, "encoding": encoding}
    student_config(**settings, teacher=config_in(exact.teacher_dir))  # before the ids are known
    start = {**settings, "seed": 0, "teacher_dir": exact.teacher_dir, "trimmed": trimmed}
    assert build_student(**start).config.vocab_size == WANTED
    path = tmp_path / "first" / "tokenizer.json"
    state = json.loads(path.read_text())
    state["model"]["vocab"]["other"] = state["model"]["vocab"].popitem()[1]
    path.write_text(json.dumps(state))
    (tmp_path / "first" / "training.json").unlink()  # it holds the file's hash
    with pytest.raises(UserError, match=r"init '.*first' must have the student's token ids"):
        build_student(**start)

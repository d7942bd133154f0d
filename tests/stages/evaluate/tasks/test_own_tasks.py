"""Tasks of one's own: files of every kind, labels and held-out part, tags, and bad input."""

import csv
import json
import random
import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer, BertConfig

from distilcache.data.errors import UserError
from distilcache.pipeline.recipe import load_recipe
from distilcache.stages.evaluate.tasks import one_run
from distilcache.stages.evaluate.tasks.altered import with_copies
from distilcache.stages.evaluate.tasks.catalogue import CLASSES, SCORE, TAGS, OwnTask
from distilcache.stages.evaluate.tasks.config import TasksConfig
from distilcache.stages.evaluate.tasks.examples import Split
from distilcache.stages.evaluate.tasks.features import (
    NO_TAG,
    Collate,
    encode,
    tags_of,
)
from distilcache.stages.evaluate.tasks.metrics import entities, majority, measure
from distilcache.stages.evaluate.tasks.plan import longest
from distilcache.stages.evaluate.tasks.remarks import tell_cut, tell_unknown
from distilcache.stages.evaluate.tasks.task_losses import hard_loss, soft_loss
from distilcache.stages.models.tokenizers import load_tokenizer
from tests.refusals import refused
from tests.stages.evaluate.tasks.tasks_support import read_own, write_csv
from tests.stages.models.families_support import FAMOUS, make_tokenizer

ROWS = [(f'number {i}, "{"good" if i % 2 else "bad"}"\nreview', ("no", "yes")[i % 2])
        for i in range(40)]  # fmt: skip
TEXTS, NAMES = map(list, zip(*ROWS, strict=True))


def failure(**fields) -> str:
    line = refused(read_own, **fields)
    assert line.startswith("tasks: ")
    return line


def test_files_of_every_kind_give_the_same_examples(tmp_path):
    dicts = [{"id": i, "review": text, "answer": name} for i, (text, name) in enumerate(ROWS)]
    write_csv(tmp_path / "a.csv", dicts)
    for name, between in (("semicolon.csv", ";"), ("tab.csv", "\t")):
        with (tmp_path / name).open("w", newline="") as sheet:
            writer = csv.DictWriter(sheet, list(dicts[0]), delimiter=between)
            writer.writeheader()
            writer.writerows(dicts)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dicts) + "\n")
    (tmp_path / "a.json").write_text(json.dumps(dicts, indent=1))
    pq.write_table(pa.Table.from_pylist(dicts), tmp_path / "a.parquet")
    wanted = Split((TEXTS,), [i % 2 for i in range(40)])
    for name in ("a.csv", "semicolon.csv", "tab.csv", "a.jsonl", "a.json", "a.parquet"):
        file = str(tmp_path / name)
        data = read_own(train=file, validation=file, text=("review",), label="answer")
        assert (data.train, data.dev) == (wanted, {"": wanted}), name
        assert data.task.labels == ("no", "yes")
    flat = [{**row, "review": row["review"].replace("\n", " ")} for row in dicts]
    lines = ["\t".join(flat[0]), *("\t".join(map(str, row.values())) for row in flat)]
    (tmp_path / "a.tsv").write_text("\ufeff" + "\r\n".join(lines))
    file = str(tmp_path / "a.tsv")
    data = read_own(train=file, validation=file, text=("review",), label="answer")
    assert data.train == Split(([row["review"] for row in flat],), wanted.labels)


def test_whole_numbers_are_names_in_files_of_every_kind(tmp_path):
    rows = [{"text": str(i), "label": (10, 9, -1)[i % 3]} for i in range(30)]
    write_csv(tmp_path / "a.csv", rows)
    # A missing value makes a column of whole numbers one of floats.
    pq.write_table(
        pa.table({"text": [r["text"] for r in rows], "label": [float(r["label"]) for r in rows]}),
        tmp_path / "b.parquet",
    )
    data = read_own(train=str(tmp_path / "a.csv"), validation=str(tmp_path / "b.parquet"))
    assert data.task.labels == ("-1", "9", "10")
    assert data.train.labels == data.dev[""].labels == [2, 1, 0] * 10


def test_names_that_are_nearly_numbers_are_names(tmp_path):
    names = ("--1", "1", "9" * 5000, "²", "-")
    rows = [{"text": str(i), "label": names[i % 5]} for i in range(30)]
    write_csv(tmp_path / "a.csv", rows)
    assert read_own(train=str(tmp_path / "a.csv")).task.labels == tuple(sorted(names))
    write_csv(
        tmp_path / "a.csv", [{"text": str(i), "label": ("01", "1")[i % 2]} for i in range(30)]
    )
    assert read_own(train=str(tmp_path / "a.csv")).task.labels == ("01", "1")


def test_the_held_out_part_follows_from_the_texts_alone(tmp_path, capsys):
    rows = [{"text": f"review {i % 45}", "label": "ab"[i % 2]} for i in range(50)]
    write_csv(tmp_path / "a.csv", rows)
    random.Random(0).shuffle(rows)
    write_csv(tmp_path / "b.csv", rows)
    first, second = (read_own(train=str(tmp_path / name)) for name in ("a.csv", "b.csv"))
    assert set(first.dev[""].texts[0]) == set(second.dev[""].texts[0])
    assert not set(first.dev[""].texts[0]) & set(first.train.texts[0])
    assert 10 <= len(first.dev[""]) <= 12
    assert len(first.dev[""]) + len(first.train) == 50
    assert f"of 50 examples of {tmp_path / 'a.csv'} are held out" in capsys.readouterr().err


def test_held_out_texts_that_are_trained_on_are_told(tmp_path, capsys):
    def said(*numbers, kind=CLASSES):
        for name, first, last in (("train", 0, 20), ("validation", *numbers)):
            rows = [(["of", f"{i}"], ["x", "y"]) for i in range(first, last)]
            if kind == CLASSES:
                rows = [(" ".join(words), "xy"[words[1] > "5"]) for words, _ in rows]
            write_tags(tmp_path / f"{name}.jsonl", rows)
        files = (str(tmp_path / f"{name}.jsonl") for name in ("train", "validation"))
        read_own(**dict(zip(("train", "validation"), files, strict=True)), kind=kind)
        return capsys.readouterr().err

    also = "held-out texts are also trained on; their scores say less\n"
    assert said(0, 20) == f"tasks: mine: 20 of 20 {also}"
    assert said(17, 29) == f"tasks: mine: 3 of 12 {also}"
    assert said(16, 29, kind=TAGS) == f"tasks: mine: 4 of 13 {also}"
    assert said(20, 40) == ""


def test_scores_and_pairs(tmp_path):
    rows = [{"a": "x", "b": str(i), "score": i / 4} for i in range(20)]
    write_csv(tmp_path / "a.csv", rows)
    file = str(tmp_path / "a.csv")
    fields = {"text": ("a", "b"), "label": "score", "kind": SCORE}
    data = read_own(train=file, validation=file, **fields)
    assert data.train.texts == (["x"] * 20, [str(i) for i in range(20)])
    assert data.train.labels == [i / 4 for i in range(20)]
    assert data.task.metrics == ("pearson", "spearman")


def write_tags(path, rows):
    path.write_text("".join(json.dumps({"text": w, "label": t}) + "\n" for w, t in rows))
    return str(path)


def test_word_lists_and_texts_with_spaces_are_tagged(tmp_path):
    rows = [(["a", "b", f"c{i}"], ["O", "B-X", "I-X"]) for i in range(12)]
    file = write_tags(tmp_path / "a.jsonl", rows)
    data = read_own(train=file, validation=file, kind=TAGS)
    write_csv(tmp_path / "a.csv", [{"text": " ".join(w), "label": " ".join(t)} for w, t in rows])
    again = read_own(train=str(tmp_path / "a.csv"), validation=file, kind=TAGS)
    assert data.train == again.train
    assert data.task.labels == ("B-X", "I-X", "O")
    assert data.task.metrics == ("entity_f1",)
    assert data.train.labels[0] == (2, 0, 1)
    file = write_tags(tmp_path / "b.jsonl", [(["a", "b"], ["NOUN", "VERB"])] * 12)
    assert read_own(train=file, validation=file, kind=TAGS).task.metrics == ("word_accuracy",)
    with pytest.raises(UserError, match="a tag for each word, got 3 words and 2 tags"):
        read_own(train=write_tags(tmp_path / "c.jsonl", [*rows, (["a", "b", "c"], ["O", "O"])]),
                 kind=TAGS)  # fmt: skip


@pytest.mark.parametrize("kind", FAMOUS)
def test_tags_stand_at_the_first_token_of_each_word(kind, tmp_path):
    """Whatever the tokenizer does with spaces: the text of a labelled token begins its word."""
    tokenizer = make_tokenizer(kind)
    words = ["amber", "zq", "of", "bridges", "t"]
    rows = [(words, ["A", "B", "C", "A", "B"])] * 12
    file = write_tags(tmp_path / "a.jsonl", rows)
    data = read_own(train=file, validation=file, kind=TAGS)
    encoded = encode(data.task, data.train, tokenizer, 32)
    labels = encoded.labels[: encoded.bounds[1]]
    there = [i for i, label in enumerate(labels) if label != NO_TAG]
    assert labels[there].tolist() == [0, 1, 2, 0, 1]
    text = " ".join(words)
    made = tokenizer(text).encodings[0]
    begins = [text.index(f" {w}") + 1 if i else 0 for i, w in enumerate(words)]
    for token, begin in zip(there, begins, strict=True):
        start, end = made.offsets[token]
        assert text[start:end].strip() == text[begin:end]
    batch = Collate(encoded, types=False)([0, 1])
    assert batch["labels"].shape == batch["input_ids"].shape
    logits = torch.nn.functional.one_hot(batch["labels"].clamp(min=0), 3).transpose(1, 2)
    assert next(tags_of(logits.numpy(), encoded, data.train.labels)).tolist() == [0, 1, 2, 0, 1]


def test_words_that_are_cut_off_have_no_tag(small_tokenizer, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer)
    texts = [(["\u200b", "of", "of"], ["B", "A", "B"]), *[(["of"] * 30, ["A", "B"] * 15)] * 11]
    file = write_tags(tmp_path / "a.jsonl", texts)
    data = read_own(train=file, validation=file, kind=TAGS)
    encoded = encode(data.task, data.train, tokenizer, 10)
    # The first word of the first text has no token, and 22 of the others' lie beyond the tenth.
    start, end = encoded.bounds[1:3]
    assert (encoded.labels[:start] != NO_TAG).sum() == 2
    assert (encoded.labels[start:end] != NO_TAG).sum() == 8
    assert encoded.cut == 1 + 11 * 22
    logits = np.zeros((12, 2, 10), np.float32)
    logits[:, 1] = np.arange(10) % 2  # alternates, from B at the first word
    found = [tags.tolist() for tags in tags_of(logits, encoded, data.train.labels)]
    assert found == [[-1, 1, 0], *[[1, 0] * 4 + [-1] * 22] * 11]
    few, copies = encoded.first(1), with_copies(encoded, encoded.ids, 1)
    assert [tags.tolist() for tags in tags_of(logits, few, data.train.labels)] == found[:1]
    both = tags_of(np.tile(logits, (2, 1, 1)), copies, data.train.labels * 2)
    assert [tags.tolist() for tags in both] == found * 2
    tell_cut(data.task, data.train, encoded, 10, "do this")
    assert capsys.readouterr().err.endswith(
        "mine: 243 of 333 words lie beyond 10 tokens, or have none; their tags are not learnt, and "
        "count as missed; do this\n"
    )


@pytest.mark.parametrize(("tags", "score"), [("A B", 100 / 120), ("O B-X", 100 / 110)])
def test_scores_count_words_that_are_cut_off(small_tokenizer, tmp_path, monkeypatch, tags, score):
    """A model that gives each word that it reads its tag misses those beyond the end."""
    texts = [(["of", "of"] * pairs, tags.split() * pairs) for pairs in (1, 2, 3)] * 10
    file = write_tags(tmp_path / "a.jsonl", texts)  # 120 words, 60 entities; 4 words fit
    data = read_own(train=file, validation=file, kind=TAGS)
    candidate = types.SimpleNamespace(
        tokenizer=load_tokenizer(small_tokenizer), config=BertConfig()
    )
    job = types.SimpleNamespace(
        data=data, model=candidate, max_length=6, longer="", name="x", seed=0
    )

    def knows(model, kind, encoded, batch_size, place):
        labels = Collate(encoded, types=False)(range(len(encoded)))["labels"]
        return torch.nn.functional.one_hot(labels.clamp(min=0), 2).transpose(1, 2).float().numpy()

    monkeypatch.setattr(one_run, "predict", knows)
    found = one_run._metrics(None, job, one_run.TokenIds(job), TasksConfig(), None)
    assert list(found.values()) == [pytest.approx(score)]


def test_entities_are_counted_whole():
    tags = ["B-PER", "I-PER", "O", "I-LOC", "B-LOC", "I-PER", "I-PER"]
    assert entities(tags) == [("PER", 0, 2), ("LOC", 3, 4), ("LOC", 4, 5), ("PER", 5, 7)]
    file_labels = ("B-LOC", "B-PER", "I-LOC", "I-PER", "O")
    task = types.SimpleNamespace(kind=TAGS, metrics=("entity_f1",), labels=file_labels)
    said = ["B-PER", "I-PER", "O", "B-LOC", "I-LOC", "I-PER", "O"]
    # Of 4 true and 3 said: the first alone has both ends and its type.
    assert measure(task, [said], [tags]) == {"entity_f1": pytest.approx(2 / 7)}
    assert measure(task, [["O"]], [["O"]]) == {"entity_f1": 0.0}
    assert majority(task, [(4, 4, 1)], [(4, 1)]) == {"entity_f1": 0.0}
    task.metrics = ("word_accuracy",)
    assert measure(task, [["a", "b"], ["c"]], [["a", "c"], ["c"]])["word_accuracy"] == 2 / 3
    assert majority(task, [(4, 4, 1)], [(4, 1), (4,)])["word_accuracy"] == 2 / 3


def test_losses_of_tags_are_means_over_words():
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 3, 4, 5, generator=generator)
    labels = torch.full((3, 5), NO_TAG)
    labels[0, 1], labels[0, 3], labels[1, 2] = 2, 0, 3
    log_p = torch.log_softmax(logits, 1)
    wanted = [-(log_p[0, 2, 1] + log_p[0, 0, 3]) / 2, -log_p[1, 3, 2], torch.tensor(0.0)]
    torch.testing.assert_close(hard_loss(TAGS, logits, labels), torch.stack(wanted))
    p, q = (torch.softmax(x[1, :, 2] / 2, 0) for x in (teacher, logits))
    found = soft_loss(TAGS, logits, teacher, 2.0, labels != NO_TAG)
    assert found[1].item() == pytest.approx(float(4 * (p * (p / q).log()).sum()), rel=1e-4)
    assert found[2] == 0


class Rows(list):
    """As ``datasets`` gives them: rows, and what the columns are."""

    def __init__(self, rows, names):
        super().__init__(rows)
        self.features = {"text": None, "label": types.SimpleNamespace(names=names)}


def test_saved_data_sets_and_the_hub(tmp_path, monkeypatch):
    hub = types.ModuleType("datasets")
    rows = Rows([{"text": str(i), "label": i % 2} for i in range(20)], ["neg", "pos"])
    asked = []
    hub.load_from_disk = lambda path: {"train": rows} if path.endswith("all") else rows
    hub.load_dataset = lambda *name, split: asked.append((*name, split)) or rows
    for name in ("saved", "all"):
        (tmp_path / name).mkdir()
    saved = str(tmp_path / "saved")
    monkeypatch.setitem(sys.modules, "datasets", hub)
    data = read_own(train="hf:me/reviews/small:train", validation=saved)
    assert asked == [("me/reviews", "small", "train")]
    assert data.task.labels == ("neg", "pos")
    assert data.train.labels == data.dev[""].labels == [0, 1] * 10
    whole, asked[:] = hub.load_dataset, []

    def known(*name, split):
        if name == ("wiki/en",):
            raise FileNotFoundError("no such data set")
        return whole(*name, split=split)

    hub.load_dataset = known
    assert read_own(train="hf:wiki/en:train", validation=saved).train == data.train
    assert read_own(train="hf:me/reviews:train", validation=saved).train == data.train
    assert asked == [("wiki", "en", "train"), ("me/reviews", "train")]
    assert "one split of a saved data set, got train; name one" in failure(
        train=str(tmp_path / "all")
    )
    assert "must read hf:NAME[/CONFIG]:SPLIT" in failure(train="hf:me/reviews")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'datasets>=3.0', or name a file" in failure(train=saved)


def test_what_is_wrong_is_said_in_one_line(tmp_path):
    good, bad = tmp_path / "good.csv", tmp_path / "bad.csv"
    rows = [{"text": f"t{i}", "label": ("neg", "pos")[i % 2]} for i in range(20)]
    write_csv(good, rows)

    def fails(changed, **fields):
        write_csv(bad, changed)
        return failure(train=str(bad), **fields)

    assert "got no 'labell' among text, label; did you mean 'label'?" in failure(
        train=str(good), label="labell"
    )
    write_csv(bad, [{**row, "label": row["label"].upper()} for row in rows])
    line = failure(train=str(good), validation=str(bad))
    assert f"one of neg, pos, as in {good}, got 'NEG' in {bad} line 2" in line
    assert "got an empty text in" in fails([*rows, {"text": " ", "label": "pos"}])
    assert "line 22" in fails([*rows, {"text": " ", "label": "pos"}])
    assert "must hold 10 examples or more, got 9" in fails(rows[:9])
    assert "two different values at least, got neg" in fails(rows[::2])
    numbers = [{"text": f"t{i}", "label": i / 7} for i in range(20)]
    assert "got 20 different values in 20 examples" in fails(numbers)
    assert "set kind to regression" in fails(numbers)
    assert "set kind to classification" in fails(rows, kind=SCORE)
    assert "must differ between examples, got '1'" in fails(
        [{**row, "label": 1} for row in rows], kind=SCORE
    )
    line = fails([*rows, {"text": "t", "label": ""}])
    assert "one of neg, pos" in line
    assert line.endswith("bad.csv line 22; fill it, or leave the row out")
    scores = [{"text": f"t{i}", "label": i} for i in range(12)]
    for lacking in ("", "nan"):
        line = fails([*scores, {"text": "t", "label": lacking}], kind=SCORE)
        assert line.endswith("set kind to classification" if lacking else "or leave the row out")
    table = pa.table({"text": list("abcdefghijklm"), "label": pa.array([0, 1] * 6 + [None])})
    pq.write_table(table, tmp_path / "a.parquet")
    assert failure(train=str(tmp_path / "a.parquet")).endswith(
        "row 13; fill it, or leave the row out"
    )
    (tmp_path / "one.json").write_text(json.dumps({"data": rows}))
    assert "in one array, or in a line of its own" in failure(train=str(tmp_path / "one.json"))
    assert "got one text alone" in fails([{**row, "text": "same"} for row in rows])
    bad.write_text('text,label\n"a"b,c\n')
    assert "sound quotes" in failure(train=str(bad))
    bad.write_text("text,label\na,b,c\n")
    assert "2 columns in every line, got 3 in line 2" in failure(train=str(bad))
    bad.write_text("text,label,label\na,b,c\n" * 12)
    assert "must have each column once, got several ['label']" in failure(train=str(bad))
    bad.write_bytes(b"text,label\n\xff\xfe,1\n")
    assert "must be UTF-8" in failure(train=str(bad))
    assert "which does not exist" in failure(train=str(tmp_path / "none.csv"))
    (tmp_path / "a.xlsx").touch()
    assert ".csv" in failure(train=str(tmp_path / "a.xlsx"))
    lists = [{"text": f"t{i}", "label": ["O"]} for i in range(12)]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, lists)))
    assert "has one class (for a class of" in failure(train=str(tmp_path / "l.jsonl"))


def test_lists_are_words_of_tagging_alone(tmp_path):
    rows = [(["a", "b"], "xy"[i % 2]) for i in range(12)]
    for words in (["a", "b"], ["a", "b", "c"], ["a"], []):  # transformers takes two for a pair
        line = failure(train=write_tags(tmp_path / "a.jsonl", [*rows[1:], (words, "x")]))
        assert line.endswith("for a list of words set kind to tagging")
    line = failure(train=write_tags(tmp_path / "a.jsonl", [([1, 2], ["x", "y"])] * 12), kind=TAGS)
    assert line.endswith("got [1, 2] as text in " + str(tmp_path / "a.jsonl") + " line 1")


def test_lone_surrogates_are_replaced(small_tokenizer, tmp_path):
    """JSON's escapes can write them; UTF-8, which tokenizers and model cards are in, cannot."""
    rows = [(f"of \ud83d {i}", ("x\udc00", "y")[i % 2]) for i in range(12)]
    file = write_tags(tmp_path / "a.jsonl", rows)
    for kind in (CLASSES, TAGS):
        if kind == TAGS:
            write_tags(tmp_path / "a.jsonl", [(t.split(), [name] * 3) for t, name in rows])
        data = read_own(train=file, validation=file, kind=kind)
        text = data.train.texts[0][3]
        assert text == ("of ? 3" if kind == CLASSES else ["of", "?", "3"])
        assert data.task.labels == ("x?", "y")
        assert len(encode(data.task, data.train, load_tokenizer(small_tokenizer), 12)) == 12


def test_own_tasks_in_recipes(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        '[tasks]\nnames = ["reviews", "rte"]\n[tasks.own.reviews]\ntrain = "a.csv"\ntext = "body"\n'
    )
    config = load_recipe(recipe, ["tasks.own.reviews.label=stars"]).tasks
    own, rte = config.tasks()
    assert (own.columns, own.files, rte.name) == (("body", "stars"), ("a.csv", ""), "rte")

    def fails(name="x", **fields):
        own = {"train": "a.csv", **fields}
        return refused(lambda: TasksConfig(names=("x",), own={name: OwnTask(**own)}))

    assert "own.sst2 must be a new and plain name" in fails("sst2")
    assert "own.x.kind must be one of classification" in fails(kind="class")
    assert "own.x.train must name a file" in fails(train="")
    assert "one or two columns, got 3" in fails(text=("a", "b", "c"))
    assert "must name one column, got 2" in fails(text=("a", "b"), kind=TAGS)
    assert "different columns" in fails(label="text")
    with pytest.raises(UserError, match="did you mean 'reviews'"):
        TasksConfig(names=("review",), own={"reviews": OwnTask(train="a.csv")})
    with pytest.raises(UserError, match="tasks.own.reviews.lable"):
        load_recipe(recipe, ["tasks.own.reviews.lable=stars"])
    with pytest.raises(UserError, match="keep must name some of the seeds 0, 1, 2, got 7"):
        TasksConfig(keep=(7,))


def test_tabs_and_quotes_that_a_tsv_cannot_mean_are_refused(tmp_path):
    file = tmp_path / "a.tsv"
    rows = [f"{('no', 'yes')[i % 2]}\tfilm {i}" for i in range(20)]
    for extra, words in (("no\tgood film\tbut long", "2 columns in every line, got 3 in line 22"),
                         ('no\t"he said ""hi"""', "quotes around fields")):  # fmt: skip
        file.write_text("\n".join(["label\ttext", *rows, extra]))
        assert words in failure(train=str(file))
    file.write_text("\n".join(["label\ttext", *rows, 'no\t"Great!"']))
    data = read_own(train=str(file), validation=str(file))
    assert data.train.texts[0][-1] == '"Great!"'


@pytest.mark.parametrize("lists", [False, True])
def test_parquet_files_of_datasets_name_their_classes(tmp_path, lists):
    feature = {"names": ["O", "B-PER"], "_type": "ClassLabel"}
    if lists:
        feature = {"feature": feature, "_type": "List"}
    table = pa.table(
        {
            "text": [["Ada", "ran", str(i)] if lists else f"t{i}" for i in range(20)],
            "label": [[1, 0, 0] if lists else i % 2 for i in range(20)],
        }
    )
    written = json.dumps({"info": {"features": {"label": feature}}})
    file = tmp_path / "a.parquet"
    pq.write_table(table.replace_schema_metadata({"huggingface": written}), file)
    kind = TAGS if lists else CLASSES
    data = read_own(train=str(file), validation=str(file), kind=kind)
    assert set(data.task.labels) == {"O", "B-PER"}
    pq.write_table(table.replace_schema_metadata({"huggingface": "[]"}), file)
    data = read_own(train=str(file), validation=str(file), kind=kind)
    assert set(data.task.labels) == {"0", "1"}


@pytest.mark.parametrize("form", ["data/{}-00000-of-00001-0a1b2c.parquet", "en/{}/0000.parquet"])
def test_splits_of_a_clone_of_the_hub(tmp_path, capsys, form):
    """As CoNLL's: its validation split is held out, its test split where that is all there is."""
    clone = tmp_path / "conll"

    def write(split, count):
        file = clone / form.format(split)
        file.parent.mkdir(parents=True, exist_ok=True)
        words, tags = ([[split, str(i)] for i in range(count)], [["NN", "VB"]] * count)
        pq.write_table(pa.table({"text": words, "label": tags}), file)
        return file

    def read_clone(**fields):
        data = read_own(train=str(clone), kind=TAGS, **fields)
        return len(data.train), len(data.dev[""]), data.dev[""].texts[0][0][0]

    files = {s: write(s, count) for s, count in (("train", 20), ("validation", 12), ("test", 14))}
    assert read_clone() == read_clone(validation=str(clone)) == (20, 12, "validation")
    assert "held out" not in capsys.readouterr().err
    files["validation"].unlink()
    assert read_clone(validation=str(clone)) == (20, 14, "test")
    assert read_clone() == (16, 4, "train")
    files["train"].unlink()
    assert "must have a split train, got test; name another folder" in failure(train=str(clone))
    for split in ("train_a", "train_b"):
        write(split, 20)
    assert "one split train, got train_a, train_b; name a file" in failure(train=str(clone))


def test_a_folder_whose_files_name_no_split(tmp_path):
    for shard in range(2):
        rows = [{"text": f"{shard} {i}", "label": i % 2} for i in range(10)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{shard:04}.parquet")
    (tmp_path / "dataset_infos.json").write_text("{}")
    data = read_own(train=str(tmp_path), validation=str(tmp_path))
    assert data.train.texts[0] == [f"{shard} {i}" for shard in range(2) for i in range(10)]


def test_texts_that_are_cut_are_told(small_tokenizer, tmp_path, capsys):
    rows = [{"text": "of " * (3 + i), "label": i % 2} for i in range(20)]
    file = write_csv(tmp_path / "a.csv", rows)
    data = read_own(train=file, validation=file)
    encoded = encode(data.task, data.train, load_tokenizer(small_tokenizer), 12)
    tell_cut(data.task, data.train, encoded, 12, "do this")
    told = "12 of 20 texts are longer than 12 tokens and are cut; do this"
    assert told in capsys.readouterr().err
    models = [
        types.SimpleNamespace(positions=p, entry=types.SimpleNamespace(name=name))
        for name, p in (("large", 512), ("small", 32))
    ]
    found = [longest(data, models, TasksConfig(max_length=most)) for most in (31, 32, 128)]
    no_more = (32, "small reads no more")
    assert found == [(31, "raise tasks.max_length"), no_more, no_more]


def test_tokens_that_a_model_does_not_know_are_told(small_tokenizer, tmp_path, capsys):
    tokenizer = load_tokenizer(small_tokenizer)
    model = types.SimpleNamespace(tokenizer=tokenizer, entry=types.SimpleNamespace(name="1x32"))
    for lost in (0, 20):
        texts = ["ዶሮ of" if i < lost else "of of" for i in range(40)]
        rows = [{"text": text, "label": i % 2} for i, text in enumerate(texts)]
        file = write_csv(tmp_path / f"{lost}.csv", rows)
        data = read_own(train=file, validation=file)
        tell_unknown(data.task, encode(data.task, data.train, tokenizer, 12), model)
        told = "12.50 % of the tokens are unknown to 1x32; "  # 20 of 40 x 4, with [CLS] and [SEP]
        assert (told in capsys.readouterr().err) == (lost > 0)

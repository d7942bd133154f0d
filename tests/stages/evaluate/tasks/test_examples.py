"""Readers on files in the published layouts, and on the hub's rows."""

import json
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distilcache.stages.evaluate.tasks.catalogue import CLASSES, TASKS
from distilcache.stages.evaluate.tasks.examples import Split, read_task
from distilcache.stages.evaluate.tasks.places import locate
from distilcache.stages.evaluate.tasks.values import Answers
from tests.refusals import refused
from tests.stages.evaluate.tasks.tasks_support import (
    ENTAILMENT,
    write_rte,
    write_squad,
    write_sst2,
    write_stsb,
    write_tsv,
)


def read(name, root, **options):
    return read_task(TASKS[name], str(root), **options)


def failure(name, root, **options) -> str:
    line = refused(read, name, root, **options)
    assert line.startswith("tasks: ")
    return line


def test_single_sentences_with_quotes_and_odd_line_ends(tmp_path):
    rows = [("it 's \"half a quote . ", 1), ("next\u2028line\x85here ", 0)]
    write_sst2(tmp_path, rows, rows[:1])
    data = read("sst2", tmp_path)
    assert data.train == Split(([text for text, _ in rows],), [1, 0])
    assert data.dev == {"": Split(([rows[0][0]],), [1])}


def test_windows_line_ends(tmp_path):
    write_sst2(tmp_path, [("a", 1), ("b", 0)], [("c", 1)])
    path = tmp_path / "SST-2" / "train.tsv"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert read("sst2", tmp_path).train == Split((["a", "b"],), [1, 0])


def test_pairs_with_named_labels(tmp_path):
    write_rte(tmp_path, [("a", "b", "not_entailment"), ("c", "d", "entailment")])
    assert read("rte", tmp_path).train == Split((["a", "c"], ["b", "d"]), [1, 0])
    head = ["index", "question", "sentence", "label"]
    for name in ("train", "dev"):
        write_tsv(tmp_path / "QNLI" / f"{name}.tsv", [head, [0, "q", "s", "entailment"]])
    assert read("qnli", tmp_path).train == Split((["q"], ["s"]), [0])
    for name in ("train", "dev"):
        write_tsv(tmp_path / "WNLI" / f"{name}.tsv", [ENTAILMENT, [0, "q", "s", 1]])
    assert read("wnli", tmp_path).train == Split((["q"], ["s"]), [1])


@pytest.mark.parametrize("headings", [True, False])
def test_scores_with_and_without_headings(tmp_path, headings):
    examples = [("a", "b", 5.0), ("c", "d", 1.25)]
    write_stsb(tmp_path, examples)
    if headings:
        head = ["index", "genre", "filename", "year", "old_index", "source1", "source2",
                "sentence1", "sentence2", "score"]  # fmt: skip
        rows = [[i, "g", "f", 2012, 3, "s", "t", *row] for i, row in enumerate(examples)]
        for name in ("train", "dev"):
            write_tsv(tmp_path / "STS-B" / f"{name}.tsv", [head, *rows])
    assert read("stsb", tmp_path).train == Split((["a", "c"], ["b", "d"]), [5.0, 1.25])


def test_cola_has_no_headings(tmp_path):
    for name in ("train", "dev"):
        write_tsv(tmp_path / "CoLA" / f"{name}.tsv", [["gj04", 1, "", "A."], ["gj04", 0, "*", "B"]])
    assert read("cola", tmp_path).train == Split((["A.", "B"],), [1, 0])


def test_mrpc_begins_with_a_byte_order_mark(tmp_path):
    head = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
    for name in ("train", "dev"):
        write_tsv(tmp_path / "MRPC" / f"{name}.tsv", [head, [1, 70, 71, "a", "b"]], "\ufeff")
    assert read("mrpc", tmp_path).train == Split((["a"], ["b"]), [1])


def test_qqp_leaves_its_broken_lines_out(tmp_path, capsys):
    head = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
    good = [[i, 1, 2, f"q{i}", f"r{i}", i % 2] for i in range(300)]
    for name in ("train", "dev"):
        write_tsv(tmp_path / "QQP" / f"{name}.tsv", [head, *good[:7], ["7", "1", "half"], *good])
    data = read("qqp", tmp_path)
    assert len(data.train) == 307
    assert "1 broken lines left out" in capsys.readouterr().err
    write_tsv(tmp_path / "QQP" / "train.tsv", [head, *([["1", "half"]] * 9), *good])
    assert "6 columns" in failure("qqp", tmp_path)


def test_mnli_has_two_held_out_parts_with_other_columns(tmp_path):
    parses = ["sentence1_binary_parse", "sentence2_binary_parse", "sentence1_parse",
              "sentence2_parse", "sentence1", "sentence2"]  # fmt: skip
    head = ["index", "promptID", "pairID", "genre", *parses]
    row = [0, 1, "1n", "fiction", "(x)", "(y)", "(X)", "(Y)"]
    write_tsv(
        tmp_path / "MNLI" / "train.tsv",
        [[*head, "label1", "gold_label"], [*row, "a", "b", "neutral", "contradiction"]],
    )
    labels = [f"label{i}" for i in range(1, 6)]
    for name, gold in (("matched", "neutral"), ("mismatched", "entailment")):
        write_tsv(
            tmp_path / "MNLI" / f"dev_{name}.tsv",
            [[*head, *labels, "gold_label"], [*row, name, "b", *["neutral"] * 5, gold]],
        )
    data = read("mnli", tmp_path)
    assert data.train == Split((["a"], ["b"]), [2])
    assert data.dev["_m"] == Split((["matched"], ["b"]), [1])
    assert data.dev["_mm"] == Split((["mismatched"], ["b"]), [0])


def test_reviews_from_folders_jsonl_and_parquet(tmp_path):
    folder = tmp_path / "a" / "aclImdb"
    for part in ("train", "test"):
        for label in ("neg", "pos"):
            (folder / part / label).mkdir(parents=True)
            (folder / part / label / "0_1.txt").write_text(f"{part} {label}<br />", "utf-8-sig")
    data = read("imdb", tmp_path / "a")
    spoiled = folder / "test" / "pos" / "0_2.txt"
    spoiled.write_bytes(b"caf\xe9")
    assert f"{spoiled} must be UTF-8 text" in failure("imdb", tmp_path / "a")
    assert data.train == Split((["train neg<br />", "train pos<br />"],), [0, 1])
    assert data.dev[""] == Split((["test neg<br />", "test pos<br />"],), [0, 1])
    (tmp_path / "b" / "IMDB").mkdir(parents=True)
    rows = [{"text": "good", "label": 1}, {"text": "bad", "label": "neg"}]
    jsonl = tmp_path / "b" / "IMDB" / "train.jsonl"
    jsonl.write_text("\n".join(map(json.dumps, rows)) + "\n")
    table = pa.table({"text": ["good"], "label": [1]})
    pq.write_table(table, tmp_path / "b" / "IMDB" / "test.parquet")
    data = read("imdb", tmp_path / "b")
    assert data.train == Split((["good", "bad"],), [1, 0])
    assert data.dev[""] == Split((["good"],), [1])
    jsonl.write_text('{"text": "good", "label": 1}\n{"text": \n')
    assert "line 2" in failure("imdb", tmp_path / "b")


def test_squad(tmp_path):
    write_squad(tmp_path, [("Who?", "Ada did it.", [("Ada", 0), ("Ada did", 0)])])
    marked = tmp_path / "SQuAD" / "train-v1.1.json"
    marked.write_text(marked.read_text(), "utf-8-sig")
    data = read("squad", tmp_path)
    answers = Answers(("Ada", "Ada did"), (0, 0))
    assert data.train == Split((["Who?"], ["Ada did it."]), [answers])
    (tmp_path / "SQuAD" / "train-v1.1.json").write_text('{"data": [{"paragraphs": [{}]}]}')
    assert "SQuAD v1.1" in failure("squad", tmp_path)


def test_what_is_wrong_is_said_in_one_line(tmp_path):
    assert "tasks.data" in failure("sst2", tmp_path / "none")
    assert str(tmp_path / "SST-2" / "train.tsv") in failure("sst2", tmp_path)
    write_sst2(tmp_path, [("a", 2)], [("b", 1)])
    assert "'2' in" in failure("sst2", tmp_path)
    write_sst2(tmp_path, [], [("b", 1)])
    assert "got none" in failure("sst2", tmp_path)
    write_tsv(tmp_path / "SST-2" / "train.tsv", [["text", "label"], ["a", 1]])
    assert "sentence, label" in failure("sst2", tmp_path)
    write_tsv(tmp_path / "SST-2" / "train.tsv", [["sentence", "label"], ["a", 1], ["a"]])
    assert "line 3" in failure("sst2", tmp_path)
    (tmp_path / "SST-2" / "train.tsv").write_bytes(b"sentence\tlabel\n\xff\xfe\t1\n")
    assert "UTF-8" in failure("sst2", tmp_path)
    write_stsb(tmp_path, [("a", "b", float("nan"))])
    assert "must be a number" in failure("stsb", tmp_path)


def test_a_limit_takes_the_same_examples_every_time(tmp_path):
    write_sst2(tmp_path, [(str(i), i % 2) for i in range(50)], [("x", 1)])
    whole, part = read("sst2", tmp_path).train, read("sst2", tmp_path, limit=20).train
    assert part == read("sst2", tmp_path, limit=20).train
    assert len(part) == 20
    assert part.texts[0] == sorted(part.texts[0], key=int)
    assert part.texts[0] != whole.texts[0][:20]
    assert all(
        int(text) % 2 == label for text, label in zip(part.texts[0], part.labels, strict=True)
    )
    assert read("sst2", tmp_path, limit=99).train == whole


def test_the_fingerprint_follows_the_content(tmp_path):
    write_sst2(tmp_path, [("a", 1), ("b", 0)], [("c", 1)])
    first = read("sst2", tmp_path).fingerprint
    assert first == read("sst2", tmp_path).fingerprint
    write_sst2(tmp_path, [("a", 1), ("b", 0)], [("c", 0)])
    assert read("sst2", tmp_path).fingerprint != first


class FakeHub(types.ModuleType):
    def __init__(self, known):
        super().__init__("datasets")
        self.known = known
        self.asked = []

    def load_dataset(self, *name, split):
        self.asked.append((*name, split))
        if name not in self.known:
            raise FileNotFoundError(f"no data set {name}")
        return iter(self.known[name])


@pytest.mark.parametrize("name", TASKS)
def test_hub_rows(monkeypatch, name):
    task = TASKS[name]
    *sources, target = task.hub_columns
    label = {"text": ["a"], "answer_start": [0]}
    if task.kind != "span":
        label = len(task.labels) - 1 if task.kind == CLASSES else 2.5
    row = {**{s: f"text of {s}" for s in sources}, target: label, "idx": 0}
    hub = FakeHub({task.hub: [row]})
    monkeypatch.setitem(sys.modules, "datasets", hub)
    data = read(name, "")
    assert [part for *_, part in hub.asked] == ["train", *task.hub_dev]
    assert data.train.texts == tuple([f"text of {s}"] for s in sources)
    assert set(data.dev) == {suffix for suffix, _ in task.dev}
    wanted = Answers(("a",), (0,)) if task.kind == "span" else label
    assert data.train.labels == [wanted]


def test_hub_out_of_reach(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", FakeHub({}))
    assert "tasks.data" in failure("rte", "")
    monkeypatch.setitem(sys.modules, "datasets", FakeHub({TASKS["rte"].hub: [{"text": "a"}]}))
    assert "sentence1" in failure("rte", "")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'datasets>=3.0'" in failure("rte", "")


HUB_FILES = {
    "on the hub": "{config}/{split}-{shard:05d}-of-00002.parquet",
    "with a hash": "{config}/{split}-{shard:05d}-of-00002-{hash}.parquet",
    "converted": "{config}/{split}/{shard:04d}.parquet",
    "lines": "{config}/{split}.jsonl",
}
"""Layouts in which data sets are published."""


def publish(root, task, layout, hidden=()):
    """A clone of a task's data set, and the texts of its splits; ``hidden`` ones have no labels."""
    *sources, target = task.hub_columns
    label = {"text": ["a"], "answer_start": [0]} if task.kind == "span" else 1
    label = 2.5 if task.kind == "regression" else label
    config = task.hub[1] if len(task.hub) > 1 else "plain_text"
    written = {}
    for split in ("train", *task.hub_dev, *hidden):
        texts = [f"{split} {i}" for i in range(5)]
        value = -1 if split in hidden else label
        rows = [{**dict.fromkeys(sources, t), target: value, "idx": 0} for t in texts]
        parts = [rows] if layout == "lines" else [rows[:3], rows[3:]]
        for shard, part in enumerate(parts):
            name = HUB_FILES[layout].format(
                config=config, split=split, shard=shard, hash="0a1b2c3d4e5f6789"
            )
            file = root / name
            file.parent.mkdir(parents=True, exist_ok=True)
            if layout == "lines":
                file.write_text("".join(f"{json.dumps(row)}\n" for row in part))
            else:
                pq.write_table(pa.Table.from_pylist(part), file)
        written[split] = texts
    (root / "README.md").write_text("---\nlicense: other\n---\n")
    return written


@pytest.mark.parametrize("layout", HUB_FILES)
@pytest.mark.parametrize("name", TASKS)
def test_clones_of_the_hub(tmp_path, name, layout):
    """Shards are read in their order, and no hidden labels or unlabelled texts are."""
    task, in_glue = TASKS[name], len(TASKS[name].hub) > 1
    root = tmp_path / ("glue" if in_glue else name)
    hidden = ("test", "test_matched", "ax") if in_glue else ("unsupervised",)
    written = publish(root, task, layout, hidden)
    for other in TASKS.values() if in_glue else ():  # All of GLUE lies in one clone.
        if len(other.hub) > 1 and other is not task:
            publish(root, other, layout)
    for given in (tmp_path, root, root / name if in_glue else root):
        data = read(name, given)
        assert [*data.train.texts] == [written["train"]] * (len(task.hub_columns) - 1)
        found = [split.texts[0] for split in data.dev.values()]
        assert found == [written[split] for split in task.hub_dev]


@pytest.mark.parametrize("layout", HUB_FILES)
def test_clones_are_read_as_datasets_reads_them(tmp_path, layout):
    datasets = pytest.importorskip("datasets", reason="the extra 'hub'")
    for name in ("sst2", "imdb", "squad", "stsb"):
        publish(tmp_path / name, TASKS[name], layout)
        there = datasets.load_dataset(str(tmp_path / name), cache_dir=str(tmp_path / "cache"))
        data = read(name, tmp_path)
        column = TASKS[name].hub_columns[0]
        assert data.train.texts[0] == list(there["train"][column])
        assert data.dev[""].texts[0] == list(there[TASKS[name].hub_dev[0]][column])


def test_several_configurations_and_splits_of_a_clone(tmp_path):
    root = tmp_path / "sst2"
    for config in ("one", "two"):
        publish(root / config, TASKS["sst2"], "on the hub")
    message = failure("sst2", tmp_path)
    assert f"{root} must hold one configuration of a data set, got one/sst2, two/sst2" in message
    assert f"as in {root}/one/sst2" in message
    (file := root / "one" / "sst2" / "train-00001-of-00002.parquet").write_bytes(b"")
    assert f"{file} must be a parquet file" in failure("sst2", root / "one" / "sst2")


@pytest.mark.shared_data
def test_the_real_files(shared):
    root = str(shared / "glue")
    # wc -l of the files, without headings.
    counts = {"sst2": (67349, 872), "rte": (2490, 277), "stsb": (4249, 1500)}
    for name, (train, dev) in counts.items():
        path = locate(TASKS[name], root)["train"]
        lines = path.read_bytes().count(b"\n") + (not path.read_bytes().endswith(b"\n"))
        data = read(name, root)
        assert lines - len(data.train) == (name != "stsb")
        assert (len(data.train), len(data.dev[""])) == (train, dev)
    scores = read("stsb", root).train.labels
    assert 0 <= min(scores) <= max(scores) == 5
    assert read("rte", root).dev[""].texts[1][0] == "Christopher Reeve had an accident."

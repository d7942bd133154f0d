"""Every remedy that a message names leads out: it is followed to the letter, to the same bytes."""

import os
import re
import shutil

import pytest

from distilcache.data.cache.cache import Cache
from distilcache.data.storage.files import write_json
from distilcache.data.verify.repair import remove_damaged
from distilcache.data.verify.run import Settings, verify_cache
from tests.command_line import make_project, refusal, run
from tests.damage import check, flip_at
from tests.refusals import refused
from tests.stages.teacher_cache.teacher_cache_support import interrupted

SHARD = "shards/r00/shard-000000"


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def exchange(path, old, new):
    path.write_text(path.read_text().replace(old, new, 1))


def read_all(out, build):
    cache = Cache.open(out)
    cache.teacher.check()
    for block in range(cache.num_blocks):
        cache.read_block(block)


def stage_one(out, build):
    build(out)


def delete(*names):
    return lambda out: [(out / name).unlink() for name in names]


def repair(out):
    assert remove_damaged(out, list(verify_cache(out, Settings(workers=1))))


def nothing(out):
    pass


READERS = {
    "frame": (lambda c: flip_at(c / f"{SHARD}.tar"), "verify --repair on the cache, then", repair),
    "tar cut": (lambda c: cut(c / f"{SHARD}.tar"), "verify --repair on the cache, then", repair),
    "tar gone": (lambda c: (c / f"{SHARD}.tar").unlink(), "verify --repair on the cache, then",
                 repair),
    "index": (lambda c: flip_at(c / "index.arrow"), "run distilcache teacher-cache again", nothing),
    "index gone": (lambda c: (c / "index.arrow").unlink(), "run distilcache teacher-cache again",
                   nothing),
    "manifest edited": (lambda c: exchange(c / "manifest.json", '"rounds": 1', '"rounds": 2'),
                        "delete manifest.json and run", delete("manifest.json")),
    "manifest cut": (lambda c: cut(c / "manifest.json"), "delete manifest.json and run",
                     delete("manifest.json")),
    "manifest without a field": (lambda c: write_json(c / "manifest.json", {"schema_version": 2}),
                                 "delete manifest.json and run", delete("manifest.json")),
    "manifest gone": (lambda c: (c / "manifest.json").unlink(), "run the same distilcache teacher-",
                      nothing),
    "weights": (lambda c: flip_at(c / "teacher/model.safetensors"), "verify --repair and teacher-",
                repair),
    "codec": (lambda c: flip_at(c / "teacher/hidden_codec_3.safetensors"), "verify --repair and",
              repair),
    "configuration gone": (lambda c: (c / "teacher/config.json").unlink(), "verify --repair and",
                           repair),
    "tokenizer": (lambda c: flip_at(c / "teacher/tokenizer_config.json"), "verify --repair and",
                  repair),
}  # fmt: skip
"""Damage to a finished cache, what a reader of it is told to do, and that."""
WRITER = {
    "marker": (lambda c: flip_at(c / f"{SHARD}.json"), "delete it and run distilcache teacher-",
               delete(f"{SHARD}.json")),
    "marker cut": (lambda c: cut(c / f"{SHARD}.json"), "delete it and run distilcache teacher-",
                   delete(f"{SHARD}.json")),
    "tar cut": (lambda c: cut(c / f"{SHARD}.tar"), f"delete .*{SHARD}.json and run",
                delete(f"{SHARD}.json")),
    "tar gone": (lambda c: (c / f"{SHARD}.tar").unlink(), f"delete .*{SHARD}.json and run",
                 delete(f"{SHARD}.json")),
    "codec": (lambda c: flip_at(c / "teacher/hidden_codec_3.safetensors"), "delete it and repeat",
              delete("teacher/hidden_codec_3.safetensors")),
    "configuration": (lambda c: cut(c / "teacher/config.json"), "delete the file and repeat",
                      delete("teacher/config.json")),
    "configuration of other types": (
        lambda c: exchange(c / "teacher/config.json", '"gelu"', "false"),
        "delete the file and repeat", delete("teacher/config.json")),
    "configuration of no dtype": (
        lambda c: exchange(c / "teacher/config.json", '"float32"', '"vloat32"'),
        "delete the file and repeat", delete("teacher/config.json")),
    "tokenizer": (lambda c: cut(c / "teacher/tokenizer.json"), "delete it and repeat",
                  delete("teacher/tokenizer.json")),
    "tokenizer's settings": (lambda c: flip_at(c / "teacher/tokenizer_config.json"),
                             "delete it and repeat", delete("teacher/tokenizer_config.json")),
}  # fmt: skip
"""The same for a cache that is not finished, and the command that would finish it."""


@pytest.fixture
def build(build_cache_in, small_corpus, small_teacher):
    return lambda out: build_cache_in(out, small_corpus(), small_teacher)


def followed(damage, command, out, build, whole, tree):
    harm, words, follow = damage
    harm(out)
    text = refused(lambda: command(out, build))
    assert re.search(words, text), text
    follow(out)
    build(out)
    assert tree(out) == tree(whole)
    read_all(out, build)
    assert check(out) == []


@pytest.mark.parametrize("name", READERS)
def test_what_a_reader_of_a_damaged_cache_is_told(small_cache, build, tmp_path, tree, name):
    out = shutil.copytree(small_cache(), tmp_path / "c")
    followed(READERS[name], read_all, out, build, small_cache(), tree)


@pytest.mark.parametrize("name", WRITER)
def test_what_stage_one_says_of_a_damaged_cache(small_cache, build, tmp_path, tree, name):
    out = interrupted(small_cache(), tmp_path)
    followed(WRITER[name], stage_one, out, build, small_cache(), tree)


PROVENANCE = {
    "gone": lambda path: path.unlink(),
    "cut": cut,
    "another object": lambda path: path.write_text('{"identity": []}'),
    "another hash": lambda path: exchange(path, 'fingerprint": "', 'fingerprint": "0'),
}  # fmt: skip


@pytest.mark.parametrize("name", PROVENANCE)
@pytest.mark.parametrize("finished", [True, False])
def test_shards_tell_what_a_lost_provenance_was(
    small_cache, build, build_cache_in, small_corpus, small_teacher, tmp_path, tree, name, finished
):
    """Hours of shards are not lost with one small file; nor are they taken for another cache."""
    whole = small_cache()
    out = shutil.copytree(whole, tmp_path / "c") if finished else interrupted(whole, tmp_path)
    PROVENANCE[name](out / "provenance.json")
    before = tree(out)
    text = refused(lambda: build_cache_in(out, small_corpus(), small_teacher, top_k=3))
    assert "restore it from a copy" in text or "got differing fields" in text
    assert tree(out) == before
    build(out)
    assert tree(out) == tree(whole)


def test_a_damaged_corpus_is_made_again(small_corpus, small_teacher, tmp_path, tree):
    recipe = make_project(tmp_path, small_corpus(), small_teacher)
    corpus, whole = tmp_path / "p" / "corpus", tree(small_corpus())

    def told():
        line = refusal(run("teacher-cache", "--recipe", recipe))
        assert str(corpus) in line
        return line

    for harm in (
        lambda: flip_at(corpus / "train" / "part-000000.arrow", 2 / 3),
        lambda: (corpus / "train" / "part-000000.arrow").unlink(),
        lambda: flip_at(corpus / "token_counts.arrow", 0.6),
        lambda: cut(corpus / "manifest.json"),
        lambda: exchange(corpus / "manifest.json", '"packing"', '"pucking"'),
    ):
        harm()
        assert "delete the corpus folder and run distilcache corpus" in told()
        shutil.rmtree(corpus)
        assert run("corpus", "--recipe", recipe).exit_code == 0
        assert tree(corpus) == whole
    flip_at(corpus / "tokenizer" / "tokenizer_config.json")
    assert "restore it, or make the corpus anew" in told()
    shutil.copytree(small_corpus() / "tokenizer", corpus / "tokenizer", dirs_exist_ok=True)
    assert run("teacher-cache", "--recipe", recipe).exit_code == 0

"""What is damaged or exchanged while a cache is built: named or put right, never built upon."""

import errno
import json
import shutil

import pytest

from distilcache.data.cache.cache import Cache
from distilcache.data.cache.manifest import CacheManifest, finish_cache
from distilcache.data.cache.shards import shard_path
from distilcache.data.errors import UserError
from distilcache.data.storage.files import sha256_file, write_json
from distilcache.data.verify.repair import remove_damaged
from distilcache.data.verify.run import Settings, verify_cache
from tests.damage import check, flip, flip_at
from tests.stages.teacher_cache.teacher_cache_support import interrupted, one_line


def test_a_damaged_configuration_is_named_and_saved_again(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree
):
    out = interrupted(small_cache(), tmp_path)
    (out / "teacher" / "config.json").write_text('{"model_type": "be')
    with pytest.raises(UserError, match="config.json must be .* delete the file") as caught:
        build_cache_in(out, small_corpus(), small_teacher)
    one_line(caught)
    (out / "teacher" / "config.json").unlink()
    build_cache_in(out, small_corpus(), small_teacher)
    assert tree(out) == tree(small_cache())


@pytest.mark.parametrize("damage", ["a bit", "half", "nothing left"])
def test_weights_that_are_damaged_before_the_manifest_are_put_right(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree, damage
):
    """A manifest that is written after them would vouch for the damage."""
    out = interrupted(small_cache(), tmp_path)
    path = out / "teacher" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-2000] ^= 1
    left = {"a bit": len(content), "half": len(content) // 2, "nothing left": 0}[damage]
    path.write_bytes(content[:left])
    build_cache_in(out, small_corpus(), small_teacher)
    assert tree(out) == tree(small_cache())


def test_a_manifest_vouches_for_no_damage(small_cache, tmp_path):
    """What decides the content says what the weights and codecs are, not what lies there."""
    out = shutil.copytree(small_cache(), tmp_path / "c")
    old = Cache.open(out).manifest
    markers = [json.loads(p.read_text()) for p in sorted(out.glob("shards/*/*.json"))]
    known = {"encoding": old.encoding, "head": old.head, "provenance": old.provenance, "rounds": 1}
    (out / "teacher" / ".half.tmp").write_bytes(b"of another run")
    finish_cache(out, markers, **known)
    assert Cache.open(out).manifest == old
    for name in ("model.safetensors", "hidden_codec_3.safetensors"):
        path = out / "teacher" / name
        flip(path, -8)
        with pytest.raises(UserError, match=f"{name} must have sha256 .* delete it and repeat"):
            finish_cache(out, markers, **known)
        # Nor is one believed that was written by a version that did.
        values = old.to_dict()
        values["teacher_files"] = {**old.teacher_files, name: sha256_file(path)}
        sealed = CacheManifest(**{**values, "encoding": old.encoding, "head": old.head}).seal()
        write_json(out / "manifest.json", sealed.to_dict())
        assert any(f"{name} must have sha256" in text for text in check(out))
        flip(path, -8)


def test_a_codec_that_is_damaged_before_the_manifest_is_refused(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree
):
    """Shards written from then on would be read with one codec or the other."""
    out = interrupted(small_cache(), tmp_path)
    path = out / "teacher" / "hidden_codec_3.safetensors"
    flip_at(path, 2 / 3)
    before = tree(out)
    with pytest.raises(UserError, match="must be the codec that the shards were written with"):
        build_cache_in(out, small_corpus(), small_teacher)
    assert tree(out) == before
    path.unlink()
    build_cache_in(out, small_corpus(), small_teacher)
    assert tree(out) == tree(small_cache())


def test_the_size_of_a_pass_decides_no_codec(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path
):
    """It is no part of the identity, so a lost codec must come out the same."""
    out = build_cache_in(tmp_path / "c", small_corpus(), small_teacher, row_chunk=7)
    name = "teacher/hidden_codec_3.safetensors"
    assert (out / name).read_bytes() == (small_cache() / name).read_bytes()


@pytest.mark.parametrize("content", ["", "{}", "half"])
def test_a_copy_of_the_tokenizer_that_is_damaged_is_named(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree, content
):
    out = interrupted(small_cache(), tmp_path)
    path = out / "teacher" / "tokenizer.json"
    text = path.read_text()
    path.write_text(text[: len(text) // 2] if content == "half" else content)
    with pytest.raises(UserError, match="tokenizer.json must be .* delete it and repeat"):
        build_cache_in(out, small_corpus(), small_teacher)
    path.unlink()
    build_cache_in(out, small_corpus(), small_teacher)
    assert tree(out) == tree(small_cache())


@pytest.mark.parametrize("damage", ["a bit", "gone"])
def test_a_tokenizer_is_what_the_corpus_was_made_with_to_the_last_file(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree, damage
):
    """Students are exported with it, long after a manifest has vouched for it."""
    corpus = shutil.copytree(small_corpus(), tmp_path / "corpus")
    for folder in (corpus / "tokenizer", interrupted(small_cache(), tmp_path) / "teacher"):
        path, out = folder / "tokenizer_config.json", tmp_path / "new"
        content = path.read_bytes()
        if folder.name == "teacher":
            out = folder.parent
        if damage == "a bit":
            flip_at(path)
        else:
            path.unlink()
        if damage == "a bit" or folder.name == "tokenizer":
            with pytest.raises(UserError, match="tokenizer_config.json must have sha256") as caught:
                build_cache_in(out, corpus, small_teacher)
            one_line(caught)
            assert not (out / "manifest.json").exists()
            if folder.name == "tokenizer":
                path.write_bytes(content)  # "restore it"
            else:
                path.unlink()  # "delete it and repeat the command"
        build_cache_in(out, corpus, small_teacher)
        assert tree(out) == tree(small_cache())


@pytest.mark.parametrize("listed", [True, False])
def test_what_else_lies_beside_a_corpus_tokenizer_is_left_there(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree, listed
):
    """As desktops and notebooks leave it. Corpora of version 0.2.0 do not list their files."""
    corpus = shutil.copytree(small_corpus(), tmp_path / "corpus")
    for name in (".ipynb_checkpoints", "backup"):
        (corpus / "tokenizer" / name).mkdir()
    for name in (".DS_Store", "notes.txt") if listed else (".DS_Store",):
        (corpus / "tokenizer" / name).write_text("x")
    if not listed:
        path = corpus / "manifest.json"
        values = json.loads(path.read_text())
        del values["tokenizer_files"]
        path.write_text(json.dumps(values))
    out = build_cache_in(tmp_path / "c", corpus, small_teacher)
    assert tree(out) == tree(small_cache())
    (out / "manifest.json").unlink()
    before = (out / "teacher" / "model.safetensors").stat().st_ino
    build_cache_in(out, corpus, small_teacher)
    assert (out / "teacher" / "model.safetensors").stat().st_ino == before
    assert tree(out) == tree(small_cache())


def test_a_tokenizer_that_is_there_is_not_staged_again(
    build_cache_in, small_corpus, small_teacher, tmp_path, monkeypatch
):
    """Of a mask-only cache it is all; unlocked, several processes took each other's away."""
    out = build_cache_in(tmp_path / "c", small_corpus(), small_teacher, mask_only=True)

    def staged(*_):
        raise AssertionError("is there")

    with monkeypatch.context() as patched:
        patched.setattr("distilcache.stages.teacher_cache.phases.stage_teacher", staged)
        build_cache_in(out, small_corpus(), small_teacher, mask_only=True, rounds=2)
    assert Cache.open(out).manifest.rounds == 2
    (out / "teacher" / "tokenizer_config.json").unlink()
    (out / "manifest.json").unlink()
    build_cache_in(out, small_corpus(), small_teacher, mask_only=True, rounds=2)
    assert check(out) == []


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json", "model.safetensors"])
def test_a_new_manifest_vouches_for_no_damage_since_the_old_one(
    sound_pair, build_cache_in, small_corpus, small_teacher, tmp_path, tree, name
):
    """Rounds are added, or what is missing is made again."""
    one, two = sound_pair
    for out, lost in ((shutil.copytree(one, tmp_path / "one"), ""),
                      (shutil.copytree(two, tmp_path / "two"), "index.arrow")):  # fmt: skip
        flip_at(out / "teacher" / name)
        if lost:
            (out / lost).unlink()
        with pytest.raises(UserError, match=f"{name} must have sha256 .* verify --repair"):
            build_cache_in(out, small_corpus(), small_teacher, rounds=2)
        remove_damaged(out, list(verify_cache(out, Settings(workers=1))))
        build_cache_in(out, small_corpus(), small_teacher, rounds=2)
        assert tree(out) == tree(two)


@pytest.fixture
def sound_pair(small_cache):
    """The same cache with one round, and with two."""
    return small_cache(), small_cache(rounds=2)


def test_a_damaged_corpus_is_refused(build_cache_in, small_corpus, small_teacher, tmp_path):
    corpus = shutil.copytree(small_corpus(), tmp_path / "corpus")
    flip_at(corpus / "train" / "part-000000.arrow", 2 / 3)
    with pytest.raises(UserError, match="part-000000.arrow must have sha256 .* damaged"):
        build_cache_in(tmp_path / "c", corpus, small_teacher)
    assert not list((tmp_path / "c").glob("shards/*/*"))


def test_a_full_disk_at_the_end(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree, monkeypatch
):
    out = interrupted(small_cache(), tmp_path)

    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("distilcache.data.cache.manifest.tempfile.TemporaryFile", full)
        with pytest.raises(UserError, match="index.arrow must be writable, got: No space left"):
            build_cache_in(out, small_corpus(), small_teacher)
    build_cache_in(out, small_corpus(), small_teacher)
    assert tree(out) == tree(small_cache())


def test_a_shard_in_the_place_of_another_is_refused(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree
):
    """It would come twice in every epoch, and the other never."""
    out = interrupted(small_cache(), tmp_path)
    copies = [shard_path(out, 0, 1).with_suffix(suffix) for suffix in (".tar", ".json")]
    for copy in copies:
        shutil.copy(shard_path(out, 0, 0).with_suffix(copy.suffix), copy)
    with pytest.raises(UserError, match="must be of its own shard, got round 0 shard 0"):
        build_cache_in(out, small_corpus(), small_teacher)
    for copy in copies:
        copy.unlink()
    build_cache_in(out, small_corpus(), small_teacher)
    assert tree(out) == tree(small_cache())

"""What is damaged or exchanged while a cache is built: named or put right, never built upon."""

import errno
import json
import shutil

import pytest

from data.cache import Cache
from data.errors import UserError
from data.files import sha256_file, write_json
from data.manifest import CacheManifest, finish_cache
from data.masking import MaskingConfig
from data.shards import shard_path
from data.verify import Settings, verify_cache
from stages.teacher_cache import run as stage
from stages.teacher_cache.config import CacheConfig


def interrupted(whole, tmp_path):
    """A copy of a finished cache as it was before its second shard."""
    out = shutil.copytree(whole, tmp_path / "c")
    (out / "manifest.json").unlink()
    shard_path(out, 0, 1).with_suffix(".json").unlink()
    return out


def flip(path):
    """Change a bit of a file near its end."""
    content = bytearray(path.read_bytes())
    content[-len(content) // 3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("finished", [True, False])
def test_the_same_weights_in_another_configuration_are_another_teacher(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree, finished
):
    """The hash of the weights does not know of heads, activation and epsilon."""
    out = shutil.copytree(small_cache(), tmp_path / "c")
    if not finished:
        (out / "manifest.json").unlink()
        shard_path(out, 0, 1).with_suffix(".json").unlink()
    other = shutil.copytree(small_teacher, tmp_path / "teacher")
    config = json.loads((other / "config.json").read_text())
    # What says nothing of the outputs may differ.
    config |= {"id2label": {"0": "no", "1": "yes"}, "transformers_version": "4.0.0"}
    (other / "config.json").write_text(json.dumps(config))
    copy = shutil.copytree(out, tmp_path / "copy")
    build_cache_in(copy, small_corpus(), other)
    assert tree(copy) == tree(small_cache())
    config |= {"num_attention_heads": 4, "hidden_act": "gelu_new"}
    (other / "config.json").write_text(json.dumps(config))
    before = tree(out)
    with pytest.raises(UserError, match="cache: .* got differing fields") as caught:
        build_cache_in(out, small_corpus(), other)
    text = str(caught.value)
    assert "\n" not in text
    assert "teacher.config.num_attention_heads was 2, now 4" in text
    assert "teacher.config.hidden_act was gelu, now gelu_new" in text
    assert tree(out) == before


def test_a_damaged_configuration_is_named_and_saved_again(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree
):
    out = interrupted(small_cache(), tmp_path)
    (out / "teacher" / "config.json").write_text('{"model_type": "be')
    with pytest.raises(UserError, match="config.json must be .* delete the file") as caught:
        build_cache_in(out, small_corpus(), small_teacher)
    assert "\n" not in str(caught.value)
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
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UserError, match=f"{name} must have sha256 .* delete it and repeat"):
            finish_cache(out, markers, **known)
        # Nor is one believed that was written by a version that did.
        values = old.to_dict()
        values["teacher_files"] = {**old.teacher_files, name: sha256_file(path)}
        sealed = CacheManifest(**{**values, "encoding": old.encoding, "head": old.head}).seal()
        write_json(out / "manifest.json", sealed.to_dict())
        faults = [fault.text for fault in verify_cache(out, Settings(workers=1))]
        assert any(f"{name} must have sha256" in text for text in faults)
        path.write_bytes(content)


def test_workers_refuse_other_weights(small_cache, small_corpus, tmp_path):
    out = shutil.copytree(small_cache(), tmp_path / "c")
    build = stage.Build(
        corpus_dir=small_corpus(),
        out=out,
        teacher="teacher",
        masking=MaskingConfig(probability=0.3),
        config=CacheConfig(blocks_per_shard=2, calibration_sequences=24),
        device="cpu",
    )
    assert stage.open_job(build).teacher is not None
    path = out / "teacher" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="must be the teacher that the cache was begun with"):
        stage.open_job(build)


def test_a_codec_that_is_damaged_before_the_manifest_is_refused(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree
):
    """Shards written from then on would be read with one codec or the other."""
    out = interrupted(small_cache(), tmp_path)
    path = out / "teacher" / "hidden_codec_3.safetensors"
    flip(path)
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


@pytest.mark.parametrize("mask_only", [False, True])
def test_a_corpus_with_another_tokenizer_is_refused(
    build_cache_in, small_corpus, small_teacher, tmp_path, mask_only
):
    """Students would read its ids as other words; nothing else holds the file."""
    corpus = shutil.copytree(small_corpus(), tmp_path / "corpus")
    path = corpus / "tokenizer" / "tokenizer.json"
    state = json.loads(path.read_text())
    ids = state["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match="must be the tokenizer that the corpus was made with"):
        build_cache_in(tmp_path / "c", corpus, small_teacher, mask_only=mask_only)
    assert not (tmp_path / "c").exists()


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


def test_a_damaged_corpus_is_refused(build_cache_in, small_corpus, small_teacher, tmp_path):
    corpus = shutil.copytree(small_corpus(), tmp_path / "corpus")
    flip(corpus / "train" / "part-000000.arrow")
    with pytest.raises(UserError, match="part-000000.arrow must have sha256 .* damaged"):
        build_cache_in(tmp_path / "c", corpus, small_teacher)
    assert not list((tmp_path / "c").glob("shards/*/*"))


def test_residuals_want_the_last_layer(build_cache_in, small_corpus, small_teacher, tmp_path):
    settings = {"residual_samples": 4, "hidden_layers": (1,)}
    with pytest.raises(UserError, match="hidden_layers must hold the last layer"):
        build_cache_in(tmp_path / "c", small_corpus(), small_teacher, **settings)
    assert not (tmp_path / "c").exists()


def test_a_full_disk_at_the_end(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree, monkeypatch
):
    out = interrupted(small_cache(), tmp_path)

    def full(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("data.manifest.tempfile.TemporaryFile", full)
        with pytest.raises(UserError, match="index.arrow must be writable, got: No space left"):
            build_cache_in(out, small_corpus(), small_teacher)
    build_cache_in(out, small_corpus(), small_teacher)
    assert tree(out) == tree(small_cache())


def test_a_block_that_nobody_could_read_is_not_written(
    build_cache_in, small_corpus, small_teacher, tmp_path, monkeypatch
):
    monkeypatch.setattr("data.schema.MAX_BLOCK_BYTES", 20_000)
    settings = {"positions": "all", "hidden_dtype": "float32"}
    with pytest.raises(UserError, match="block must be at most 20000 bytes .*block_sequences"):
        build_cache_in(tmp_path / "c", small_corpus(), small_teacher, **settings)
    assert not list((tmp_path / "c").glob("shards/*/*"))


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


def test_special_tokens_with_other_roles_are_refused(
    build_cache_in, small_corpus, small_teacher, tmp_path
):
    """The vocabulary is the same, and masks are not what the teacher takes for a mask."""
    other = shutil.copytree(small_teacher, tmp_path / "teacher")
    path = other / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mask_token": "[UNK]"}))
    with pytest.raises(UserError, match="tokenizer must have the special ids .*'mask': 4") as error:
        build_cache_in(tmp_path / "c", small_corpus(), other)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "c").exists()

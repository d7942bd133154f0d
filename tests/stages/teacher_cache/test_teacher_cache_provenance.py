"""Whose cache a folder holds: what was made otherwise is named and left alone."""

import json
import shutil

import pytest
import torch
from transformers import BertForMaskedLM

from distilcache.data.errors import UserError
from distilcache.stages.models.checkpoints import configuration
from distilcache.stages.teacher_cache.provenance import check_configuration
from tests.stages.teacher_cache.teacher_cache_support import interrupted, one_line, stamps


def test_another_provenance_lists_the_differing_fields(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path
):
    out = shutil.copytree(small_cache(), tmp_path / "c")
    before = stamps(out)
    with pytest.raises(UserError, match="cache: .* got differing fields") as caught:
        build_cache_in(
            out, small_corpus(), small_teacher, masking={"seed": 5}, top_k=3, temperatures=(4.0,)
        )
    text = one_line(caught)
    for part in ("cache.temperatures was [2.0], now [4.0]", "cache.top_k was 8, now 3",
                 "masking.seed was 0, now 5", "use another name or root"):  # fmt: skip
        assert part in text
    assert "positions" not in text
    with pytest.raises(UserError, match="corpus_fingerprint was .*, now") as caught:
        build_cache_in(out, small_corpus(seed=1), small_teacher)
    assert "tokenizer_sha256" not in one_line(caught)
    assert stamps(out) == before


def test_another_teacher_is_another_provenance(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path
):
    model = BertForMaskedLM.from_pretrained(small_teacher)
    with torch.no_grad():
        model.cls.predictions.bias[3] += 0.5
    other = shutil.copytree(small_teacher, tmp_path / "teacher")
    model.save_pretrained(other)
    out = shutil.copytree(small_cache(), tmp_path / "c")
    with pytest.raises(UserError, match="teacher_sha256 was .*, now"):
        build_cache_in(out, small_corpus(), other)


@pytest.mark.parametrize("finished", [True, False])
def test_the_same_weights_in_another_configuration_are_another_teacher(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree, finished
):
    """The hash of the weights does not know of heads, activation and epsilon."""
    if finished:
        out = shutil.copytree(small_cache(), tmp_path / "c")
    else:
        out = interrupted(small_cache(), tmp_path)
    other = shutil.copytree(small_teacher, tmp_path / "teacher")
    config = json.loads((other / "config.json").read_text())
    # What says nothing of the outputs may differ.
    config |= {"id2label": {"0": "no", "1": "yes"}, "transformers_version": "4.0.0"}
    (other / "config.json").write_text(json.dumps(config))
    copy = shutil.copytree(out, tmp_path / "copy")
    build_cache_in(copy, small_corpus(), other)
    assert tree(copy) == tree(small_cache())
    # A cache of before requests for other outputs, and names of code, were left out.
    asked = out / "teacher" / "config.json"
    more = {"output_hidden_states": True, "auto_map": {"AutoConfig": "own.OwnConfig"}}
    asked.write_text(json.dumps(json.loads(asked.read_text()) | more))
    check_configuration(out, configuration(small_teacher, "teacher"))
    config |= {"num_attention_heads": 4, "hidden_act": "gelu_new"}
    (other / "config.json").write_text(json.dumps(config))
    before = tree(out)
    with pytest.raises(UserError, match="cache: .* got differing fields") as caught:
        build_cache_in(out, small_corpus(), other)
    text = one_line(caught)
    assert "teacher.config.num_attention_heads was 2, now 4" in text
    assert "teacher.config.hidden_act was gelu, now gelu_new" in text
    assert tree(out) == before


def test_a_folder_with_other_files_is_left_alone(
    build_cache_in, small_corpus, small_teacher, tmp_path
):
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / ".notes.tmp").write_text("more")
    with pytest.raises(UserError, match="must be empty or a teacher cache, got other files"):
        build_cache_in(tmp_path, small_corpus(), small_teacher)
    assert {p.name for p in tmp_path.iterdir()} == {"thesis.txt", ".notes.tmp"}
    (tmp_path / "thesis.txt").unlink()  # moved away, as it says
    build_cache_in(tmp_path, small_corpus(), small_teacher)


def test_an_edited_manifest_is_not_built_upon(
    small_cache, build_cache_in, small_corpus, small_teacher, tmp_path, tree
):
    out = shutil.copytree(small_cache(), tmp_path / "c")
    path = out / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rounds": 9}))
    with pytest.raises(UserError, match="manifest must carry its own sha256"):
        build_cache_in(out, small_corpus(), small_teacher)
    path.unlink()  # as the message says
    build_cache_in(out, small_corpus(), small_teacher)
    assert tree(out) == tree(small_cache())

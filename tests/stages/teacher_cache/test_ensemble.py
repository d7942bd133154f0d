"""Several teachers in one cache: what is stored is the dense average of their own softmaxes."""

import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForMaskedLM, AutoTokenizer

from distilcache.data.cache.cache import Cache
from distilcache.data.codecs.logits import unpack
from distilcache.data.errors import UserError
from distilcache.pipeline.cli import main
from distilcache.pipeline.flow import distill
from distilcache.pipeline.recipe import load_recipe
from distilcache.stages.models.wordpiece import train_wordpiece
from distilcache.stages.student_train.config import StudentConfig, TrainConfig
from distilcache.stages.student_train.run import train_student
from distilcache.stages.teacher_cache.config import EngineConfig
from distilcache.stages.verify.rerun import RerunSettings, rerun
from tests.builders import run_stage_one
from tests.command_line import make_project
from tests.damage import check
from tests.stages.models.families_support import make_model, save_with_tokenizer

V, K, R = 120, 7, 16
LINES = {"packing": "lines", "max_length": 24}
STORED = {"hidden_dtype": "none", "logits_dtype": "float32", "top_k": K, "tail_samples": R}
TEMPERATURES = (2.0, 4.0)


@pytest.fixture(scope="module")
def others(tmp_path_factory, small_tokenizer):
    """Teachers of other families, depths and widths, with the tokenizer of the first one."""
    folder = tmp_path_factory.mktemp("members")
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer)
    second = make_model("distilbert", V, layers=2, dim=16, hidden_dim=24)
    third = make_model("electra", V, layers=1)
    return [
        save_with_tokenizer(second, tokenizer, folder / "second"),
        save_with_tokenizer(third, tokenizer, folder / "third"),
    ]


@pytest.fixture
def build(small_corpus, small_teacher, others):
    """``build(out, members=..., engine=..., corpus={...}, ...)``: stage one with the ensemble."""

    def make(out, members=None, engine=None, corpus=None, **settings):
        return run_stage_one(
            out,
            small_corpus(**(corpus or {})),
            small_teacher,
            ensemble=others[:1] if members is None else members,
            engine=engine,
            **{"blocks_per_shard": 2, **STORED, **settings},
        )

    return make


@torch.no_grad()
def probabilities(models, block):
    """Each model's own softmax at the masked positions of a block, float64 [M, N, V].

    Sequences run one at a time and without padding.
    """
    rows, start, at = [], 0, 0
    lengths, counts = block["lengths"].tolist(), block["masked_counts"].tolist()
    for length, count in zip(lengths, counts, strict=True):
        ids = torch.from_numpy(block["input_ids"][start : start + length].astype(np.int64))[None]
        masked = block["masked_positions"][at : at + count].astype(np.int64)
        logits = [model(ids).logits[0, masked].double() for model in models]
        rows.append(torch.stack(logits).softmax(-1))
        start, at = start + length, at + count
    return torch.cat(rows, 1)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("corpus", [{}, LINES], ids=["unpadded", "padded"])
def test_what_is_stored_is_the_mean_of_the_probabilities(
    build, small_teacher, others, tmp_path, corpus, count
):
    members = others[: count - 1]
    settings = {"temperatures": TEMPERATURES, "batch_tokens": 100, "row_chunk": 13}
    cache = Cache.open(build(tmp_path / "c", members, corpus=corpus, **settings))
    models = [AutoModelForMaskedLM.from_pretrained(p).eval() for p in (small_teacher, *members)]
    assert cache.encoding.hidden == ()
    for number in range(0, cache.num_blocks, 3):
        block = cache.read_block(number)
        each_MNV = probabilities(models, block)
        log_p_NV = each_MNV.mean(0).log()
        stored = unpack(block, K, 3)
        ids_NK = torch.from_numpy(stored.ids.astype(np.int64))
        values_NK = log_p_NV.gather(-1, ids_NK)
        np.testing.assert_allclose(stored.values, values_NK, rtol=0, atol=1e-5)
        np.testing.assert_allclose(stored.values, log_p_NV.topk(K).values, rtol=0, atol=1e-5)
        for column, temperature in enumerate((1.0, *TEMPERATURES)):
            softened_NV = (log_p_NV / temperature).softmax(-1)
            odds_N = softened_NV.gather(-1, ids_NK).sum(-1).logit()
            np.testing.assert_allclose(stored.log_odds[:, column], odds_N, rtol=0, atol=1e-5)
            # Neither the members alone nor other ways to average them would pass.
            flat_NV = each_MNV.log().mean(0).softmax(-1)
            for wrong_NV in (each_MNV[0], flat_NV):
                wrong_N = (wrong_NV.log() / temperature).softmax(-1).gather(-1, ids_NK).sum(-1)
                assert (wrong_N.logit() - odds_N).abs().max() > 1e-2
        # Systematic draws: each token as often as is due to it, to within one.
        softened_NV = (log_p_NV / TEMPERATURES[0]).softmax(-1).scatter(-1, ids_NK, 0.0)
        due_NV = R * softened_NV / softened_NV.sum(-1, keepdim=True)
        drawn_NR = torch.from_numpy(stored.tail_ids.astype(np.int64))
        ones_NR = torch.ones_like(drawn_NR, dtype=torch.float64)
        found_NV = torch.zeros_like(due_NV).scatter_add(1, drawn_NR, ones_NR)
        assert (found_NV - due_NV).abs().max() < 1 + 1e-3


def test_a_cache_of_an_ensemble_says_so(build, small_teacher, others, tmp_path):
    cache = Cache.open(build(tmp_path / "c", others))
    provenance = cache.manifest.provenance
    hashes = provenance["identity"]["ensemble_sha256"]
    assert len(set(hashes)) == 2
    assert provenance["environment"]["ensemble"] == [str(path) for path in others]
    assert cache.manifest.head is None
    with pytest.raises(UserError, match="one of an ensemble"):
        cache.teacher.lm_head()
    first = AutoModelForMaskedLM.from_pretrained(cache.teacher_dir).state_dict()
    given = AutoModelForMaskedLM.from_pretrained(small_teacher).state_dict()
    assert all(torch.equal(first[name], given[name]) for name in given)
    assert check(cache.path) == []
    with pytest.raises(UserError, match="an ensemble of 3") as error:
        rerun(cache, RerunSettings(device="cpu"))
    assert "\n" not in str(error.value)
    result = CliRunner().invoke(main, ["verify", str(cache.path), "--rerun", "2"])
    assert result.exit_code == 2
    assert "leave it out" in result.output


def test_a_cache_of_one_teacher_is_as_it_was(small_cache):
    """Caches that are there keep their identity."""
    provenance = json.loads((small_cache() / "provenance.json").read_text())
    assert "ensemble_sha256" not in provenance["identity"]
    assert "ensemble" not in provenance["environment"]


def test_members_must_have_one_vocabulary(build, small_tokenizer, others, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(small_tokenizer)
    larger = make_model("electra", V + 8, layers=1)
    larger = save_with_tokenizer(larger, tokenizer, tmp_path / "larger")
    with pytest.raises(UserError, match=f"{V} tokens .* and {V + 8} in .*larger") as error:
        build(tmp_path / "c", [larger])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "c").exists()


def test_members_must_have_one_tokenizer(build, small_tokenizer, others, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(others[0], folder)
    words = ["some other words", "of no teacher"]
    train_wordpiece(words, len(AutoTokenizer.from_pretrained(small_tokenizer))).save_pretrained(
        folder
    )
    with pytest.raises(UserError, match="tokenizer must be .*other") as error:
        build(tmp_path / "c", [folder])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "c").exists()


def test_hidden_states_are_refused(build, tmp_path):
    for kind in ("coded", "float16", "float32"):
        with pytest.raises(UserError, match="hidden_dtype must be 'none'.*alpha_cos=0") as error:
            build(tmp_path / "c", hidden_dtype=kind)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "c").exists()


def test_recipes():
    one = ["teacher.model=a", "teacher.ensemble=b", "cache.hidden_dtype=none"]
    assert load_recipe(None, one).teacher.ensemble == ("b",)
    assert load_recipe(None, ["teacher.ensemble=['b', 'c']", *one[::2]]).teacher.ensemble == (
        "b",
        "c",
    )
    with pytest.raises(UserError, match="hidden_dtype must be 'none'"):
        load_recipe(None, one[:2])
    with pytest.raises(UserError, match="model must name the first checkpoint"):
        load_recipe(None, one[1:])
    load_recipe(None, [*one[:2], "cache.mask_only=true"])


def test_another_member_is_refused(build, others, tmp_path):
    out = build(tmp_path / "c", others)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    for members in (others[:1], others[::-1], [others[1], others[1]], []):
        with pytest.raises(UserError, match="differing fields: ensemble_sha256") as error:
            build(out, members, rounds=2)
        assert "\n" not in str(error.value)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_a_member_whose_weights_changed_is_refused(build, others, tmp_path):
    out = build(tmp_path / "c")
    member = shutil.copytree(others[0], tmp_path / "member")
    build(out, [member], rounds=2)
    model = AutoModelForMaskedLM.from_pretrained(member)
    with torch.no_grad():
        next(iter(model.parameters()))[0, 0] += 1e-6
    model.save_pretrained(member)
    with pytest.raises(UserError, match="differing fields: ensemble_sha256"):
        build(out, [member], rounds=3)


def test_a_member_with_another_configuration_is_refused(build, others, tmp_path):
    """The same weights with another activation say something else."""
    out = build(tmp_path / "c")
    member = shutil.copytree(others[0], tmp_path / "member")
    build(out, [member], rounds=2)
    config = json.loads((member / "config.json").read_text())
    (member / "config.json").write_text(json.dumps(config | {"activation": "relu"}))
    with pytest.raises(UserError, match="differing fields: ensemble_sha256"):
        build(out, [member], rounds=3)


def test_interrupted_and_local_runs_give_the_same_bytes(build, tmp_path, tree):
    whole = build(tmp_path / "whole", rounds=2)
    local = EngineConfig(name="local", workers=2)
    out = build(tmp_path / "c", rounds=1)
    shutil.rmtree(out / "shards" / "r00")
    (out / "manifest.json").unlink()
    assert tree(build(out, rounds=2, engine=local)) == tree(whole)


@pytest.fixture
def recipe(small_corpus, small_teacher, others, tmp_path):
    """A whole project with two teachers."""
    path = make_project(
        tmp_path,
        small_corpus(),
        small_teacher,
        teacher={"ensemble": [str(others[0])]},
        cache={"hidden_dtype": "none", "tail_samples": 8, "blocks_per_shard": 2},
        student={"sizes": ["2x32"]},
        train={
            "signal": "sparse",
            "alpha_cos": 0.0,
            "alpha_mlm": 0.0,
            "steps": 30,
            "batch_size": 16,
            "lr": 3e-3,
            "logging_steps": 2,
        },
        evaluate={"sequences": 8, "latency_repeats": 1},
    )
    return load_recipe(path)


def test_a_student_learns_from_two_teachers(recipe, tmp_path):
    result = distill(recipe)
    names = [(model["name"], model["role"]) for model in result["models"]]
    assert names == [("teacher-1-of-2", "teacher"), ("2x32", "student")]
    lines = (tmp_path / "p" / "students" / "2x32" / "metrics.jsonl").read_text().splitlines()
    ce = [json.loads(line)["ce"] for line in lines]
    assert sum(ce[-2:]) < 0.95 * sum(ce[:2])
    card = (recipe.home / "students" / "2x32" / "README.md").read_text()
    assert "signals of 2 teachers, averaged, the first (BERT, 3 layers x 32)" in card


@pytest.mark.parametrize(
    ("asked", "message"),
    [({"signal": "replay", "alpha_cos": 0.0}, "signal must be 'sparse'"),
     ({"signal": "replay+topk", "alpha_cos": 0.0}, "signal must be 'sparse'"),
     ({"signal": "sparse", "alpha_cos": 1.0}, "alpha_cos must be 0")],
)  # fmt: skip
def test_students_that_would_replay_are_told(build, tmp_path, asked, message):
    with pytest.raises(UserError, match=message):
        train_student(
            cache_dir=build(tmp_path / "c"),
            out=tmp_path / "s",
            size="2x32",
            student=StudentConfig(sizes=("2x32",)),
            train=TrainConfig(steps=2, **asked),
            device="cpu",
        )

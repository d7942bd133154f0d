"""The live teacher through the product's code path, and all arms."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForMaskedLM

from benchmarks.arms import CACHES, Arm, Plan, check_batches, prepare, run_arm, train_arm
from benchmarks.comparison_summary import QUALITY
from benchmarks.live import LiveBatches, LiveTeacher
from benchmarks.offline_equals_online import COMPARISON, main
from distilcache.data.cache.cache import Cache
from distilcache.data.errors import UserError
from distilcache.data.loader.dataset import CachedBatches
from distilcache.stages.student_train import vocabulary
from distilcache.stages.teacher_cache.teacher import load_teacher

ARMS = {arm.name: arm for arm in COMPARISON.arms}


@pytest.fixture(scope="module")
def texts(small_corpus):
    """Training and held-out text, a document per paragraph."""
    return [small_corpus(seed=seed).parent / "text.txt" for seed in (0, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Work folder that the tests of this module share, for its caches."""
    return tmp_path_factory.mktemp("offline_equals_online")


@pytest.fixture
def plan(folder, texts, small_teacher):
    return Plan(
        out=folder,
        teacher=small_teacher,
        text=texts[0],
        heldout=texts[1],
        size="2x32",
        steps=6,
        batch_size=6,
        max_length=16,
        max_bytes=10**6,
        block_sequences=8,
        heldout_sequences=16,
        logging_steps=1,
        lr=3e-3,
        device="cpu",
        dtype="float32",
    )


def curve(path, name="loss"):
    return [json.loads(line)[name] for line in (path / "metrics.jsonl").read_text().splitlines()]


def trained(plan, arm, path, seed=0):
    train_arm(plan, arm, seed, prepare(plan, arm.cache), path)
    return path


@pytest.mark.parametrize(
    ("live", "positions"), [("a", "masked"), ("a_all", "all"), ("a_sampled", "masked")]
)
def test_an_exact_cache_trains_the_same_student(plan, tmp_path, monkeypatch, live, positions):
    name = f"exact {positions}"
    monkeypatch.setitem(
        CACHES, name, {"hidden_dtype": "float32", "top_k": 0, "positions": positions}
    )
    monkeypatch.setattr(vocabulary, "LEAST", 8)  # small vocabularies are used whole
    cache = name if live == "a_sampled" else ARMS[live].cache
    exact = Arm("b", "exact", "cache", name, {"signal": "replay", **ARMS[live].train})
    online = trained(plan, replace(ARMS[live], cache=cache), tmp_path / "online")
    offline = trained(plan, exact, tmp_path / "offline")
    for term in ("loss", "ce", "mlm", "cos"):
        assert len(curve(online, term)) == plan.steps
        assert curve(offline, term) == pytest.approx(curve(online, term), rel=1e-4)
    assert curve(online)[-1] < 0.95 * curve(online)[0], "it learns"
    ours, theirs = (AutoModelForMaskedLM.from_pretrained(p).state_dict() for p in (offline, online))
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=1e-3, atol=1e-4)


def test_exact_relations_train_the_same_student(plan, tmp_path, monkeypatch):
    exact = {"relation_layer": -1, "hidden_dtype": "float32", "top_k": 0}
    monkeypatch.setitem(CACHES, "exact relations", exact)
    cached = replace(ARMS["r_cache"], cache="exact relations")
    online = trained(plan, ARMS["r"], tmp_path / "online")
    offline = trained(plan, cached, tmp_path / "offline")
    assert curve(offline, "rel") == pytest.approx(curve(online, "rel"), rel=1e-4)
    assert curve(online, "rel")[-1] < 0.95 * curve(online, "rel")[0], "it learns"


def test_other_signals_train_other_students(plan, tmp_path):
    """The comparison above would see a difference."""
    online = trained(plan, ARMS["a"], tmp_path / "online")
    other = trained(plan, ARMS["a"], tmp_path / "other", seed=1)
    sparse = trained(plan, ARMS["c8"], tmp_path / "sparse")
    for path in (other, sparse):
        assert curve(path) != pytest.approx(curve(online), rel=1e-3)


def test_the_live_teacher_answers_at_the_asked_positions(plan, small_teacher):
    cache = prepare(plan, "masks")
    batches = CachedBatches(cache, batch_size=6, seed=0, signal=None)
    plain = AutoModelForMaskedLM.from_pretrained(small_teacher).eval()
    teacher = load_teacher(str(small_teacher), torch.device("cpu"), torch.float32)
    live = LiveTeacher(teacher).train()
    assert not any(module.training for module in live.modules())
    for everywhere in (False, True):
        batch = LiveBatches(batches, everywhere=everywhere)[0]
        hidden = plain.base_model(batch["input_ids"]).last_hidden_state.flatten(0, 1)
        index = batch["masked_index"] if not everywhere else torch.arange(len(hidden))
        assert torch.equal(batch["hidden_index"], index)
        assert torch.equal(batch["ce_index"], index)
        torch.testing.assert_close(live(batch), hidden[index])


def test_padding_is_not_asked_about(small_cache):
    cache = Cache.open(small_cache(corpus={"packing": "lines", "max_length": 24}, mask_only=True))
    batches = CachedBatches(cache, batch_size=6, seed=0, signal=None)
    padded = [k for k in range(batches.steps_per_epoch) if "attention_mask" in batches[k]]
    batch = LiveBatches(batches, everywhere=True)[padded[0]]
    present = batch["attention_mask"].flatten()
    assert int(present.sum()) == len(batch["ce_index"]) < present.numel()
    assert bool(present[batch["ce_index"]].all())


@pytest.mark.parametrize("name", COMPARISON.names)
def test_batches_are_the_same_in_all_arms(plan, name):
    check_batches(plan, ARMS[name], prepare(plan, ARMS[name].cache), seed=3)


def test_other_batches_are_noticed(plan):
    cache = prepare(plan, "default")
    read = cache.read_block
    cache.read_block = lambda block: read({0: 1, 1: 0}.get(block, block))
    with pytest.raises(AssertionError):
        check_batches(plan, ARMS["b"], cache, seed=3)


def test_all_arms_from_the_command_line(tmp_path, texts, small_teacher):
    out = tmp_path / "work"
    command = ["--teacher", str(small_teacher), "--text", str(texts[0])]
    command += ["--heldout", str(texts[1]), "--out", str(out), "--seeds", "0"]
    command += ["--size", "2x32", "--steps", "3", "--batch-size", "6", "--max-length", "16"]
    command += ["--max-bytes", "1000000", "--heldout-sequences", "16", "--device", "cpu"]
    command += ["--dtype", "float32"]
    part = call([*command, "--arms", "a,d"])
    assert "L_mlm alone" in part.stdout
    assert "cache (default)" not in part.stdout

    written = ["--json", str(tmp_path / "figures.json"), "--plot", str(tmp_path / "plot.png")]
    whole = call([*command, *written])
    values = json.loads((tmp_path / "figures.json").read_text())
    assert [r["arm"] for r in values["results"]] == COMPARISON.names
    for result in values["results"]:
        assert result["training"]["steps"] == 3
        assert result["teacher"] == values["results"][0]["teacher"]
        assert result["quality"].keys() >= QUALITY.keys()
        assert "tokens_per_s" in (out / "results" / f"{result['arm']}-0.jsonl").read_text()
    assert not list(out.glob("runs/*"))
    for label in ("live, masked", "cache (default)", "the teacher", "bytes/token"):
        assert label in whole.stdout
    assert "| b | cache (default) | 1 |" in (out / "summary.md").read_text()
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    stamps = [p.stat().st_mtime_ns for p in sorted(out.glob("results/*"))]
    assert call(command).stdout == whole.stdout
    assert [p.stat().st_mtime_ns for p in sorted(out.glob("results/*"))] == stamps
    other = CliRunner().invoke(main, [*command, "--lr", "0.1"])
    assert other.exit_code == 2
    assert "lr 0.0003 -> 0.1" in other.stderr


def call(command):
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, (done.output, done.exception)
    return done


def test_a_stopped_training_goes_on(plan, tmp_path, monkeypatch):
    straight = trained(plan, ARMS["a"], tmp_path / "straight")
    half = tmp_path / "half"
    with monkeypatch.context() as patch:
        patch.setattr("distilcache.stages.student_train.run.export_model", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            trained(replace(plan, save_steps=4), ARMS["a"], half)
    shutil.rmtree(half / "checkpoints" / "checkpoint-6")
    trained(replace(plan, save_steps=4), ARMS["a"], half)
    assert curve(half) == curve(straight)


def _interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", COMPARISON.names)
def test_arms_on_cuda(plan, tmp_path, name, dtype):
    found = run_arm(replace(plan, out=tmp_path, device="cuda", dtype=dtype), ARMS[name], 0)
    assert found["training"]["steps"] == plan.steps
    assert 0 < found["quality"]["ece"] < 1


def test_missing_files_are_one_line(tmp_path):
    done = CliRunner().invoke(main, ["--teacher", str(tmp_path / "gone"), "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert f"--teacher {tmp_path / 'gone'}" in done.stderr
    assert CliRunner().invoke(main, ["--arms", "a,z"]).exit_code == 2
    assert CliRunner().invoke(main, ["--seeds", "0,-1"]).exit_code == 2


def test_results_of_another_plan_are_refused(plan):
    plan.record()
    plan.record()
    with pytest.raises(UserError, match="steps 6 -> 7"):
        replace(plan, steps=7).record()
    replace(plan, save_steps=1, keep=True).record()


def test_runs_of_another_arithmetic_are_refused(plan, tmp_path, monkeypatch):
    """`auto` is bfloat16 on one machine and float32 on the next."""
    asked = replace(plan, out=tmp_path, device="auto", dtype="auto")
    monkeypatch.setattr("benchmarks.arms.resolve_dtype", lambda *_: torch.bfloat16)
    asked.record()
    replace(asked, dtype="bfloat16").record()
    monkeypatch.setattr("benchmarks.arms.resolve_dtype", lambda *_: torch.float32)
    with pytest.raises(UserError, match="'bfloat16 on .*' -> 'float32 on"):
        asked.record()


def test_a_finished_run_is_read_back(plan):
    """And a kept model is not trained anew."""
    first = run_arm(plan, ARMS["d"], 5)
    assert run_arm(plan, ARMS["d"], 5) == first
    kept = replace(plan, keep=True)
    again = run_arm(kept, ARMS["d"], 6)
    assert [p.name for p in plan.out.glob("runs/*")] == ["d-6"]
    plan.result("d", 6).unlink()
    assert run_arm(kept, ARMS["d"], 6)["quality"] == again["quality"], "measured again"
    assert first["bytes_per_token"] > 0

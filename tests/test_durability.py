"""What the stages write survives a power cut: whatever has its name is on the disk."""

from tests.builders import build_corpus_of, random_texts
from tests.durability import recorded


def test_a_corpus(tmp_path, small_tokenizer, monkeypatch):
    with recorded(monkeypatch) as events:
        build_corpus_of(random_texts(20), tmp_path, small_tokenizer, block_sequences=8)
    assert events.check() >= {"tokenizer", "part-000000.arrow", "part-000000.json", "manifest.json"}


def test_a_cache(tmp_path, small_corpus, small_teacher, build_cache_in, monkeypatch):
    corpus = small_corpus(documents=20)
    with recorded(monkeypatch) as events:
        build_cache_in(tmp_path / "cache", corpus, small_teacher)
    assert events.check() >= {
        "teacher", "hidden_codec_3.safetensors", "shard-000000.tar", "shard-000000.json",
        "index.arrow", "manifest.json",
    }  # fmt: skip


def test_a_student_and_its_checkpoints(tmp_path, small_cache, monkeypatch):
    from distilcache.stages.student_train.config import StudentConfig, TrainConfig
    from distilcache.stages.student_train.run import train_student

    cache, train = small_cache(), TrainConfig(batch_size=8, epochs=1.0)
    with recorded(monkeypatch) as events:
        train_student(
            cache_dir=cache, out=tmp_path / "1x32", size="1x32",
            student=StudentConfig(sizes=("1x32",)), train=train, device="cpu", dtype="float32",
        )  # fmt: skip
    assert events.check() >= {"complete.json", "optimizer.safetensors", "config.json"}

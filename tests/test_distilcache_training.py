"""The Python API: training in a script."""

import json
import os
import signal

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, TrainerCallback, TrainingArguments

from distilcache import CachedDistillationTrainer, UserError, build_student, open_cache
from distilcache.data import errors


@pytest.fixture(scope="module")
def cache(small_cache):
    return open_cache(small_cache())


def student_of(cache, **shape):
    return build_student(cache, "1x32", **shape)


def trainer_of(cache, /, **given):
    return CachedDistillationTrainer(
        **{"model": student_of(cache), "train_dataset": cache, **given}
    )


def test_a_trained_student_is_the_command_lines_own(cache, tmp_path):
    """The same settings give the same weights as ``distilcache student-train``."""
    from safetensors.torch import load_file

    from distilcache.stages.student_train.config import StudentConfig, TrainConfig
    from distilcache.stages.student_train.run import train_student

    settings = {"epochs": 2, "batch_size": 8, "lr": 1e-3, "logging_steps": 5, "seed": 4}
    student = student_of(cache, seed=4)
    trainer = CachedDistillationTrainer(
        student,
        train_dataset=cache,
        output_dir=tmp_path / "ours",
        device="cpu",
        dtype="float32",
        **settings,
    )
    trainer.train()
    trainer.save_model()
    train_student(
        cache_dir=cache.path,
        out=tmp_path / "theirs",
        size="1x32",
        student=StudentConfig(sizes=("1x32",)),
        train=TrainConfig(**settings),
        device="cpu",
        dtype="float32",
    )
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert trainer.student is student
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "ours")
    ids = cache.block(0).input_ids[:2]
    torch.testing.assert_close(again.eval()(ids).logits, student.eval()(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "ours").mask_token


def test_training_arguments_decide(cache, tmp_path):
    args = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        num_train_epochs=2,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = CachedDistillationTrainer(
        student_of(cache), args, train_dataset=cache, temperature=1.0, alpha_mlm=0.0
    )
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert trainer.train_settings.temperature == 1.0
    assert len(history) == 2 * trainer.train_dataset.steps_per_epoch == trainer.state.max_steps
    assert history[0].keys() >= {"ce", "cos"}
    assert "mlm" not in history[0]
    half = history[len(history) // 2]["learning_rate"]
    assert half == pytest.approx(5e-4, rel=0.1)  # of a cosine; a warm-up would be another


@pytest.mark.parametrize(("limit", "kept"), [(None, [1, 2, 3, 4]), (1, [4])])
def test_as_many_checkpoints_as_training_arguments_say(cache, tmp_path, limit, kept):
    args = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        save_steps=1,
        save_total_limit=limit,
        report_to="none",
        use_cpu=True,
    )
    CachedDistillationTrainer(student_of(cache), args, train_dataset=cache).train()
    assert sorted(int(p.name.partition("-")[2]) for p in tmp_path.glob("checkpoint-*")) == kept


def test_the_card_tells_what_training_arguments_decide(cache, tmp_path):
    args = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=7, lr_scheduler_type="cosine", use_cpu=True
    )
    CachedDistillationTrainer(student_of(cache), args, train_dataset=cache).save_model()
    card = (tmp_path / "README.md").read_text()
    settings = json.loads(card.partition("```json")[2].partition("```")[0])
    assert settings["args"]["num_train_epochs"] == 7
    assert settings["args"]["lr_scheduler_type"] == "cosine"
    assert settings["batch_size"] == args.per_device_train_batch_size
    assert not {"epochs", "steps", "warmup"} & settings.keys()


def test_several_processes_are_refused(cache, tmp_path, monkeypatch):
    """Each would train on all sequences."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="must run in one process, got WORLD_SIZE=2.*--nproc"):
        trainer_of(cache, output_dir=tmp_path / "out")


class Interrupt(TrainerCallback):
    """Ctrl-C in the step after the third."""

    def __init__(self, step=3):
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_saves_and_resuming_gives_the_same_weights(cache, tmp_path):
    settings = {"steps": 6, "batch_size": 8, "logging_steps": 1, "device": "cpu"}

    def trainer(name, **more):
        return trainer_of(cache, output_dir=tmp_path / name, **settings, **more)

    whole = trainer("whole")
    whole.train()
    stopped = trainer("parts", callbacks=[Interrupt()])
    with pytest.raises(KeyboardInterrupt, match="step 4 of 6.*resume_from_checkpoint=True"):
        stopped.train()
    resumed = trainer("parts")
    resumed.train(resume_from_checkpoint=True)
    ours, theirs = resumed.student.state_dict(), whole.student.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_checkpoints_of_an_earlier_training_are_set_aside(cache, tmp_path, capsys):
    """Else a new training's own would be deleted, as those of fewer steps, and theirs resumed."""
    settings = {"steps": 6, "batch_size": 8, "save_steps": 2, "device": "cpu"}

    def trainer(name, **more):
        return trainer_of(cache, output_dir=tmp_path / name, **settings, **more)

    whole = trainer("whole")
    whole.train()
    folder = tmp_path / "parts" / "checkpoints"
    trainer("parts", lr=0.01).train()
    with pytest.raises(KeyboardInterrupt, match="step 3 of 6"):
        trainer("parts", callbacks=[Interrupt(2)]).train()
    kept = ["_earlier-checkpoint-4", "_earlier-checkpoint-6", "checkpoint-2", "checkpoint-3"]
    assert sorted(path.name for path in folder.iterdir()) == kept
    said = [
        line
        for line in capsys.readouterr().err.splitlines()
        if "where this training begins" in line
    ]
    assert [line.rpartition(" ")[2] for line in said] == kept[:2]
    resumed = trainer("parts")
    resumed.train(resume_from_checkpoint=True)
    ours, theirs = resumed.student.state_dict(), whole.student.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # From an older one of its own: the same again.
    again = trainer("parts", callbacks=[Interrupt(4)])
    with pytest.raises(KeyboardInterrupt, match="step 5 of 6"):
        again.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    there = [*kept[:2], "_earlier-checkpoint-6-2", "checkpoint-4", "checkpoint-5"]
    assert sorted(path.name for path in folder.iterdir()) == there


def test_a_fresh_training_counts_nothing_of_an_interrupted_one(cache, tmp_path):
    """With a rate at which no weight changes, so that both read the same losses."""
    settings = {"steps": 6, "batch_size": 8, "logging_steps": 4, "lr": 1e-12, "device": "cpu"}
    trainers = [
        trainer_of(
            cache,
            model=student_of(cache, dropout=0.0),
            output_dir=tmp_path / name,
            **settings,
            callbacks=[Interrupt(step)],
        )
        for name, step in (("parts", 2), ("whole", None))
    ]
    with pytest.raises(KeyboardInterrupt, match="step 3 of 6"):
        trainers[0].train()
    trainers[0].remove_callback(Interrupt)
    for trainer in trainers:
        trainer.train()
    ours, theirs = ([e["loss"] for e in t.state.log_history if "loss" in e] for t in trainers)
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert trainers[0].tokens == trainers[1].tokens


def test_the_device_is_settled_last(cache, tmp_path, monkeypatch):
    """All TrainingArguments that are made let accelerate begin anew, on the first GPU."""
    from distilcache.stages.student_train import arguments, trainer

    made, begin = [], TrainingArguments.__post_init__
    monkeypatch.setattr(
        TrainingArguments, "__post_init__", lambda self: [begin(self), made.append("arguments")]
    )
    monkeypatch.setattr(arguments, "as_recipe_says", lambda _, device: made.append(device))
    monkeypatch.setattr(trainer, "settle", lambda device: made.append(("settled", device)))
    trainer_of(cache, output_dir=tmp_path / "out", device="cpu")
    cpu = torch.device("cpu")
    assert made[-2:] == [cpu, ("settled", cpu)]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "inductor"),
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_USE_FSDP", "true"),
    ],
)
def test_variables_of_accelerate_are_refused(cache, tmp_path, monkeypatch, variable, value):
    args = TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True)
    for given in ({"args": args}, {"output_dir": tmp_path / "out", "device": "cpu"}):
        monkeypatch.setenv(variable, value)
        with pytest.raises(UserError, match=f"{variable} must not be set, got {value}: .*; unset"):
            trainer_of(cache, **given)
        monkeypatch.setenv(variable, "NO")  # as accelerate launch sets what is not asked for
        trainer_of(cache, **given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"output_dir": "out", "lrr": 1.0}, "'lrr' must be a field of .train.; did you mean 'lr'"),
        ({"output_dir": "out", "lr": -1.0}, "lr must be above 0"),
        ({}, "args or output_dir"),
        (
            {"cache": None, "output_dir": "out"},
            "args must be TrainingArguments, got a cache; give",
        ),
        ({"args": "out"}, "args must be TrainingArguments, got str"),
        ({"output_dir": "out", "train_dataset": "runs"}, "train_dataset must be a cache from open"),
        ({"output_dir": "out", "model": None}, "model must be a student from build_student, got N"),
        ({"output_dir": "out", "eval_dataset": 1.0}, "a fraction that leaves some .* 13 blocks"),
        ({"output_dir": "out", "eval_dataset": "text"}, "eval_dataset must be a cache from open"),
        ({"output_dir": "out", "data_collator": len}, "data_collator must be None"),
        ({"output_dir": "out", "model_init": len}, "model_init must be None.*build_student"),
        ({"output_dir": "out", "compute_loss_func": len}, "compute_loss_func must be None"),
        ({"output_dir": "out", "device": "gpu"}, "train: device must be 'auto'"),
        ({"output_dir": "out", "streams": 3}, "streams must divide"),
        ({"args": {"learning_rate": 0.0}}, "train: learning_rate must be above 0"),
        ({"output_dir": "out", "temperature": 3.0}, "temperature must be one that the cache holds"),
        ({"args": {}, "lr": 1.0}, "learning_rate must be set in args"),
    ],
)
def test_bad_settings_are_one_line_and_write_nothing(cache, tmp_path, monkeypatch, given, words):
    monkeypatch.chdir(tmp_path)
    if isinstance(given.get("args"), dict):
        args = TrainingArguments(output_dir="out", use_cpu=True, **given["args"])
        given = {**given, "args": args}
    if given.get("args") == "cache":  # As in 0.2.0.
        given = {**given, "args": cache}
    with pytest.raises(UserError, match=words) as error:
        trainer_of(cache, **given)
    assert "\n" not in str(error.value)
    assert "--set" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"vocab_size": 500}, "must have the 120 ids of the cache's teacher, or fewer .* got 500"),
        ({"max_position_embeddings": 8}, "must take the cache's sequences of .* got one of 8"),
    ],
)
def test_a_student_that_does_not_fit_the_cache_is_refused(cache, tmp_path, values, words):
    config = type(student_of(cache).config)(**{**student_of(cache).config.to_dict(), **values})
    model = AutoModelForMaskedLM.from_config(config)
    with pytest.raises(UserError, match=words):
        trainer_of(cache, model=model, output_dir=tmp_path / "out")


def test_a_student_without_the_teachers_padding_is_refused(
    small_teacher, small_corpus, build_cache_in, tmp_path
):
    """It has an id for each token of the tokenizer, and the teacher has rows beyond these."""
    padded = AutoModelForMaskedLM.from_pretrained(small_teacher)
    padded.resize_token_embeddings(128)
    padded.save_pretrained(tmp_path / "padded")
    AutoTokenizer.from_pretrained(small_teacher).save_pretrained(tmp_path / "padded")
    built = build_cache_in(
        tmp_path / "cache", small_corpus(), tmp_path / "padded", hidden_dtype="float32"
    )
    cache = open_cache(built)
    student = student_of(cache)
    settings = {"output_dir": tmp_path / "out", "device": "cpu"}
    assert trainer_of(cache, model=student, **settings).trimmed is None
    student.resize_token_embeddings(120)
    words = "must have the 128 ids .*, or fewer than its tokenizer, got 120; make it with build_stu"
    with pytest.raises(UserError, match=words):
        trainer_of(cache, model=student, **settings)


def test_a_student_with_fewer_ids_must_have_those_that_the_cache_gives(
    cache, tmp_path, monkeypatch, capsys
):
    settings = {"output_dir": tmp_path / "out", "device": "cpu"}
    said = "train: the model's 70 ids are taken for those that build_student keeps"

    def noted(model, **given):
        monkeypatch.setattr(errors, "_printed", set())  # each note is printed once
        trainer_of(cache, model=model, **settings, **given).save_model(tmp_path / "saved")
        return said in capsys.readouterr().err

    student = student_of(cache, vocabulary=70)
    theirs = AutoTokenizer.from_pretrained(cache.cache.teacher_dir)
    with pytest.raises(UserError, match="processing_class must be None for .* fewer ids .*, got"):
        noted(student, processing_class=theirs)
    assert noted(student)
    own = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert len(own) == 70 < len(theirs)
    opened = AutoModelForMaskedLM.from_pretrained(tmp_path / "saved")
    assert not noted(opened)
    path = tmp_path / "saved" / "tokenizer.json"
    state = json.loads(path.read_text())
    state["model"]["vocab"]["other"] = state["model"]["vocab"].popitem()[1]
    path.write_text(json.dumps(state))
    with pytest.raises(UserError, match="must have the 70 ids that .* got others in .*saved; make"):
        noted(opened)


def test_a_finished_run_takes_no_more_steps(cache, tmp_path):
    """12 batches an epoch: the tenth step is not its last."""
    settings = {"steps": 10, "batch_size": 8, "device": "cpu", "output_dir": tmp_path / "out"}
    first = trainer_of(cache, **settings)
    first.train()
    assert (tmp_path / "out" / "checkpoints" / "checkpoint-10").is_dir()  # As the command has it.
    again = trainer_of(cache, **settings)
    output = again.train(resume_from_checkpoint=True)
    assert output.global_step == again.state.global_step == 10
    assert output.training_loss == again.state.log_history[-1]["loss"]
    ours, theirs = again.model.state_dict(), first.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_errors_name_arguments_of_python(cache, tmp_path):
    from distilcache.data.errors import as_arguments

    with pytest.raises(UserError, match=r"or heads=N$"):
        build_student(cache, "1x32", heads=5)
    with pytest.raises(UserError, match=r"of streams \(3\), got 4; use streams=0"):
        cache.batches(batch_size=4, streams=3)
    path = "train: x; make it with cache.top_k=8 in a/train.md"
    said = {
        "recipe: device must be; use --set device=cpu": 'train: device must be; use device="cpu"',
        "train: lr must be; less train.lr": "train: learning_rate must be; less learning_rate",
        path: path,
    }
    for line, wanted in said.items():
        with pytest.raises(UserError) as error, as_arguments({"lr": "learning_rate"}):
            raise UserError(line)
        assert str(error.value) == wanted


def test_resuming_from_nothing_says_so(cache, tmp_path):
    trainer = trainer_of(cache, output_dir=tmp_path / "out", steps=2)
    with pytest.raises(UserError, match="complete checkpoint, got none"):
        trainer.train(resume_from_checkpoint=True)

"""Each layout of ``layouts.py``, and the page that lists them."""

import json
import re
from importlib.metadata import version

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM

from distilcache.data.cache.cache import Cache
from distilcache.data.errors import UserError
from distilcache.pipeline.convert import convert_command
from distilcache.stages.models.families import family_of
from distilcache.stages.models.tokenizers import load_tokenizer, vocabulary_size
from distilcache.stages.student_train.config import TrainConfig
from distilcache.stages.student_train.export import CardFacts, export_model
from distilcache.stages.teacher_cache.teacher import load_teacher
from tests.builders import build_corpus_of, random_texts, run_stage_one
from tests.command_line import ROOT
from tests.stages.models.families_support import make_tokenizer, plain_outputs
from tests.stages.models.layouts import LAYOUTS
from tests.stages.student_train.model_support import EXACT, build
from tests.teachers_page import PAGE, teachers_page

NAMES = [layout.name for layout in LAYOUTS]
TEXTS = (
    "amber bridge of the River",
    "zebra UNDER winter, north",
    "LAGVAGTTACAN",
    "一丁丂",
    "東京都に住む。",
)


def opened(folder):
    """Teacher and tokenizer, as a recipe opens them."""
    teacher = load_teacher(str(folder), torch.device("cpu"), torch.float32)
    return teacher, load_tokenizer(folder, where="teacher: tokenizer")


def edit(folder, name, **values):
    path = folder / name
    there = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**there, **values}))
    return folder


def converted(folder):
    out = folder.with_name("converted")
    convert_command(str(folder), out)
    return out


REMEDIES = {
    "convert": converted,
    "convert and keep case": lambda folder: edit(
        converted(folder), "tokenizer_config.json", do_lower_case=False
    ),
    "layers": lambda folder: edit(folder, "config.json", num_hidden_layers=3),
    "rules": lambda folder: edit(
        folder, "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast"
    ),
    "language": lambda folder: edit(folder, "config.json", default_language="de_DE"),
}
"""What a refusal or a notice tells to do."""


@pytest.mark.parametrize("layout", LAYOUTS, ids=NAMES)
def test_layout(layout, tmp_path, capsys):
    """Logits and ids are those of the model and tokenizer that were published."""
    if layout.needs:
        pytest.importorskip(layout.needs, reason=layout.verdict)
    folder = tmp_path / "published"
    model, words = layout.make(folder)
    if layout.error:
        with pytest.raises(UserError, match=layout.error) as refusal:
            opened(folder)
        assert "\n" not in str(refusal.value)
    if layout.notice:
        opened(folder)
        assert layout.notice in capsys.readouterr().err
    if layout.verdict.startswith("refused"):
        return
    if layout.remedy == "tokenizer":
        through_another_tokenizer(folder, tmp_path)
        return
    if layout.remedy:
        folder = REMEDIES[layout.remedy](folder)
    teacher, tokenizer = opened(folder)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == words(text)["input_ids"]
    assert vocabulary_size(tokenizer) <= model.config.vocab_size
    says_the_same(teacher, model)


@torch.no_grad()
def says_the_same(teacher, model):
    """Of a padded batch, where padding may be; of masked positions, where it knows no others."""
    generator = torch.Generator().manual_seed(0)
    size, pad = model.config.vocab_size, model.config.pad_token_id or 0
    ids = torch.randint(size // 2, size, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    family = family_of(model.config)
    if not family.even:
        mask[1, 8:], ids[1, 8:] = 0, pad
    rows = mask.flatten().nonzero().flatten()
    if family.mask == "permutation":
        rows = rows[::3]
        wanted = [
            plain_outputs(model, ids[i, : mask[i].sum()], [r - 12 * i for r in rows.tolist()
                                                            if r // 12 == i])[0]
            for i in range(2)
        ]  # fmt: skip
        wanted = torch.cat(wanted)
    elif family.mask == "keys" and model.config.model_type == "mobilebert":
        own = [model(ids[i : i + 1, : mask[i].sum()]).logits[0] for i in range(2)]
        wanted = torch.cat(own)  # its padding counts as zeros here
    else:
        wanted = model(input_ids=ids, attention_mask=mask).logits.flatten(0, 1)[rows]
    (states,) = teacher.encode(ids, mask.bool(), (teacher.num_layers,), rows)
    found = teacher.decode(teacher.transform(states), precise=True)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert wanted.std() > 0.2


def through_another_tokenizer(folder, tmp_path):
    """As the refusal says: --set corpus.tokenizer=PATH."""
    words = tmp_path / "words"
    make_tokenizer("bert").save_pretrained(words)
    corpus = build_corpus_of(random_texts(), tmp_path, words)
    cache = run_stage_one(tmp_path / "cache", corpus, folder)
    assert (cache / "teacher" / "tokenizer.json").read_bytes() == (
        corpus / "tokenizer" / "tokenizer.json"
    ).read_bytes()


@pytest.mark.parametrize(
    "name",
    ["bert-base-uncased", "xlm-roberta-base", "camembert-base", "a BERT in float16",
     "a DeBERTa-v3 with its head trained further", "a BERT of another epsilon",
     "studio-ousia/luke-base"],
)  # fmt: skip
def test_cache_and_student(name, tmp_path):
    """Stage one ends, is found finished the second time, and gives a student with all weights."""
    layout = LAYOUTS[NAMES.index(name)]
    model, _ = layout.make(tmp_path / "teacher")
    folder = (REMEDIES[layout.remedy] if layout.remedy else lambda f: f)(tmp_path / "teacher")
    corpus = build_corpus_of(random_texts(), tmp_path, folder)
    for _ in range(2):
        run_stage_one(tmp_path / "cache", corpus, folder, **EXACT, top_k=4)
    cache = Cache.open(tmp_path / "cache")
    columns = cache.read_block(0)
    ids = columns["input_ids"][: columns["lengths"][0]].astype("int64").tolist()
    masked = columns["masked_positions"][: columns["masked_counts"][0]].astype("int64").tolist()
    wanted, _ = plain_outputs(model, ids, masked)
    states = torch.from_numpy(columns[f"hidden_{cache.encoding.num_layers}"].copy())
    found = cache.teacher.lm_head()(states.view(-1, cache.encoding.hidden[-1].width)[: len(masked)])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    student = build(cache, "2x32")
    out = exported(student, cache, tmp_path)
    encoder, info = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not [key for key in info["missing_keys"] if "pooler" not in key]
    tokens = torch.arange(16).view(2, 8) + 20
    with torch.no_grad():
        states = [m.eval()(tokens).last_hidden_state for m in (encoder, student.base_model)]
    torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)


def exported(student, cache, tmp_path):
    out = tmp_path / "student"
    out.mkdir()
    facts = CardFacts(name="2x32", role="student", cache_fingerprint="0", train=TrainConfig(),
                      settings={}, figures={})  # fmt: skip
    export_model(student, tokenizer_dir=cache.teacher_dir, out=out, facts=facts)
    return out


@pytest.mark.parametrize("family", ["usual", "teacher"])
@pytest.mark.parametrize(
    "name", ["a BERT with a decoder of its own", "a BERT that was saved to be looked into"]
)
def test_a_student_of_all_layers_says_what_its_teacher_says(name, family, tmp_path):
    model, _ = LAYOUTS[NAMES.index(name)].make(tmp_path / "teacher")
    corpus = build_corpus_of(random_texts(20), tmp_path, tmp_path / "teacher")
    cache = Cache.open(run_stage_one(tmp_path / "cache", corpus, tmp_path / "teacher", top_k=4))
    out = exported(build(cache, "3x32", family=family), cache, tmp_path)
    tokens = torch.arange(24).view(2, 12) + 20
    with torch.no_grad():
        found = [
            m.eval()(tokens).logits for m in (AutoModelForMaskedLM.from_pretrained(out), model)
        ]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-4)


def test_names_are_used_once():
    assert len(set(NAMES)) == len(NAMES) >= 45


def test_the_page_is_what_the_script_writes():
    pinned = re.search(r"^transformers==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    if version("transformers") != pinned:
        pytest.skip(f"the page lists the types of transformers {pinned}")
    assert PAGE.read_text() == teachers_page(), "run python -m tests.teachers_page"
    assert not re.search(r"\| *\|", PAGE.read_text())

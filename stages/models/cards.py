"""Model cards: README.md with the metadata that hubs read. No torch here.

    origin     what a card says of what its model was made from: base model, license, language
    example    a line of held-out text with a mask
    card       metadata and text as one page, for masked LMs and what is made of them

Figures are added by :func:`add_results`. A bad card never keeps a model from being used.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download, metadata_load

from distilcache.data.corpus.store import Corpus
from distilcache.data.errors import UserError, reason_of, tell
from distilcache.data.masks.masking import ALONE, BEGINS, GOES_ON, joined
from distilcache.data.storage.files import write_bytes
from distilcache.stages.models.hub import folder_of, place_on_hub

INHERITED = ("license", "license_name", "license_link", "language")
"""Metadata of a model that hold for the models made from it."""
ORIGIN = (*INHERITED, "base_model", "datasets")
PLACE = "PATH/TO/THIS/FOLDER"
"""Stands in a card for the model's folder; ``distilcache push`` writes the hub id there."""
EVALUATION = "## Evaluation"
"""Heading of the section that :func:`add_results` writes."""
_EXAMPLE_TOKENS = 12
_TRIED_SEQUENCES = 50


def origin_of(folder: Path) -> dict[str, Any]:
    """What the card of a model in a folder says that holds for models made from it as well.

    Returns:
        Those of ``base_model``, ``license``, ``license_name``, ``license_link``, ``language`` and
        ``datasets`` that it names; none where there is no card, or one that cannot be read.
    """
    return {} if not (path := folder / "README.md").is_file() else _origin(path)


def origin_of_teacher(name: str, revision: str = "") -> dict[str, Any]:
    """The same for students of a teacher; it is their base model where it is on the hub."""
    folder = folder_of(name, where="teacher: model", revision=revision)
    found: dict[str, Any] = {}
    if folder is not None:
        found = origin_of(folder)
    else:  # It may have no card, or the network be gone: a teacher all the same.
        with contextlib.suppress(Exception):
            found = _origin(Path(hf_hub_download(name, "README.md", revision=revision or None)))
    hub_id, _ = place_on_hub(name, revision)
    kept = {key: value for key, value in found.items() if key in INHERITED}
    return {**kept, **({"base_model": hub_id} if hub_id else {})}


def origin_of_model(folder: Path) -> dict[str, Any]:
    """The same for models made from one in a folder.

    A student of this project hands on what its card says. Any other model may be on the hub, which
    makes it the base model, and its data sets are not those of models made from it.
    """
    if (folder / "training.json").is_file():
        return origin_of(folder)
    found = {**origin_of(folder), **origin_of_teacher(str(folder))}
    return {name: value for name, value in found.items() if name != "datasets"}


def recorded_origin(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The origin that stage one has recorded in a cache; of a cache of before 0.3.0 nothing."""
    environment = provenance.get("environment")
    values = environment.get("card") if isinstance(environment, dict) else None
    return _texts(values if isinstance(values, dict) else {}, (*ORIGIN, "example"))


def origin_in_cache(provenance: Mapping[str, Any], teachers: int) -> dict[str, Any]:
    """What stage one has recorded for models made from the teacher itself, not from the text.

    Of several teachers it is what all share, and base models of all: these are left out.
    """
    names = INHERITED if teachers > 1 else (*INHERITED, "base_model")
    return {n: value for n, value in recorded_origin(provenance).items() if n in names}


def _origin(path: Path) -> dict[str, Any]:
    try:
        values = metadata_load(path) or {}
    except Exception:  # A card is anybody's text: bad YAML, another encoding.
        return {}
    if values.get("language") is False:  # "no" is Norwegian; YAML 1.1 reads it as false.
        values["language"] = "no"
    return _texts(values, ORIGIN)


def _texts(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The fields that are a text or a list of texts."""
    return {
        name: value
        for name in names
        if (value := values.get(name))
        and all(isinstance(item, str) for item in (value if isinstance(value, list) else [value]))
    }


def masked_line(corpus: Corpus, tokenizer: Any) -> str:
    """A piece of held-out text with one mask in it, for the example of a card.

    Its tokenizer reads it back token for token, so that a model of this corpus knows all of it.

    Returns:
        At most 12 tokens; "": no text is held out, or none of it can be read back.
    """
    split = corpus.split("heldout")
    if not split.num_blocks:
        return ""
    ids, lengths = split.block(0)
    places = np.full(corpus.manifest.vocab_size, BEGINS)
    with contextlib.suppress(UserError):  # A vocabulary of characters knows no words.
        places = corpus.continuations
    special = corpus.manifest.all_special_ids
    for sequence in np.split(ids, np.cumsum(lengths)[:-1])[:_TRIED_SEQUENCES]:
        tokens = sequence[~np.isin(sequence, special)]
        at = places[tokens]
        part = joined(at, np.ones(len(at), dtype=bool)) | (at == GOES_ON) | (at == ALONE)
        for start, window in enumerate(_windows(tokens.tolist())):
            middle = len(window) // 2
            whole = not part[[start, start + middle, start + middle + 1]].any()
            if not whole or not tokenizer.decode([window[middle]]).strip().isalnum():
                continue
            window[middle] = tokenizer.mask_token_id
            if text := _text(tokenizer, window):
                return text
    return ""


def _text(tokenizer: Any, ids: list[int]) -> str:
    """What the tokenizer reads as these ids, in one line; "": it is not found."""
    joined = "".join(tokenizer.convert_ids_to_tokens(ids))  # of proteins, without spaces
    for text in (tokenizer.decode(ids, clean_up_tokenization_spaces=False), joined):
        plain = text.isprintable() and "\ufffd" not in text
        if plain and tokenizer.encode(text, add_special_tokens=False) == ids:
            return str(text)
    return ""


def _windows(tokens: list[int]) -> Iterator[list[int]]:
    """Pieces of a sequence, from each of its first tokens on."""
    for start in range(min(_EXAMPLE_TOKENS, max(1, len(tokens) - 2))):
        if len(window := tokens[start : start + _EXAMPLE_TOKENS]) > 2:
            yield window


def card(
    text: str,
    *,
    pipeline_tag: str,
    tags: Sequence[str],
    origin: Mapping[str, Any],
    name: str = "",
    results: Sequence[EvalResult] = (),
    library: str = "transformers",
) -> ModelCard:
    """A model card: metadata, then the text.

    For masked LMs and for models fine-tuned from them. ``str()`` is the content of README.md.

    Args:
        text: Markdown, from the title on.
        pipeline_tag: What the model does, as hubs name it: ``fill-mask``, ``text-classification``.
        tags: Further words to find it by.
        origin: From one of the functions above; with ``base_model`` the card says that this model
            is a ``finetune`` of it, the nearest of the four relations that hubs know (``adapter``,
            ``finetune``, ``merge``, ``quantized``).
        name: Of the model, where there are results.
        results: Figures for the metadata (``model-index``).
        library: What opens the model.
    """
    known = {name: origin[name] for name in ORIGIN if name in origin}
    if "base_model" in known:
        known["base_model_relation"] = "finetune"
    data = ModelCardData(
        library_name=library,
        pipeline_tag=pipeline_tag,
        tags=["distilcache", *tags],
        model_name=name or None,
        eval_results=list(results) or None,
        **known,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def without_folders(setting: Any) -> Any:
    """Settings with the last part of each path of this machine alone: cards are often published.

    These are absolute paths of two parts or more, paths through ``..``, and ``file://``.
    """
    if isinstance(setting, Mapping):
        return {name: without_folders(value) for name, value in setting.items()}
    if isinstance(setting, list | tuple):
        return [without_folders(value) for value in setting]
    if not isinstance(setting, str | Path):
        return setting
    url = str(setting).startswith("file://")
    path = Path(str(setting).removeprefix("file://"))
    local = url or path.is_absolute() or ".." in path.parts
    return path.name if local and len(path.parts) > 2 else setting


def usage(kind: str) -> list[str]:
    """Lines of Python that open the model of a card, of that class, and its tokenizer."""
    return [
        f"from transformers import AutoTokenizer, {kind}",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{PLACE}")',
        f'model = {kind}.from_pretrained("{PLACE}")',
    ]


def _parted(text: str) -> tuple[str, str, str]:
    """What stands before the section Evaluation, its heading, and what follows."""
    found = re.search(rf"^{EVALUATION}[ \t]*$", text, re.M)
    return (text[: found.start()], found[0], text[found.end() :]) if found else (text, "", "")


def add_results(folder: Path, results: Sequence[EvalResult], lines: Sequence[str]) -> None:
    """Put figures into the card of a model, in place of earlier ones of the same kind of task.

    The rest of the card stays as it is: people may edit it.

    Args:
        folder: Of the model; without a README.md nothing is done.
        results: For the metadata (``model-index``).
        lines: For the section Evaluation, which is replaced.
    """
    path = folder / "README.md"
    if not path.is_file():
        return
    try:
        page = ModelCard(path.read_text(encoding="utf-8-sig"))
    except Exception as error:  # Edited by people: of the YAML reader's types, too.
        why = reason_of(error)
        return tell(f"evaluate: {path} must begin with metadata in YAML, got: {why}; left as it is")
    tasks, data = {result.task_type for result in results}, page.data
    assert isinstance(data, ModelCardData)
    data.model_name = data.model_name or folder.name
    kept = [old for old in data.eval_results or [] if old.task_type not in tasks]
    data.eval_results = [*kept, *results]
    section = "\n".join([EVALUATION, "", *lines, ""])
    before, _, old = _parted(page.text)
    rest = re.search(r"^## ", old, re.M) if old else re.search(r"^## Training", before, re.M)
    if old:
        after = old[rest.start() :] if rest else ""
    else:
        cut = rest.start() if rest else len(before)
        before, after = before[:cut], before[cut:]
    page.text = f"{before.rstrip()}\n\n{section}" + (f"\n{after}" if after else "")
    write_bytes(path, str(page).encode())

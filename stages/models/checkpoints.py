"""Masked LMs as they are published: looked at by their headers, and opened whole or not at all.

    open_config    folder or hub id, configuration and weight files, no weights: quick
    check_head     whether the files hold the LM head, by the names in them
    open_model     the model; weights that are missing would be random ones

Every stage opens checkpoints here, so that all of them take and refuse the same ones.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from distilcache.data.errors import UserError, reason_of, require, tell
from distilcache.stages.models.families import family_of
from distilcache.stages.models.hub import folder_of, quiet, source
from distilcache.stages.models.weight_files import Shapes, convert_hint, read_config, tensors_in

OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Of checkpoints converted from TensorFlow; transformers renames them."""
NEEDLESS = re.compile(
    r"(^|\.)(pooler|position_ids|token_type_ids|seq_relationship|sop_classifier|mask_predictions"
    r"|discriminator_predictions)(\.|$)"
)
"""Tensors that masked LMs are published with and do not need."""
HEADS = re.compile(r"(?<!discriminator_)predictions|lm_head|lm_loss|vocab_|pred_layer|^head\.")
"""Parts of the names of LM heads' tensors."""
HEADLESS = ("bart", "mbart", "mvp")
"""Types whose LM head may be nothing but the word embeddings."""
TIED = ("luke",)
"""Types whose decoder is the word embeddings, which transformers 5 has forgotten."""
SHOWN = 4
"""Names in one line."""


def open_config(name: str | Path, *, where: str, revision: str = "", needs: str = "") -> Any:
    """Look at a checkpoint without loading it.

    Args:
        name: Folder or hub id; a ``Path`` is a folder.
        where: Stage and what is asked for, for errors: ``teacher: model``.
        revision: Branch, tag or commit on the hub; "": the newest.
        needs: What to do where the folder is missing, for the error.

    Returns:
        Its configuration, without requests for other outputs; of DeBERTa-v2 with the ``legacy``
        that its tensors ask for.

    Raises:
        UserError: It cannot be found, is no masked LM, or a file is absent, damaged, or in another
            format.
    """
    folder = folder_of(name, where=where, revision=revision, needs=needs)
    config = configuration(folder or name, where, revision)
    # What a model returns beside its states is asked for at each call.
    config.return_dict, config.output_attentions, config.output_hidden_states = True, False, False
    family_of(config, f"{where} {str(name)!r}")
    _check_settings(config, f"{where} {str(name)!r}")
    names = _tensors(folder, name, where, revision)
    if config.model_type == "deberta-v2":
        own, of_bert = (
            any(n.startswith(prefix) for n in names)
            for prefix in ("lm_predictions.", "cls.predictions.")
        )
        if own != of_bert:  # Left to itself, transformers fills a head of BERT's kind at random.
            config.legacy = of_bert
    return config


def _check_settings(config: Any, where: str) -> None:
    """Refuse settings with which a masked LM is none, or takes other inputs than text."""
    positions = str(getattr(config, "position_embedding_type", None) or "absolute")
    require(
        not positions.startswith("relative_key"),
        f"{where} must have absolute positions, got position_embedding_type {positions!r}, which "
        "transformers 5 leaves out: its outputs would be wrong; use another checkpoint",
    )
    require(
        config.num_hidden_layers >= 1,
        f"{where} must have a layer at least, got num_hidden_layers 0",
    )
    for name in ("is_decoder", "add_cross_attention"):
        require(
            not getattr(config, name, False),
            f"{where} must see the text on both sides of a token and no other, got {name} true; "
            "set it to false in its config.json if it was trained with masks",
        )
    require(
        config.model_type != "nystromformer"
        or config.num_landmarks == config.segment_means_seq_len,
        f"{where} must take sequences of any length, got num_landmarks other than "
        "segment_means_seq_len, which takes those of the latter alone; use a checkpoint where both "
        "are one number",
    )


def check_head(config: Any, name: str | Path, *, where: str, revision: str = "") -> None:
    """Whether a checkpoint holds an LM head at all, by the names in its weight files.

    Whether it is whole is left to :func:`open_model`.

    Raises:
        UserError: It does not.
    """
    names = _tensors(folder_of(name, where=where, revision=revision), name, where, revision)
    require(
        config.model_type in HEADLESS or any(map(HEADS.search, names)),
        f"{where} must hold a trained masked-LM head, got {str(name)!r} with none among its "
        f"{len(names)} tensors; use a checkpoint that was saved with it (it would be random)",
    )


def open_model(
    model_class: Any,
    config: Any,
    name: str | Path,
    *,
    where: str,
    revision: str = "",
    new_head: bool = False,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """Open a model whole or not at all, with a word on what of its file is left out.

    Args:
        model_class: Of transformers.
        config: From :func:`open_config`.
        name: As there, and so are ``where`` and ``revision``.
        where: See there.
        revision: See there.
        new_head: Only the encoder has to be whole, without its pooler.
        **options: For ``from_pretrained``.

    Returns:
        The model, and what transformers says of the loading.

    Raises:
        UserError: It cannot be read, or lacks weights.
    """
    folder = folder_of(name, where=where, revision=revision)
    names = {_renamed(tensor) for tensor in _tensors(folder, name, where, revision)}
    try:
        with quiet():
            model, info = model_class.from_pretrained(
                folder or name,
                config=config,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, by name
                **source(folder, revision),
                **options,
            )
    except Exception as error:  # OSError, ValueError, RuntimeError and the parsers' own types
        raise UserError(
            f"{where} must be a model that transformers can read, got {str(name)!r}: "
            f"{reason_of(error)}"
        ) from None
    prefix = f"{model.base_model_prefix}."

    def needed(key: str) -> bool:
        return not new_head or (key.startswith(prefix) and "pooler" not in key)

    lost = (set(map(str, info["missing_keys"])) | _passed_over(model, names)) - _tied(model, names)
    _require_all(sorted(filter(needed, lost)), type(model).__name__, name, where)
    _require_shapes([entry for entry in info["mismatched_keys"] if needed(entry[0])], name, where)
    _read_in_one_language(model, where, name)
    if not new_head:
        _tell_left_out(type(model).__name__, map(str, info["unexpected_keys"]), where, name)
        _note_untied(model)
        head = ((n, p) for n, p in model.named_parameters() if not n.startswith(prefix))
        _tell_untrained(head, getattr(config, "vocab_size", 0), where, name)
    return model, info


def configuration(place: str | Path, where: str, revision: str = "") -> Any:
    """The configuration of a checkpoint, a folder or a hub id, whatever model it is of.

    Raises:
        UserError: It is absent, damaged, or unknown to transformers.
    """
    from transformers import AutoConfig

    if isinstance(place, Path):
        path = place / "config.json"
    else:
        from huggingface_hub import hf_hub_download

        with _asking_the_hub(place, where):
            path = Path(hf_hub_download(place, "config.json", revision=revision or None))
    values = read_config(path, where)
    folder = place if isinstance(place, Path) else None
    try:
        with quiet():
            return AutoConfig.from_pretrained(place, **source(folder, revision))
    except Exception as error:  # also the hub client's own types
        raise UserError(
            f"{where}: config.json must be one that transformers can read, got {path} of type "
            f"{values['model_type']!r}: {reason_of(error)}"
        ) from None


def _tensors(folder: Path | None, name: str | Path, where: str, revision: str) -> Shapes:
    """Names and shapes, from the headers of the files alone, on the hub as well."""
    if folder is not None:
        return tensors_in(folder, where)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    with _asking_the_hub(str(name), where):
        try:
            found = HfApi().get_safetensors_metadata(str(name), revision=revision or None)
        except NotASafetensorsRepoError:
            raise UserError(f"{where} must have its {convert_hint(name, 'other files')}") from None
    files = found.files_metadata.values()
    return {n: tuple(t.shape) for file in files for n, t in file.tensors.items()}


@contextlib.contextmanager
def _asking_the_hub(name: str, where: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of the client and its transport
        raise UserError(
            f"{where} must be a checkpoint that can be read on the hub, got {name!r}: "
            f"{reason_of(error)}; download it and pass its folder"
        ) from None


def _renamed(name: str) -> str:
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def _require_all(lost: list[str], kind: str, name: str | Path, where: str) -> None:
    """Refuse a model without some of its weights."""
    more = f" and {len(lost) - SHOWN} more" if lost[SHOWN:] else ""
    require(
        not lost,
        f"{where} must hold a trained masked-LM head and all other weights of {kind}, got "
        f"{str(name)!r} without {', '.join(lost[:SHOWN])}{more}; use a checkpoint that was saved "
        "with them (they would be random)",
    )


def _require_shapes(wrong: list[tuple[str, Any, Any]], name: str | Path, where: str) -> None:
    """Refuse weights of other shapes, which would be random ones, too."""
    if wrong:
        tensor, there, asked = min(wrong)
        raise UserError(
            f"{where} must have tensors of the shapes that its config.json asks for, got "
            f"{str(name)!r} with {tensor} of {list(there)} in place of {list(asked)}; correct its "
            "config.json, or download it again"
        )


def _note_untied(model: Any) -> None:
    """Let the configuration say that embeddings and decoder differ, where they do in the file.

    transformers then ties neither them nor the decoder's bias, whatever the configuration says. A
    student with the same configuration must not tie them either.
    """
    decoder, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    own, shared = (getattr(part, "weight", None) for part in (decoder, embedding))
    usual = model._tied_weights_keys or {}
    tied = any(own is parameter and name in usual for name, parameter in model.named_parameters())
    if not model.config.tie_word_embeddings or not tied or shared is None or own is shared:
        return
    model.config.tie_word_embeddings = False
    for name, parameter in list(decoder.named_parameters(recurse=False)):
        copied = type(parameter)(parameter.detach().clone(), parameter.requires_grad)
        setattr(decoder, name, copied)


def _read_in_one_language(model: Any, where: str, name: str | Path) -> None:
    """Let XLM's and FlauBERT's positions hold the language of the text, which no tokenizer gives.

    Without it the model would read text as of no language, which it never met in training.
    """
    base, config = model.base_model, model.config
    languages = getattr(base, "lang_embeddings", None)
    if languages is None:
        return
    named = {index: repr(code) for code, index in (getattr(config, "lang2id", None) or {}).items()}
    require(
        0 <= config.lang_id < config.n_langs,
        f"{where} {str(name)!r} must have a lang_id below its n_langs, {config.n_langs}, got "
        f"{config.lang_id}; correct its config.json",
    )
    tell(
        f"{where} {str(name)!r} knows {config.n_langs} languages, and all text is read as of one: "
        f"{named.get(config.lang_id, config.lang_id)}; set lang_id in its config.json for another"
    )
    base.position_embeddings.weight.data.add_(languages.weight.data[config.lang_id])
    base.use_lang_emb = config.use_lang_emb = False
    del base.lang_embeddings


def _passed_over(model: Any, names: set[str]) -> set[str]:
    """Parameters that are not in the file, and that transformers does not call missing."""
    patterns = model._keys_to_ignore_on_load_missing or ()
    return {
        name
        for name, _ in model.named_parameters()
        if name not in names and any(re.search(pattern, name) for pattern in patterns)
    }


def _tied(model: Any, names: set[str]) -> set[str]:
    """The decoder's weight, filled with the word embeddings where the file leaves it to them."""
    if model.config.model_type not in TIED or not model.config.tie_word_embeddings:
        return set()
    decoder = getattr(model.get_output_embeddings(), "weight", None)
    absent = {n for n, p in model.named_parameters() if p is decoder and n not in names}
    if decoder is not None and absent:
        decoder.data.copy_(model.get_input_embeddings().weight.data)
    return absent


def _tell_left_out(kind: str, unexpected: Iterable[str], where: str, name: str | Path) -> None:
    """One line on tensors of the file that the model does not read."""
    counts = Counter(_part(key) for key in sorted(unexpected) if not NEEDLESS.search(key))
    if counts:
        shown = [f"{part} ({count})" for part, count in list(counts.items())[:SHOWN]]
        more = f" and {len(counts) - SHOWN} more" if len(counts) > SHOWN else ""
        tell(
            f"{where} {str(name)!r} holds tensors that {kind} does not read: {', '.join(shown)}"
            f"{more}; if they belong to the model, correct its config.json"
        )


def _part(name: str) -> str:
    """What a tensor belongs to: adapters, a layer, or its module."""
    if re.search(r"adapter|lora_", name):
        return "adapters"
    layer = re.match(r".*?\.\d+(?=\.)", name)
    return layer[0] if layer else name.rpartition(".")[0] or name


def _tell_untrained(
    head: Iterable[tuple[str, Any]], vocab_size: int, where: str, name: str | Path
) -> None:
    """One line where norm and biases of the head are what they are before any training.

    Such a head comes from a checkpoint that was saved after its head had been filled at random.
    """
    inner = [(n, p) for n, p in head if p.ndim == 1 and len(p) != vocab_size]
    first = all(bool((p == (0 if n.endswith("bias") else 1)).all()) for n, p in inner)
    if first and any(n.endswith("weight") for n, _ in inner):
        tell(
            f"{where} {str(name)!r} has an LM head that looks untrained: its norm is exactly 1 and "
            "its biases are 0; use the checkpoint as it was first published"
        )

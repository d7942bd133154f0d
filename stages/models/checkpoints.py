"""Masked LMs as they are published: looked at by their headers, and opened whole or not at all.

    open_config    folder or hub id, configuration and weight files, no weights: quick
    check_head     whether the files hold the LM head, by the names in them
    open_model     the model; weights that are missing would be random ones

Every stage opens checkpoints here, so that all of them take and refuse the same ones.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

from distilcache.data.errors import UserError, reason_of, require
from distilcache.stages.models.families import family_of
from distilcache.stages.models.hub import (
    folder_of,
    names_on_hub,
    own_code,
    quiet,
    source,
    tell_own_code,
)
from distilcache.stages.models.opened import (
    filled_by_tying,
    note_untied,
    passed_over,
    read_in_one_language,
    require_all,
    require_shapes,
    run_norms_first,
    tell_left_out,
    tell_untrained,
)
from distilcache.stages.models.settings import check_settings, put_right
from distilcache.stages.models.weight_files import (
    ADAPTER,
    Shapes,
    other_weights,
    read_config,
    require_merged,
    tensors_in,
)

OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
"""Of checkpoints converted from TensorFlow; transformers renames them."""
HEADS = re.compile(
    r"(?<!discriminator_)(?<!mask_)predictions|lm_head|lm_loss|vocab_|pred_layer|^head\."
)
"""Parts of the names of LM heads' tensors."""
HEADLESS = ("bart", "mbart", "mvp")
"""Types whose LM head may be nothing but the word embeddings."""
OTHER_HEADS = re.compile(r"^(classification_head|qa_outputs)\.")
"""Names of tensors of their other heads: a model that has one was trained for something else."""
CODED = ("AutoModel", "AutoModelForMaskedLM", "AutoModelForPreTraining")
"""Classes by which a checkpoint may name code of its own for what is read of it."""


def open_config(name: str | Path, *, where: str, revision: str = "", needs: str = "") -> Any:
    """Look at a checkpoint without loading it.

    Args:
        name: Folder or hub id; a ``Path`` is a folder.
        where: Stage and what is asked for, for errors: ``teacher: model``.
        revision: Branch, tag or commit on the hub; "": the newest.
        needs: What to do where the folder is missing, for the error.

    Returns:
        Its configuration, without requests for other outputs; of DeBERTas with the ``legacy``
        that its tensors ask for, of ModernBERT with a local theta.

    Raises:
        UserError: It cannot be found, is no masked LM, or a file is absent, damaged, or in another
            format.
    """
    folder = folder_of(name, where=where, revision=revision, needs=needs)
    config = configuration(folder or name, where, revision)
    family_of(config, f"{where} {str(name)!r}")
    check_settings(config, f"{where} {str(name)!r}")
    put_right(config, _tensors(folder, name, where, revision))
    return config


def check_head(config: Any, name: str | Path, *, where: str, revision: str = "") -> None:
    """Whether a checkpoint holds an LM head at all, by the names in its weight files.

    Whether it is whole is left to :func:`open_model`.

    Raises:
        UserError: It does not.
    """
    names = _tensors(folder_of(name, where=where, revision=revision), name, where, revision)
    require(
        any(map(HEADS.search, names))
        or (config.model_type in HEADLESS and not any(map(OTHER_HEADS.search, names))),
        f"{where} must hold a trained masked-LM head, got {str(name)!r} with none among its "
        f"{len(names)} tensors; use a checkpoint that was saved with it (it would be random)",
    )
    if config.model_type in ("deberta", "deberta-v2"):
        _check_head_of_deberta(config, names, name, where)


def _check_head_of_deberta(config: Any, names: Shapes, name: str | Path, where: str) -> None:
    """Refuse the head that DeBERTa's authors published where it does not fit the model's states.

    That of v3 belongs to the generator. That of v1 and v2 reads what a decoder makes of the states
    and of positions, which transformers leaves out.
    """
    if not any(n.startswith("lm_predictions.") for n in names):
        return
    train = "use another model, or train its head with transformers first"
    require(
        not any(n.startswith("mask_predictions.") for n in names),
        f"{where} must hold a head that was trained to fill masks, got {str(name)!r}, a "
        "discriminator of replaced tokens (mask_predictions) with the head of its generator, which "
        f"is another model; {train}",
    )
    positions = "deberta.embeddings.position_embeddings.weight"
    require(
        config.position_biased_input or positions not in names,
        f"{where} must hold a head that reads the states of its encoder, got {str(name)!r}, whose "
        f"head reads those of a mask decoder ({positions}), which transformers leaves out; {train}",
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
    code = own_code(vars(config))
    options = {"config": config, **source(folder, revision), **options}
    wanted = f"{where} must be a model that transformers can read, got {str(name)!r}"
    model, info = _read(model_class, folder or name, options, wanted, code)
    tell_own_code(vars(config), CODED, model, f"{where} {str(name)!r}")
    vars(model.config).pop("auto_map", None)  # of a copy, the code would be missing
    prefix = f"{model.base_model_prefix}."

    def needed(key: str) -> bool:
        return not new_head or (key.startswith(prefix) and "pooler" not in key)

    missing = set(map(str, info["missing_keys"])) | passed_over(model, names)
    lost = sorted(filter(needed, missing - filled_by_tying(model, names)))
    require_all(lost, info["unexpected_keys"], type(model).__name__, name, where, code)
    wrong = [entry for entry in info["mismatched_keys"] if needed(entry[0])]
    require_shapes(wrong, name, where, code)
    read_in_one_language(model, where, name)
    run_norms_first(model)
    if not new_head:
        tell_left_out(type(model).__name__, map(str, info["unexpected_keys"]), where, name)
        note_untied(model)
        head = ((n, p) for n, p in model.named_parameters() if not n.startswith(prefix))
        tell_untrained(head, getattr(config, "vocab_size", 0), where, name)
    return model, info


def _read(
    model_class: Any, place: str | Path, options: dict[str, Any], wanted: str, code: str
) -> tuple[Any, dict[str, Any]]:
    try:
        with quiet():
            found: tuple[Any, dict[str, Any]] = model_class.from_pretrained(
                place,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused by the caller, by name
                **options,
            )
    except Exception as error:  # OSError, ValueError, RuntimeError and the parsers' own types
        raise UserError(f"{wanted}: {reason_of(error)}{code and f'; {code}'}") from None
    return found


def configuration(place: str | Path, where: str, revision: str = "") -> Any:
    """The configuration of a checkpoint, a folder or a hub id, whatever model it is of.

    Raises:
        UserError: It is absent, damaged, or unknown to transformers.
    """
    from transformers import AutoConfig

    if isinstance(place, Path):
        path = place / "config.json"
    else:
        from huggingface_hub import HfApi, hf_hub_download

        with _asking_the_hub(place, where):
            adapter = HfApi().file_exists(place, ADAPTER, revision=revision or None)
            require_merged(adapter, place, where)
            path = Path(hf_hub_download(place, "config.json", revision=revision or None))
    values = read_config(path, where)
    folder = place if isinstance(place, Path) else None
    try:
        with quiet():
            found = AutoConfig.from_pretrained(place, **source(folder, revision))
    except Exception as error:  # also the hub client's own types
        code = "" if values["model_type"] in CONFIG_MAPPING else own_code(values)
        raise UserError(
            f"{where}: config.json must be one that transformers can read, got {path} of type "
            f"{values['model_type']!r}{f'; {code}' if code else f': {reason_of(error)}'}"
        ) from None
    # The usual one: "eager" of a config.json would add our masks, which are booleans, to scores.
    found._attn_implementation = None
    return found


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
            names = names_on_hub(str(name), revision)
            raise UserError(other_weights(names, str(name), where, revision)) from None
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

"""A model and its tokenizer as the files that ``from_pretrained`` reads.

Of transformers 5, and of 4 and the programs that know its names alone: what the former has renamed
is written so that both find it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from distilcache.data.storage.files import read_json, write_bytes, write_json
from distilcache.stages.models.weight_files import WEIGHTS

TOKENIZER = "tokenizer_config.json"


def write_weights(model: PreTrainedModel, folder: Path) -> None:
    """Write the weights; the file is whole or absent."""
    own = own_tensors(model)
    # transformers 4.44 to 4.48 put zeros in place of a tied bias that is not there by both names.
    biases = {n: t for n, t in model.state_dict().items() if n not in own and n.endswith(".bias")}
    tensors = {name: tensor.cpu().clone() for name, tensor in {**own, **biases}.items()}
    write_bytes(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))


def config_json(model: PreTrainedModel) -> bytes:
    """The content of ``config.json``."""
    config = model.config
    config.architectures = [type(model).__name__]
    config.name_or_path = ""  # A model that was opened names its folder on this machine.
    values = json.loads(config.to_json_string(use_diff=False))
    if config.model_type == "modernbert":
        values |= _as_published(values)
    return (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()


def _as_published(modernbert: Mapping[str, Any]) -> dict[str, Any]:
    """A ModernBERT's bases of rotations and order of attention by their first names.

    No order where it has not the published form; see :func:`global_distance`.
    """
    rope, name = modernbert["rope_parameters"], "global_attn_every_n_layers"
    distance = global_distance(modernbert["layer_types"], int(modernbert.get(name) or 0))
    return {
        "global_rope_theta": rope["full_attention"]["rope_theta"],
        "local_rope_theta": rope["sliding_attention"]["rope_theta"],
        **({name: distance} if distance else {}),
    }


def global_distance(layer_types: Sequence[str], given: int = 0) -> int:
    """Layers from one with global attention to the next, the first being one.

    0: it is not always as many. Where the first alone is one, ``given`` is right if it is no less
    than the number of layers.
    """
    full = [at for at, kind in enumerate(layer_types) if kind == "full_attention"]
    distance = full[1] if len(full) > 1 else max(given, len(layer_types))
    return distance if full == list(range(0, len(layer_types), distance)) else 0


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the files of a tokenizer, or of what a script passes in its place."""
    tokenizer.save_pretrained(folder)
    if (path := folder / TOKENIZER).is_file():
        write_json(path, with_first_names(read_json(path, "tokenizer")))


def with_first_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is in ``tokenizer_config.json``, by the names of transformers 4, which 5 reads, too."""
    values = dict(settings)
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
        # 4 would add token types, which many models do not take.
        values.setdefault("model_input_names", ["input_ids", "attention_mask"])
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    return values


def own_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor, tied ones once: by the encoder's name, not by the LM head's.

    Else a model without the LM head would not find its word embeddings.
    """
    tied = model.all_tied_weights_keys
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}

"""A model as the files that ``from_pretrained`` reads."""

from pathlib import Path

from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from distilcache.data.storage.files import write_bytes
from distilcache.stages.models.weight_files import WEIGHTS


def write_weights(model: PreTrainedModel, folder: Path) -> None:
    """Write the weights; the file is whole or absent."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in own_tensors(model).items()}
    write_bytes(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))


def config_json(model: PreTrainedModel) -> bytes:
    """The content of ``config.json``."""
    model.config.architectures = [type(model).__name__]
    model.config.name_or_path = ""  # A model that was opened names its folder on this machine.
    content: str = model.config.to_json_string(use_diff=False)
    return content.encode()


def own_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor, tied ones once: by the encoder's name, not by the LM head's.

    Else a model without the LM head would not find its word embeddings.
    """
    tied = model.all_tied_weights_keys
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}

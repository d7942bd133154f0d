"""``distilcache export --sentence-transformers``: a student's encoder with mean pooling.

A student's own folder opens there as well, but its LM head is then listed as unexpected weights.
"""

import json
from pathlib import Path
from typing import Any

from distilcache.data.errors import require
from distilcache.data.storage.locks import new_output, require_new
from distilcache.pipeline.report.text import short_bytes

MODULES = (
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
)
"""Names that versions 2 to 6 know."""
_USE = """\
# {name}

The encoder of a masked language model; a text's embedding is the mean of its last hidden states. It
was not trained to compare texts: fine-tune it for that.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{place}")
embeddings = model.encode(["a text", "another text"])  # float32 [2, {width}]
```
"""


def sentences_command(student: Path, folder: Path) -> tuple[dict[str, Any], str]:
    """Write the encoder of a masked LM in the layout of sentence-transformers.

    Args:
        student: Folder of a trained student, or of any checkpoint of its kind.
        folder: What is written; must not exist.

    Returns:
        Values for JSON, and the text for people.

    Raises:
        UserError: Bad input.
    """
    from distilcache.stages.evaluate.masked_lms import read_model
    from distilcache.stages.models.families import max_length, shape_of
    from distilcache.stages.models.hub import quiet
    from distilcache.stages.models.opened import has_norms_first
    from distilcache.stages.models.saving import config_json, save_tokenizer
    from distilcache.stages.models.tokenizers import load_tokenizer
    from distilcache.stages.student_train.output import require_sound

    require_new(folder, "export: folder")
    require(
        folder.parent.is_dir(), f"export: folder's parent must exist, got {str(folder.parent)!r}"
    )
    require_sound(student, "export")
    model = read_model(student, "export: student")
    config = model.config
    require(
        not getattr(config, "is_encoder_decoder", False),
        f"export: student must be an encoder alone, got {config.model_type} from {student}; mean "
        "pooling would take its decoder's states",
    )
    require(
        not has_norms_first(config),
        f"export: student must be a model that transformers 5 runs, got {student}, a FlauBERT with "
        "norms first (pre_norm); export it to ONNX",
    )
    tokenizer = load_tokenizer(student, where="export: tokenizer")
    width = shape_of(config).width
    reach = {"max_seq_length": max_length(config), "do_lower_case": False}
    pooling = {"word_embedding_dimension": width, "pooling_mode_mean_tokens": True}
    with new_output(folder, "export", "folder") as part:
        with quiet():
            encoder = _encoder(model)
            encoder.save_pretrained(part)
        (part / "config.json").write_bytes(config_json(encoder))
        save_tokenizer(tokenizer, part)
        _write(part / "modules.json", MODULES)
        _write(part / "sentence_bert_config.json", reach)
        (part / "1_Pooling").mkdir()
        _write(part / "1_Pooling" / "config.json", pooling)
        (part / "README.md").write_text(_card(student, folder.name, width, config.model_type))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    values = {"path": str(folder), "student": str(student), "bytes": size, "width": width}
    return values, (
        f"export: {folder}: {short_bytes(size)}, the encoder with mean pooling, for "
        f"sentence-transformers and AutoModel"
    )


def _encoder(model: Any) -> Any:
    """The model without its LM head, with all that ``AutoModel`` asks for."""
    import torch
    from transformers import AutoModel

    with torch.random.fork_rng(devices=[]):
        # For a pooler over [CLS], where the type has one; nothing here reads it.
        torch.default_generator.manual_seed(0)
        encoder = AutoModel.from_config(model.config)
    encoder.load_state_dict(model.base_model.state_dict(), strict=False)
    ids = torch.arange(2, 7).remainder(model.config.vocab_size)[None]
    with torch.no_grad():
        ours, theirs = (m(ids).last_hidden_state for m in (encoder.eval(), model.base_model))
    require(
        torch.equal(ours, theirs),
        f"export: encoder of {model.config.model_type} must give the student's own states, got "
        "others; nothing was written",
    )
    return encoder


def _write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _card(student: Path, name: str, width: int, model_type: str) -> str:
    from distilcache.stages.models.cards import PLACE, card, origin_of_model

    return str(
        card(
            _USE.format(name=name, place=PLACE, width=width),
            pipeline_tag="feature-extraction",
            tags=["sentence-transformers", model_type],
            origin=origin_of_model(student),
            library="sentence-transformers",
        )
    )

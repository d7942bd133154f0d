"""The fast kind of an ESM's tokenizer, which transformers lacks: proteins and DNA."""

from typing import Any

import tokenizers
from transformers import PreTrainedTokenizerFast


def fast_esm(slow: Any) -> PreTrainedTokenizerFast:
    """A tokenizer that cuts text as the slow one does.

    Text is cut into the longest tokens of the vocabulary; what lies between them is unknown. No
    token separates two texts but the end token, which DNA's may lack.
    """
    words = sorted(set(slow.all_tokens) - set(slow.all_special_tokens))
    model = tokenizers.models.WordLevel(slow.get_vocab(), unk_token=slow.unk_token)
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in words])
    cls, eos = slow.cls_token, slow.eos_token
    end = f" {eos}" if eos else ""
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{cls} $A{end}",
        pair=f"{cls} $A{end} $B{end}",
        special_tokens=[(t, slow.convert_tokens_to_ids(t)) for t in (cls, eos) if t],
    )
    roles = ("unk_token", "cls_token", "pad_token", "mask_token", "eos_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        name_or_path=slow.name_or_path,
        sep_token=slow.eos_token,
        model_max_length=slow.model_max_length,
        model_input_names=slow.model_input_names,
        **{role: getattr(slow, role) for role in roles},
    )

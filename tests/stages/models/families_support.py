"""Tiny models of every family, each with random weights and a tokenizer of its own type."""

import json
from functools import cache

import tokenizers
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from distilcache.stages.models.encoder import from_config, model_class
from distilcache.stages.models.families import FAMILIES, FFN_FIELDS, Family
from distilcache.stages.models.wordpiece import train_wordpiece
from tests.builders import WORDS, random_texts

TYPES = (*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "xlnet")
"""All that transformers has."""
REFUSED = [kind for kind in TYPES if FAMILIES.get(kind, Family()).refused]
WORKING = [kind for kind in TYPES if kind not in REFUSED]
EVEN = [kind for kind in WORKING if FAMILIES.get(kind, Family()).even]
FAMOUS = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "albert",
          "mobilebert", "deberta-v2", "modernbert", "xlnet")  # fmt: skip
"""Types that tests of everything are run with, each with a tokenizer of its own type."""
BYTES = {"roberta": "RobertaTokenizer", "modernbert": ""}
UNIGRAM = {
    "xlm-roberta": "XLMRobertaTokenizer",
    "camembert": "CamembertTokenizer",
    "albert": "AlbertTokenizer",
    "deberta-v2": "DebertaV2Tokenizer",
    "xlnet": "XLNetTokenizer",
}
SIZE = 150
"""Ids of a vocabulary, about."""
SEQ2SEQ = {"decoder_layers": 3, "decoder_attention_heads": 2, "decoder_ffn_dim": 48,
           "decoder_start_token_id": 2}  # fmt: skip
EXTRAS = {
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16, "num_hidden_groups": 2},
    # Without norms, larger weights would blow up the rounding of float32.
    "mobilebert": {
        "embedding_size": 12,
        "intra_bottleneck_size": 16,
        "num_feedforward_networks": 2,
        "initializer_range": 0.1,
    },
    "deberta-v2": {
        "relative_attention": True,
        "position_buckets": 4,
        "pos_att_type": ["p2c", "c2p"],
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "conv_kernel_size": 3,
    },
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 2},
    "bart": SEQ2SEQ,
    "mbart": SEQ2SEQ,
    "mvp": SEQ2SEQ,
    "longformer": {"attention_window": [4, 8, 4]},
    "convbert": {"embedding_size": 16},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 24},
    "xmod": {"languages": ["en_XX", "de_DE"], "default_language": "de_DE"},
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    "esm": {"token_dropout": True, "mask_token_id": 4, "position_embedding_type": "rotary"},
    "luke": {"entity_vocab_size": 7, "entity_emb_size": 8},
    "squeezebert": {"embedding_size": 32, **dict.fromkeys(
        ("q_groups", "k_groups", "v_groups", "post_attention_groups", "intermediate_groups",
         "output_groups"), 2)},
    "funnel": {"block_sizes": [2, 1], "num_decoder_layers": 2, "d_head": 16,
               "initializer_std": 0.1},
    "tapas": {"type_vocab_sizes": [3, 2, 2, 2, 2, 2, 2]},
    "eurobert": {"num_key_value_heads": 2, "head_dim": 16},
}  # fmt: skip
"""What sets a type's checkpoints apart, in small."""


@cache
def byte_pairs():
    """Vocabulary and merges of byte-level BPE, without special tokens."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted({c for line in random_texts() for c in line.replace(" ", "Ġ")})
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=SIZE, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(random_texts(), trainer)

    state = json.loads(model.to_str())["model"]
    return state["vocab"], [tuple(pair) for pair in state["merges"]]


@cache
def pieces():
    """Pieces and scores of a Unigram model like SentencePiece's: characters and some words."""
    letters = sorted({c for line in random_texts() for c in line if c != " "})
    parts = ["▁", *letters, *(f"▁{word}" for word in WORDS[::2]), *(w[:3] for w in WORDS[1::2])]
    return [(piece, -1.0 - 8 / len(piece)) for piece in dict.fromkeys(parts)]


def marks_word_ends():
    """A BPE whose tokens say that they end a word, of words that BERT's rules cut, as HerBERT's."""
    roles = {"cls": "<s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}
    model = tokenizers.models.BPE(unk_token="<unk>", end_of_word_suffix="</w>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.decoder = tokenizers.decoders.BPEDecoder(suffix="</w>")
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=[*roles.values()], end_of_word_suffix="</w>",
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(random_texts(), trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    names = {f"{role}_token": token for role, token in roles.items()}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


def make_tokenizer(kind):
    """A tokenizer of the type that the family's checkpoints come with; else WordPiece."""
    if kind not in UNIGRAM and kind not in BYTES:
        return train_wordpiece(random_texts(), SIZE)
    if kind in UNIGRAM:
        tokenizer_class = getattr(transformers, UNIGRAM[kind])
        special = {
            "xlm-roberta": ["<s>", "<pad>", "</s>", "<unk>"],
            "camembert": ["<s>", "<pad>", "</s>", "<unk>"],
            "albert": ["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"],
            "deberta-v2": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
            "xlnet": [
                "<unk>",
                "<s>",
                "</s>",
                "<cls>",
                "<sep>",
                "<pad>",
                "<mask>",
                "<eod>",
                "<eop>",
            ],
        }[kind]
        vocabulary = [(token, 0.0) for token in special] + pieces()
        return tokenizer_class(vocab=vocabulary)
    ids, merges = byte_pairs()
    if kind == "roberta":
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        vocabulary = {token: i for i, token in enumerate([*special, *ids])}
        return transformers.RobertaTokenizer(vocab=vocabulary, merges=merges)
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    vocabulary = {token: i for i, token in enumerate([*special, *ids])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    names = {f"{t[1:-1].lower()}_token": t for t in special}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def make_model(kind, vocab_size, layers=3, **more):
    """A model none of whose parameters is zero, nor its norms one."""
    kind_config = CONFIG_MAPPING[kind]
    own = kind_config.attribute_map
    values = {
        "num_hidden_layers": layers,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "max_position_embeddings": 40,
    }
    values = {own.get(name, name): value for name, value in values.items()}
    if kind in ("xlnet", "funnel"):  # of any length; layers in blocks
        values = {k: v for k, v in values.items() if k != "max_position_embeddings"}
    if kind == "funnel":
        values = {k: v for k, v in values.items() if k != "num_hidden_layers"}
    values |= dict.fromkeys(_ffn_fields(kind_config), 48)
    values |= {
        "vocab_size": vocab_size,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
        **EXTRAS.get(kind, {}),
        **more,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = from_config(kind_config(**values)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def _ffn_fields(kind_config):
    return [name for name in FFN_FIELDS if hasattr(kind_config(), name)]


def save_teacher(kind, folder, **more):
    """Model and tokenizer of a family in one folder."""
    tokenizer = make_tokenizer(kind)
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "cls_token_id": tokenizer.cls_token_id,
        "sep_token_id": tokenizer.sep_token_id,
    }
    model = make_model(kind, len(tokenizer), **{**ids, **more})
    return save_with_tokenizer(model, tokenizer, folder)


def save_with_tokenizer(model, tokenizer, folder):
    """A checkpoint as others publish theirs."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def same_logits(a, b, padded=True):
    """Asserts that two models say the same, of padded sequences too."""
    ids = torch.randint(5, a.config.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:] = int(not padded)
    with torch.inference_mode():
        left, right = (
            m.eval()(input_ids=ids, attention_mask=mask).logits[mask.bool()] for m in (a, b)
        )
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def open_model(folder):
    """The checkpoint as plain transformers opens it."""
    config = transformers.AutoConfig.from_pretrained(folder)
    return model_class(config).from_pretrained(folder).eval()


@torch.no_grad()
def plain_outputs(model, ids, masked):
    """Logits [M, V] and hidden states of all layers [M, D] of one sequence, by the model alone.

    Args:
        model: From :func:`open_model`.
        ids: Token ids of the sequence, without padding.
        masked: Its masked positions, which XLNet's permutation puts last.
    """
    ids = torch.as_tensor(ids)[None]
    if model.config.model_type != "xlnet":
        output = model(ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
        inner = output.get("hidden_states") or output["decoder_hidden_states"]
        whole = [states for states in inner if states.shape[1] == ids.shape[1]]  # Funnel pools
        return output.logits[0, masked], [states[0, masked] for states in whole]
    length = ids.shape[1]
    hidden = torch.zeros(1, length, length)
    targets = torch.zeros(1, len(masked), length)
    for row, position in enumerate(masked):
        hidden[0, :, position] = 1
        targets[0, row, position] = 1
    output = model(ids, perm_mask=hidden, target_mapping=targets, output_hidden_states=True)
    query_streams = [states for states in output.hidden_states if states.shape[1] == len(masked)]
    return output.logits[0], [states[0] for states in query_streams]

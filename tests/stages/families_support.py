"""Tiny models of every family, each with random weights and a tokenizer of its own type."""

import json
from functools import cache

import tokenizers
import torch
import transformers

from data.families import FAMILIES
from data.tokenizers import train_wordpiece
from tests.builders import WORDS, random_texts

WORDPIECE = ("bert", "distilbert", "electra", "mobilebert")
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
}
"""What sets a family's checkpoints apart, in small."""


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


def make_tokenizer(kind):
    """A tokenizer of the type that the family's checkpoints come with."""
    if kind in WORDPIECE:
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
    family = FAMILIES[kind]
    values = {
        "vocab_size": vocab_size,
        "initializer_range": 0.2,
        family.num_layers: layers,
        family.width: 32,
        family.heads: 2,
        family.ffn: 48,
        **({family.positions: 40} if family.positions else {}),
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
        config = getattr(transformers, family.config)(**values)
        model = getattr(transformers, family.model)(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save_teacher(kind, folder):
    """Model and tokenizer of a family in one folder."""
    tokenizer = make_tokenizer(kind)
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "cls_token_id": tokenizer.cls_token_id,
        "sep_token_id": tokenizer.sep_token_id,
    }
    return save_with_tokenizer(make_model(kind, len(tokenizer), **ids), tokenizer, folder)


def save_with_tokenizer(model, tokenizer, folder):
    """A checkpoint as others publish theirs."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def same_logits(a, b):
    """Asserts that two models say the same, of padded sequences too."""
    ids = torch.randint(5, a.config.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    with torch.inference_mode():
        left, right = (
            m.eval()(input_ids=ids, attention_mask=mask).logits[mask.bool()] for m in (a, b)
        )
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def open_model(folder):
    """The checkpoint as plain transformers opens it."""
    config = transformers.AutoConfig.from_pretrained(folder)
    opened = getattr(transformers, FAMILIES[config.model_type].model).from_pretrained(folder)
    return opened.eval()


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
        output = model(ids, torch.ones_like(ids), output_hidden_states=True)
        return output.logits[0, masked], [states[0, masked] for states in output.hidden_states]
    length = ids.shape[1]
    hidden = torch.zeros(1, length, length)
    targets = torch.zeros(1, len(masked), length)
    for row, position in enumerate(masked):
        hidden[0, :, position] = 1
        targets[0, row, position] = 1
    output = model(ids, perm_mask=hidden, target_mapping=targets, output_hidden_states=True)
    query_streams = [states for states in output.hidden_states if states.shape[1] == len(masked)]
    return output.logits[0], [states[0] for states in query_streams]

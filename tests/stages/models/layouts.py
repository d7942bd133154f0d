"""Checkpoints laid out as people publish them, each made anew from a tiny random model.

A row names a public checkpoint, or its kind; what it has otherwise than ``save_pretrained`` leaves
it today; and what becomes of it. ``docs/teachers.md`` is written from these rows.
"""

import io
import itertools
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

from distilcache.stages.models.wordpiece import BERT_SPECIAL_TOKENS, train_wordpiece
from tests.builders import random_texts
from tests.stages.models.families_support import byte_pairs, make_model, make_tokenizer, pieces

OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 438\n"
PRETRAINED = {"cls.seq_relationship.weight": (2, 32), "cls.seq_relationship.bias": (2,),
              "bert.pooler.dense.weight": (32, 32), "bert.pooler.dense.bias": (32,)}  # fmt: skip
"""Tensors beside the masked LM in what BERT's authors trained."""
ROBERTA = {"lm_head.decoder": "", "roberta.pooler.dense.weight": (32, 32)}
NO_HEAD = "must hold a trained masked-LM head"
Files = Mapping[str, str | bytes]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One checkpoint."""

    name: str
    quirk: str
    """What is laid out otherwise, for the page."""
    kind: str = "bert"
    verdict: str = "exactly"
    """``exactly``; ``with ...``, see ``remedy``; or ``refused: ...``."""
    remedy: str = ""
    """Key of what the test does first, as the refusal says."""
    error: str = ""
    """Of the refusal, a regular expression."""
    notice: str = ""
    """Of the line that is printed before the remedy."""
    model: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the model."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Put into config.json; None: taken out."""
    rename: Mapping[str, str] = field(default_factory=dict)
    """Parts of names in the file."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Tensors that are added, by shape; "": those of this prefix are taken out."""
    headless: bool = False
    """Only the encoder is saved."""
    file: str = "safetensors"
    """``safetensors``, ``bin``, ``shards``, ``pointer`` or ``cut``."""
    dtype: torch.dtype = torch.float32
    tokenizer: Callable[[], tuple[Any, Files]] | None = None
    """The tokenizer in memory and the files that are published of it; None: today's."""
    needs: str = ""
    """A package without which transformers cannot read the tokenizer."""
    tied: bool = False
    """The decoder is the word embeddings, though today's library keeps two copies."""

    def make(self, folder: Path) -> tuple[Any, Any]:
        """Write the checkpoint; returns model and tokenizer as they were trained."""
        words, files = self.tokenizer() if self.tokenizer else (make_tokenizer(self.kind), None)
        ids = {f"{n}_token_id": getattr(words, f"{n}_token_id") for n in ("pad", "cls", "sep")}
        ids |= {"bos_token_id": ids["cls_token_id"], "eos_token_id": ids["sep_token_id"]}
        ids = {name: value for name, value in ids.items() if value is not None}
        settings = {**ids, **self.model}
        size = settings.pop("vocab_size", len(words))
        model = make_model(self.kind, size, **settings).to(self.dtype)
        if self.tied:
            weight = model.get_input_embeddings().weight
            model.get_output_embeddings().weight.data.copy_(weight.data)
        (model.base_model if self.headless else model).save_pretrained(folder)
        path = folder / "config.json"
        values = {**json.loads(path.read_text()), **self.config}
        path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
        if files is None:
            words.save_pretrained(folder)
        for name, content in (files or {}).items():
            data = content if isinstance(content, bytes) else content.encode()
            (folder / name).write_bytes(data)
        self._write_weights(folder, model)
        return model.float(), words

    def _write_weights(self, folder: Path, model: Any) -> None:
        path = folder / "model.safetensors"
        tensors = {}
        for name, tensor in load_file(path).items():
            for part, new in self.rename.items():
                name = name.replace(part, new)
            tensors[name] = tensor.clone()
        for name, shape in self.extra.items():
            tensors = {k: t for k, t in tensors.items() if shape != "" or not k.startswith(name)}
            if shape != "":
                tensors[name] = torch.ones(shape)
        save_file(tensors, path, metadata={"format": "pt"})
        if self.file == "bin":
            torch.save(tensors, folder / "pytorch_model.bin")
            path.unlink()
        elif self.file == "shards":
            path.unlink()
            model.save_pretrained(folder, max_shard_size="20KB")
        elif self.file == "pointer":
            path.write_text(POINTER)
        elif self.file == "cut":
            path.write_bytes(path.read_bytes()[:-1000])


def wordpiece(*, config: Mapping[str, Any] | None = None, cased: bool = False) -> Any:
    """vocab.txt, and of the rest of a tokenizer's files at most its settings."""
    words = train_wordpiece(random_texts(), 150).get_vocab()
    if cased:
        words |= {name: len(words) + i for i, name in enumerate(("Amber", "River", "Zebra"))}
    trained = transformers.BertTokenizer(vocab=words, do_lower_case=not cased)
    files = {"vocab.txt": "\n".join(sorted(words, key=lambda word: words[word]))}
    if config is not None:
        files["tokenizer_config.json"] = json.dumps(config)
    return trained, files


def chinese() -> Any:
    """A character is a word."""
    letters = [*BERT_SPECIAL_TOKENS, *map(chr, range(0x4E00, 0x4E40))]
    words = {word: i for i, word in enumerate(letters)}
    return transformers.BertTokenizer(vocab=words), {"vocab.txt": "\n".join(letters)}


def merges() -> Any:
    """vocab.json and merges.txt, as RoBERTa's."""
    words = make_tokenizer("roberta")
    lines = "\n".join(" ".join(pair) for pair in byte_pairs()[1])
    return words, {"vocab.json": json.dumps(words.get_vocab()), "merges.txt": lines}


def sentencepiece_alone() -> Any:
    """A sentencepiece model without tokenizer.json."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(random_texts()), model_writer=written, vocab_size=90,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    found = [(model.id_to_piece(i), model.get_score(i)) for i in range(3, len(model))]
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    words = transformers.XLMRobertaTokenizer(vocab=special + found)
    return words, {"sentencepiece.bpe.model": written.getvalue()}


def begin_and_end() -> Any:
    """A sequence begins with bos and ends with eos; there is no cls and no sep."""
    words = {token: i for i, (token, _) in enumerate(pieces())}
    roles = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>",
             "mask_token": "<|mask|>", "unk_token": "<|unk|>"}  # fmt: skip
    ids = {token: len(words) + i for i, token in enumerate(roles.values())}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words | ids, unk_token="<|unk|>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A <|end|>",
        special_tokens=[(name, ids[name]) for name in ("<|begin|>", "<|end|>")],
    )
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    return made, {"tokenizer.json": made.backend_tokenizer.to_str(),
                  "tokenizer_config.json": json.dumps(roles)}  # fmt: skip


def letters_of(words: list[str], **settings: Any) -> Callable[[], Any]:
    """An ESM's: vocab.txt, read by a tokenizer that has no fast kind."""

    def make() -> Any:
        names = ["<cls>", "<pad>", "<eos>", "<unk>", *words, "<mask>"]
        files = {"vocab.txt": "\n".join(names), "tokenizer_config.json": json.dumps(settings)}
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(files["vocab.txt"])
            file.flush()
            return transformers.EsmTokenizer(file.name, **settings), files

    return make


def unknown_twice() -> Any:
    """A Unigram vocabulary with two pieces of one name; text becomes the first."""
    special = ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>", "<s>", "</s>"]
    listed = [*((token, 0.0) for token in special), *pieces(), ("<mask>", 0.0)]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(listed, 3))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 5), ("</s>", 6)]
    )
    backend.add_special_tokens([*special, "<mask>"])
    roles = {"cls": "<s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{role}_token": token for role, token in roles.items()}
    )
    return made, {"tokenizer.json": backend.to_str(),
                  "tokenizer_config.json": '{"model_max_length": 512}'}  # fmt: skip


def with_entities(name: str, made: Callable[[], Any]) -> Callable[[], Any]:
    """Files of a tokenizer of text and entities, of which the model's words know two."""

    def make() -> Any:
        words, files = made()
        words.add_special_tokens({"additional_special_tokens": ["<ent>", "<ent2>"]})
        ids = {token: words.convert_tokens_to_ids(token) for token in ("<ent>", "<ent2>")}
        entities = {f"[{name}]": i for i, name in enumerate(("PAD", "UNK", "MASK", "MASK2"))}
        more = {"added_tokens.json": ids, "entity_vocab.json": entities,
                "tokenizer_config.json": {"tokenizer_class": name, "task": None}}  # fmt: skip
        return words, files | {file: json.dumps(content) for file, content in more.items()}

    return make


def shared_ids() -> Any:
    """vocab.json with two tokens of one id."""
    words, files = merges()
    ids = words.get_vocab()
    one, other = sorted(ids)[-2:]
    ids[one] = ids[other]
    return words, {**files, "vocab.json": json.dumps(ids)}


def rules_of_its_own() -> Any:
    """A tokenizer.json that is read as that of a BERT."""
    backend = train_wordpiece(random_texts(), 150).backend_tokenizer
    backend.normalizer = tokenizers.normalizers.NFKC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    roles = {f"{token[1:-1].lower()}_token": token for token in BERT_SPECIAL_TOKENS}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    return made, {"tokenizer.json": backend.to_str(), "tokenizer_config.json": json.dumps(roles)}


def of_another_class() -> Any:
    """A tokenizer.json of WordPieces, and a class that reads merges."""
    made = train_wordpiece(random_texts(), 150)
    roles = {f"{token[1:-1].lower()}_token": token for token in BERT_SPECIAL_TOKENS}
    settings = json.dumps({"tokenizer_class": "RobertaTokenizer", **roles})
    return made, {"tokenizer.json": made.backend_tokenizer.to_str(),
                  "tokenizer_config.json": settings}  # fmt: skip


def with_adapter() -> Any:
    """Files beside which PEFT has saved an adapter."""
    words, files = wordpiece(config={"do_lower_case": True})
    return words, {**files, "adapter_config.json": '{"base_model_name_or_path": "another"}'}


def by_code(name: str, files: Callable[[], Files], **settings: Any) -> Callable[[], Any]:
    """Files of a tokenizer that is written in Python."""

    def make() -> Any:
        config = {"tokenizer_class": name, **settings}
        written = {**files(), "tokenizer_config.json": json.dumps(config)}
        with tempfile.TemporaryDirectory() as folder:
            for file, content in written.items():
                Path(folder, file).write_text(str(content))
            return transformers.AutoTokenizer.from_pretrained(folder), written

    return make


def japanese() -> Files:
    """vocab.txt of WordPieces."""
    words = sorted(train_wordpiece(random_texts(), 150).get_vocab())
    words = [*BERT_SPECIAL_TOKENS, *(word for word in words if word[0] != "[")]
    return {"vocab.txt": "\n".join([*words, *["東京", "##都", "に", "住む", "。"]])}


def counted_merges() -> Files:
    """vocab.txt and bpe.codes with a count in each line; pieces within a word end in @@.

    The tokenizer.json that is published beside them reads text by other rules.
    """
    letters = sorted(set("".join(random_texts())) - {" "})
    merged = ["am", "ri", "un"]
    words = [w + end for w in [*letters, *merged] for end in ("", "@@")]
    codes = [f"{word[0]} {word[1]} {9 - i}" for i, word in enumerate(merged)]
    ids = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *words])}
    rules = tokenizers.Tokenizer(tokenizers.models.BPE(ids, [], unk_token="<unk>"))
    rules.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return {"vocab.txt": "".join(f"{w} 1\n" for w in words), "bpe.codes": "\n".join([*codes, ""]),
            "tokenizer.json": rules.to_str()}  # fmt: skip


def moses() -> Files:
    """vocab.json and merges.txt of pieces, of which the last of a word ends in </w>."""
    letters = sorted(set("".join(random_texts())) - {" "})
    words = ["<s>", "</s>", "<pad>", "<unk>", *(f"<special{i}>" for i in range(10))]
    words += [w + end for w in [*letters, "am", "ri"] for end in ("", "</w>")]
    vocabulary = json.dumps({word: i for i, word in enumerate(words)})
    return {"vocab.json": vocabulary, "merges.txt": "#version: 0.2\na m 9\nr i 8\n"}


def row(name: str, quirk: str, kind: str = "bert", **rest: Any) -> Layout:
    """A layout that works, or says otherwise."""
    return Layout(name=name, quirk=quirk, kind=kind, **rest)


def refused(name: str, quirk: str, why: str, error: str, kind: str = "bert", **rest: Any) -> Layout:
    """A layout that is refused."""
    return Layout(name=name, quirk=quirk, kind=kind, verdict=f"refused: {why}", error=error, **rest)


_BIN = {"file": "bin", "verdict": "with `distilcache convert`", "remedy": "convert",
        "error": "distilcache convert"}  # fmt: skip
_BLOCKS = 'exactly, with `corpus.packing = "blocks"`'
_CODONS = [*map("".join, itertools.product("ATCG", repeat=3)), *"ATCGN"]
LAYOUTS = (
    row("bert-base-uncased", "norms named gamma and beta; pooler and next-sentence head beside",
        rename=OLD_NAMES, extra={**PRETRAINED, "bert.embeddings.position_ids": (1, 40)}),
    row("bert-base-cased", "the same; vocab.txt and `do_lower_case` alone", rename=OLD_NAMES,
        extra=PRETRAINED, tokenizer=lambda: wordpiece(config={"do_lower_case": False}, cased=True)),
    row("bert-base-chinese", "the same; each character a word", rename=OLD_NAMES, extra=PRETRAINED,
        tokenizer=chinese),
    row("google/bert_uncased_L-2_H-128_A-2", "pickled weights; no `model_type`",
        **_BIN, config={"model_type": None}, tokenizer=wordpiece),
    row("allenai/scibert_scivocab_uncased", "pickled weights; vocab.txt alone", **_BIN,
        tokenizer=wordpiece, extra=PRETRAINED),
    row("dmis-lab/biobert-base-cased-v1.2", "pickled weights; a cased vocab.txt alone",
        **{**_BIN, "verdict": "with `distilcache convert` and `do_lower_case` false in its "
           "tokenizer_config.json", "remedy": "convert and keep case"},
        tokenizer=lambda: wordpiece(cased=True)),
    refused("ProsusAI/finbert, dslim/bert-base-NER", "a classifier's head", "no LM head", NO_HEAD,
            extra={"cls.": "", "classifier.weight": (3, 32), "classifier.bias": (3,)}),
    refused("sentence-transformers/all-MiniLM-L6-v2", "the encoder alone, its names without prefix",
            "no LM head", NO_HEAD, headless=True),
    row("cl-tohoku/bert-base-japanese", "words cut by MeCab", needs="fugashi",
        verdict="exactly, with the extra `japanese`",
        tokenizer=by_code("BertJapaneseTokenizer", japanese, do_lower_case=False,
                          word_tokenizer_type="mecab", mecab_kwargs={"mecab_dic": "ipadic"})),
    row("a BERT of another epsilon", "`layer_norm_eps` 1e-5: its students are BERTs",
        model={"layer_norm_eps": 1e-5}),
    *(row(f"a BERT of `{name}`", "an activation of several names", model={"hidden_act": name})
      for name in ("swish", "gelu_python", "gelu_fast", "gelu_new")),
    refused("a BERT of relative keys", "`position_embedding_type`",
            "transformers 5 leaves its positions out", "position_embedding_type 'relative_key'",
            config={"position_embedding_type": "relative_key"}),
    row("a BERT with code of its own", "`auto_map` in its config.json names it",
        verdict="exactly as transformers' own class, and a line says that the code is not run",
        config={"auto_map": {"AutoModelForMaskedLM": "own.OwnBert"}},
        notice="has code of its own (own.py)"),
    row("a BERT with more layers than its config says", "layers that would not be read",
        verdict="with the right `num_hidden_layers` in its config.json, as a line says",
        remedy="layers", notice="does not read: bert.encoder.layer.2 (16)",
        config={"num_hidden_layers": 2}),
    row("a BERT with adapters", "their tensors are not read",
        verdict="exactly, without them, as a line says", notice="does not read: adapters (1)",
        extra={"bert.encoder.layer.0.attention.output.adapters.x.down.weight": (4, 32)}),
    refused("a BERT with an adapter of PEFT's", "adapter_config.json", "the adapter would be left "
            "out, or the model that it names be opened", "merge_and_unload",
            tokenizer=with_adapter),
    row("a BERT of more rows than ids", "the embedding is padded to a round number",
        model={"vocab_size": 192}),
    row("a BERT with a decoder of its own", "config.json does not say so",
        model={"tie_word_embeddings": False}, config={"tie_word_embeddings": None}),
    row("a BERT that was saved to be looked into", "`output_attentions`; `return_dict` false",
        config={"output_attentions": True, "output_hidden_states": True, "return_dict": False}),
    row("a BERT in float16", "half precision, computed in float32", dtype=torch.float16),
    row("a BERT in bfloat16", "half precision, computed in float32", dtype=torch.bfloat16),
    row("a large BERT", "several files and an index", file="shards"),
    row("distilbert-base-uncased", "names of its own", "distilbert"),
    row("roberta-base", "vocab.json and merges.txt; no decoder in the file", "roberta",
        tokenizer=merges, extra=ROBERTA),
    row("xlm-roberta-base", "the LM head comes before the encoder", "xlm-roberta", extra=ROBERTA),
    row("xlm-roberta-base, older files", "sentencepiece.bpe.model alone", "xlm-roberta",
        verdict="with the extra `sentencepiece`", needs="sentencepiece",
        tokenizer=sentencepiece_alone),
    row("camembert-base", "the LM head comes before the encoder", "camembert", extra=ROBERTA),
    row("camembert-base, older files", "the piece for unknown text is there twice", "camembert",
        extra=ROBERTA, tokenizer=unknown_twice),
    refused("a RoBERTa of shared ids", "two tokens in vocab.json have one id",
            "the library would lose one of them", "an id for each token", "roberta",
            tokenizer=shared_ids),
    row("a BERT of its own rules", "they are in tokenizer.json, and of no BERT",
        verdict='with `"tokenizer_class": "PreTrainedTokenizerFast"` in its tokenizer_config.json, '
        "as a line says", remedy="rules", notice="which reads", tokenizer=rules_of_its_own),
    row("almanach/camembertv2-base", "WordPieces; transformers takes them for merges", "roberta",
        verdict="exactly, by its tokenizer.json, as a line says", notice="is read as the WordPiece",
        config={"model_name": "camembertv2-base"}, tokenizer=of_another_class),
    row("vinai/phobert-base", "bpe.codes beside a tokenizer.json", "roberta",
        tokenizer=by_code("PhobertTokenizer", counted_merges)),
    row("vinai/bertweet-base", "pickled weights; bpe.codes beside a tokenizer.json", "roberta",
        **_BIN, tokenizer=by_code("BertweetTokenizer", counted_merges)),
    row("junnyu/roformer_chinese_base", "words cut by jieba", "roformer", needs="rjieba",
        verdict="exactly, with the package `rjieba`", tokenizer=by_code(
            "RoFormerTokenizer", lambda: {"vocab.txt": japanese()["vocab.txt"] + "\n一丁\n丂"})),
    *(row(name, "pieces of words that Moses's rules cut", kind, needs="sacremoses",
          verdict="exactly, with the package `sacremoses`", tokenizer=by_code(cls, moses))
      for name, kind, cls in (("flaubert/flaubert_base_cased", "flaubert", "FlaubertTokenizer"),
                              ("FacebookAI/xlm-mlm-en-2048", "xlm", "XLMTokenizer"))),
    row("allenai/longformer-base-4096", "windows; positions from the padding id on", "longformer"),
    row("microsoft/mpnet-base", "relative positions beside absolute ones", "mpnet"),
    row("studio-ousia/luke-base", "its decoder is the word embeddings, which transformers 5 does "
        "not know", "luke", tied=True, extra={"lm_head.decoder.weight": ""},
        tokenizer=with_entities("LukeTokenizer", merges)),
    row("studio-ousia/mluke-base", "the same; sentencepiece.bpe.model alone", "luke", tied=True,
        extra={"lm_head.decoder.weight": ""}, verdict="with the extra `sentencepiece`",
        needs="sentencepiece",
        tokenizer=with_entities("MLukeTokenizer", sentencepiece_alone)),
    row("google/electra-small-generator", "the embedding is narrower than the model", "electra"),
    refused("google/electra-small-discriminator", "a head that finds replaced tokens", "no LM head",
            NO_HEAD, "electra", extra={"generator_": "",
                                       "discriminator_predictions.dense.weight": (32, 32)}),
    row("albert-base-v2", "a head for the order of sentences", "albert",
        extra={"sop_classifier.classifier.weight": (2, 32)}),
    row("google/mobilebert-uncased", "a decoder of two matrices", "mobilebert"),
    row("a DeBERTa of transformers", "BERT's kind of head", "deberta"),
    refused("microsoft/deberta-base, microsoft/deberta-v2-xlarge", "a head of its own",
            "its head reads the states of a mask decoder, which transformers leaves out",
            "head reads those of a mask decoder", "deberta",
            model={"legacy": False, "position_biased_input": False}, config={"legacy": None},
            extra={"deberta.embeddings.position_embeddings.weight": (40, 32)}),
    refused("microsoft/deberta-v3-base, microsoft/mdeberta-v3-base", "a discriminator with the "
            "head of its generator", "its head belongs to another model",
            "a discriminator of replaced tokens", "deberta-v2", model={"legacy": False},
            config={"legacy": None}, extra={"mask_predictions.dense.weight": (32, 32)}),
    row("a DeBERTa-v3 with its head trained further", "a head of its own that config.json does not "
        "mention", "deberta-v2", model={"legacy": False}, config={"legacy": None}),
    row("answerdotai/ModernBERT-base", "windows; no biases", "modernbert"),
    row("EuroBERT/EuroBERT-210m", "begin and end in place of [CLS] and [SEP]", "eurobert",
        tokenizer=begin_and_end),
    row("facebook/esm2_t6_8M_UR50D", "vocab.txt of letters, a slow tokenizer; contact head", "esm",
        tokenizer=letters_of([*"LAGVSERTIDPKQNFYMHWC"])),
    row("InstaDeepAI/nucleotide-transformer-500m-human-ref", "words of several letters; no token "
        "closes a sequence", "esm", tokenizer=letters_of(_CODONS, eos_token=None)),
    row("xlnet-base-cased", "permutation masks; masked positions alone", "xlnet"),
    row("google/bigbird-roberta-base", "taken as far as its attention is full", "big_bird"),
    row("google/fnet-base", "no attention: padding counts", "fnet", verdict=_BLOCKS),
    row("YituTech/conv-bert-base", "convolutions: padding counts", "convbert", verdict=_BLOCKS),
    row("google/rembert", "input and output embeddings of other widths", "rembert"),
    row("nghuyong/ernie-2.0-base-en", "task types", "ernie", tokenizer=wordpiece),
    row("squeezebert/squeezebert-uncased", "grouped convolutions", "squeezebert"),
    row("facebook/bart-base", "encoder and decoder; no head but the embeddings", "bart",
        tokenizer=merges),
    row("facebook/xmod-base", "no default language", "xmod", config={"default_language": None},
        verdict="with `default_language` in its config.json", remedy="language",
        error="default_language"),
    row("a Trainer's checkpoint-500", "no tokenizer", error="without tokenizer files",
        verdict="with `corpus.tokenizer`", remedy="tokenizer",
        tokenizer=lambda: (make_tokenizer("bert"), {})),
    refused("a clone without Git LFS", "pointers in place of weights", "not downloaded",
            "Git LFS pointer", file="pointer"),
    refused("a download that broke", "a weight file cut short", "damaged", "bytes", file="cut"),
    refused("a model of torch.compile", "`_orig_mod.` before all names", "no LM head by its names",
            "must hold", rename={"bert.": "_orig_mod.bert.", "cls.": "_orig_mod.cls."}),
)  # fmt: skip

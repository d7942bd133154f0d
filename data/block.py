"""One block as people read it: padded sequences, and what the teacher said at their positions.

Shapes: ``B`` sequences, ``L`` positions, ``N`` positions that carry the teacher's distribution,
``H`` positions with hidden states, ``K`` stored logits, ``V`` vocabulary, ``D`` hidden width.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from distilcache.data.cache.schema import Encoding
from distilcache.data.codecs.joined import corrected_log_probs, substituted_logits
from distilcache.data.codecs.logits import head_log_probs
from distilcache.data.errors import UserError, require
from distilcache.data.loader.dataset import batch_of
from distilcache.data.loader.window import Plan, read_piece, shuffle

if TYPE_CHECKING:
    from distilcache.data.reading import OpenCache


class Block:
    """One block: its sequences, and what the teacher said at N of their positions.

    ``block[name]`` is an array as in a training batch, see ``CachedBatches``;
    the properties are those that most people want. Arrays are torch tensors or numpy arrays, as
    the block was asked for.
    """

    def __init__(self, source: "OpenCache", number: int, as_: str) -> None:
        self.number = number
        """Its number over all rounds."""
        entry = source.cache.entry(number)
        self.round, self.shard = entry.round, entry.shard
        self._source = source
        self._as = as_
        encoding = source.encoding
        self._signal = best_signal(encoding)
        layers = tuple(held.layer for held in encoding.hidden)
        plan = Plan(encoding, self._signal, layers, restrict_ce_to_mask=False)
        size = entry.sequences
        piece = read_piece(source.cache.read_block(number), 0, size, plan)
        self._batch = batch_of(shuffle(piece, np.arange(size)), 0, size, plan)

    def __getitem__(self, name: str) -> Any:
        """One of the arrays named in ``keys()``."""
        return self._given(self._batch[name])

    def keys(self) -> list[str]:
        """Names of the arrays."""
        return list(self._batch)

    def __len__(self) -> int:
        """Sequences B."""
        return len(self._batch["input_ids"])

    def __repr__(self) -> str:
        """One line."""
        rows = len(self._batch.get("ce_index", ()))
        return (
            f"<block {self.number} of round {self.round}: {len(self)} sequences, "
            f"{len(self._batch['labels'])} masked positions, the teacher at {rows}>"
        )

    @property
    def input_ids(self) -> Any:
        """Token ids with masks applied, int64 [B, L]."""
        return self["input_ids"]

    @property
    def attention_mask(self) -> Any:
        """1 at tokens, 0 at padding, int64 [B, L]."""
        ids = self._batch["input_ids"]
        return self._given(self._batch.get("attention_mask", torch.ones_like(ids)))

    @property
    def labels(self) -> Any:
        """The masked-out token ids, -100 elsewhere, int64 [B, L]."""
        labels = torch.full_like(self._batch["input_ids"], -100)
        labels.view(-1)[self._batch["masked_index"]] = self._batch["labels"]
        return self._given(labels)

    @property
    def positions(self) -> Any:
        """Sequence and position of each of the N rows of ``teacher_log_probs``, int64 [N, 2]."""
        width = self._batch["input_ids"].shape[1]
        rows = self._rows()
        return self._given(torch.stack([rows // width, rows % width], 1))

    def text(self, sequence: int, original: bool = False) -> str:
        """A sequence in words.

        Args:
            sequence: Which one.
            original: With the masked-out tokens in their places.
        """
        ids = self._batch["input_ids"][sequence].clone()
        if original:
            labels = torch.from_numpy(np.array(self.labels))[sequence]
            ids[labels != -100] = labels[labels != -100]
        there = torch.from_numpy(np.array(self.attention_mask))[sequence] > 0
        text: str = self._source.tokenizer.decode(ids[there].tolist(), skip_special_tokens=False)
        return text

    def hidden_states(self, layer: int = -1) -> Any:
        """The teacher's hidden states at the positions ``hidden_index``, float32 [H, D].

        Args:
            layer: A stored layer; -1: the last.

        Raises:
            UserError: The cache does not hold it.
        """
        return self._given(self._hidden(layer))

    def teacher_log_probs(self, temperature: float = 1.0, rows: Any = slice(None)) -> Any:
        """The teacher's log probabilities over the vocabulary, float32 [N, V].

        Replayed from its stored hidden states through its LM head; stored logits take the places
        of replayed ones. Row n belongs to ``positions[n]``.

        Args:
            temperature: T above 0. At 1 and the temperatures of the cache the mass of the stored
                logits is known too, and codes are corrected for their bias.
            rows: Slice or index of some of the N rows: all of a large block take N x V x 4 bytes.

        Raises:
            UserError: The cache holds no hidden states of the last layer, or no teacher.
        """
        require(temperature > 0, f"cache: temperature must be above 0, got {temperature}")
        return self._given(self._log_probs(temperature, rows))

    def top_tokens(
        self, k: int = 5, temperature: float = 1.0, rows: Any = slice(None)
    ) -> list[list[tuple[str, float]]]:
        """The teacher's likeliest tokens with their probabilities, row by row.

        Args:
            k: How many; a cache without hidden states has at most those that it stores.
            temperature: T above 0; without hidden states one that the cache holds.
            rows: Slice or index of some of the N rows.
        """
        self._rows()
        if self._signal == "sparse":
            log_p, _ = self._stored(temperature, rows)
            log_p, order = log_p.topk(min(k, log_p.shape[1]))
            ids = self._batch["logit_ids"][rows].gather(1, order)
        else:
            log_p, ids = self._log_probs(temperature, rows).topk(k)
        name = self._source.tokenizer.id_to_token
        return [
            [(str(name(i)), p) for i, p in zip(*row, strict=True) if p > 0]
            for row in zip(ids.tolist(), log_p.exp().tolist(), strict=True)
        ]

    def _given(self, tensor: Tensor) -> Any:
        return tensor if self._as == "torch" else tensor.numpy()

    def _rows(self) -> Tensor:
        if "ce_index" not in self._batch:
            raise UserError(
                f"cache: {self._source.path} must hold what a teacher said, got a cache of masks "
                "or of other layers alone; make one with cache.hidden_layers=[-1]"
            )
        return self._batch["ce_index"]

    @torch.no_grad()
    def _hidden(self, layer: int) -> Tensor:
        layer = self._source.encoding.num_layers if layer == -1 else layer
        decoder = self._source.decoders.get(layer) or self._source.cache.hidden_decoder(layer)
        states: Tensor = decoder(self._batch)
        return states

    @torch.no_grad()
    def _log_probs(self, temperature: float, rows: Any) -> Tensor:
        """As in the loss, with float32 products."""
        self._rows()
        encoding, batch = self._source.encoding, self._batch
        require(
            self._signal != "sparse",
            f"cache: {self._source.path} must hold hidden states of the last layer for all log "
            "probabilities, got stored logits alone; top_tokens() reads those",
        )
        hidden_HD = self._hidden(-1)
        hidden_ND = hidden_HD[batch["ce_rows"]] if "ce_rows" in batch else hidden_HD
        logits_NV: Tensor = self._source.lm_head(hidden_ND[rows])
        codec = self._source.decoders[encoding.num_layers].codec
        bias_V = codec.bias_at(temperature) if codec else None
        if bias_V is not None:
            logits_NV = logits_NV + bias_V
        if self._signal == "replay":
            return torch.log_softmax(logits_NV / temperature, -1)
        ids_NK = batch["logit_ids"][rows]
        if temperature in _held(encoding):
            log_p_NK, log_tail_N = self._stored(temperature, rows)
            return corrected_log_probs(logits_NV / temperature, ids_NK, log_p_NK, log_tail_N)
        logits_NV = substituted_logits(logits_NV, ids_NK, batch["logit_values"][rows])
        return torch.log_softmax(logits_NV / temperature, -1)

    def _stored(self, temperature: float, rows: Any) -> tuple[Tensor, Tensor]:
        """Log probabilities of the stored tokens [N, K], and log of the rest's mass [N]."""
        held = _held(self._source.encoding)
        require(
            temperature in held,
            "cache: temperature must be one that the cache holds where it has no hidden states "
            f"({', '.join(f'{t:g}' for t in held)}), got {temperature:g}",
        )
        odds_N = self._batch["log_odds"][rows][:, held.index(temperature)]
        return head_log_probs(self._batch["logit_values"][rows], odds_N, temperature)


def _held(encoding: Encoding) -> tuple[float, ...]:
    """Temperatures at which the mass of the stored tokens is known."""
    return (1.0, *encoding.temperatures)


def best_signal(encoding: Encoding) -> str | None:
    """The name of the fullest distribution that a cache holds, as in ``train.signal``."""
    if encoding.mask_only:
        return None
    if encoding.hidden_layer() is not None:
        return "replay+head" if encoding.top_k else "replay"
    return "sparse" if encoding.stores_logits else None

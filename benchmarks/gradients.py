"""The angle between the student's gradient from a stored signal and the live one.

For a sum of batches, the gradient of L_ce by all of the student's parameters is compared between
the exact mode (float32 hidden states, which tests show to be the live teacher) and a stored signal:
the angle between the two, and the ratio of their norms. The student's encoder runs once per batch.
The *difference* of the two gradients at its output goes back through it, so that the angle's error
does not grow as the angle shrinks.

Shapes: ``B`` sequences, ``L`` positions, ``D`` hidden width.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distilcache.data.cache.cache import Cache
from distilcache.data.distribution import Distribution, TopK
from distilcache.data.loader.dataset import CachedBatches
from distilcache.stages.student_train.config import TrainConfig
from distilcache.stages.student_train.model import DistillationModel
from distilcache.stages.student_train.signals import count_positions, required_signals
from distilcache.stages.student_train.vocabulary import sampled_vocabulary


class GivenHidden(DistillationModel):
    """A student whose encoder ran before."""

    given_BLD: Tensor | None = None
    """Its last hidden states; None: it runs."""

    def encode(self, batch: Mapping[str, Tensor], rows_N: Tensor) -> Tensor:
        """Last hidden states at flat positions, [N, D]."""
        if self.given_BLD is None:
            return super().encode(batch, rows_N)
        return self.given_BLD.flatten(0, 1).index_select(0, rows_N)


@dataclass(frozen=True, slots=True)
class Gap:
    """A stored signal's gradient against the live one."""

    degrees: float
    norm_ratio: float


class Source:
    """One way to the teacher's distribution: a cache, and the signal that is read from it.

    Where ``sampled``, each batch is a step over a sample of the vocabulary.
    """

    def __init__(
        self,
        cache: Cache,
        signal: str,
        student: Any,
        batch_size: int,
        temperature: float,
        *,
        sampled: bool = False,
    ) -> None:
        train = TrainConfig(
            signal=signal, alpha_ce=1.0, alpha_mlm=0.0, alpha_cos=0.0, temperature=temperature
        )
        needed = required_signals(cache.encoding, train)
        self.batches = CachedBatches(
            cache,
            batch_size=batch_size,
            seed=0,
            signal=needed.ce,
            hidden=needed.hidden,
        )
        rows = len(student.vocab_projector.weight)
        self.vocabulary = sampled_vocabulary(cache, rows, train) if sampled else None
        self.model = GivenHidden(
            student,
            train=train,
            signals=needed,
            lm_head=cache.teacher.lm_head() if needed.replays else None,
            hidden_decoder=cache.teacher.hidden_decoder() if needed.hidden else None,
        )

    def loss(self, k: int) -> Tensor:
        """L_ce of batch k, the mean over its positions."""
        batch = self.batches[k]
        counts = count_positions(batch)
        if self.vocabulary is not None:
            self.vocabulary.apply([batch], k)
        loss: Tensor = self.model(batch, counts)[0]
        return loss


def gradient_gaps(
    live: Source, stored: Mapping[Any, Source], student: Any, batches: Sequence[int]
) -> Iterator[dict[Any, Gap]]:
    """Angles and norm ratios to the exact mode, after each batch those of the sums so far.

    All sources are of the same batches, and share the student.
    """
    encoder, sources = student.distilbert, [live, *stored.values()]
    inner = list(encoder.parameters())
    outer = [p for n, p in student.named_parameters() if not n.startswith("distilbert.")]
    names = {p: i for i, p in enumerate(dict.fromkeys([*inner, *outer]))}
    exact = _Sum(names)
    off = {name: _Sum(names) for name in stored}
    weights = [*outer, student.vocab_projector.weight]
    for k in batches:
        batch = live.batches[k]
        inputs = {n: batch[n] for n in ("input_ids", "attention_mask") if n in batch}
        hidden_BLD = encoder(**inputs).last_hidden_state
        given_BLD = hidden_BLD.detach().requires_grad_(True)
        wanted = [given_BLD, *weights]
        for source in sources:
            source.model.given_BLD = given_BLD
        reference = torch.autograd.grad(live.loss(k), wanted)
        gaps = {
            name: [
                a - b
                for a, b in zip(torch.autograd.grad(s.loss(k), wanted), reference, strict=True)
            ]
            for name, s in stored.items()
        }
        for source in sources:
            source.model.given_BLD = None
        for total, parts in ((exact, reference), *((off[n], gaps[n]) for n in stored)):
            total.add(weights, parts[1:])
            through = torch.autograd.grad(hidden_BLD, inner, parts[0], retain_graph=True)
            total.add(inner, through)
        yield {name: exact.gap(total) for name, total in off.items()}


class _Sum:
    """A sum of gradients by all parameters, as one tensor per parameter."""

    def __init__(self, names: Mapping[nn.Parameter, int]) -> None:
        self._names = names
        self.tensors = [torch.zeros_like(p) for p in names]

    def add(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor]) -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            self.tensors[self._names[parameter]] += gradient

    def dot(self, other: "_Sum") -> float:
        return sum(
            float((a.double() * b).sum()) for a, b in zip(self.tensors, other.tensors, strict=True)
        )

    def gap(self, difference: "_Sum") -> Gap:
        """Angle and norm ratio of ``self + difference`` against ``self``."""
        own, cross, error = self.dot(self), self.dot(difference), difference.dot(difference)
        parallel = (own + cross) / math.sqrt(own)
        # The part of the difference across the exact gradient; its own norm, no small difference.
        across = math.sqrt(max(0.0, error - cross**2 / own))
        norm = math.hypot(parallel, across)
        return Gap(math.degrees(math.atan2(across, parallel)), norm / math.sqrt(own))


@torch.no_grad()
def replay_error(cache: Cache, live: Cache, signal: str, batch_size: int) -> dict[str, Any]:
    """Mean KL(p || p_hat) in nats at T = 1, 2, and mean 1 - cos(h, h_hat), over some batches.

    Draws are left out: what they correct is zero on average, and no distribution by itself.
    """
    if signal == "sparse":
        return {"kl_1": None, "kl_2": None, "cosine_error": None}
    head, figures = live.teacher.lm_head(), {}
    exact, decode = live.teacher.hidden_decoder(), cache.teacher.hidden_decoder()
    distribution = Distribution(cache)
    reads = "replay" if signal == "replay" else "replay+topk"
    if cache.encoding.top_k == 0:
        reads = "replay"
    ours, theirs = (
        CachedBatches(c, batch_size=batch_size, seed=0, signal=s)
        for c, s in ((cache, reads), (live, "replay"))
    )
    kl: dict[float, list[Tensor]] = {1.0: [], 2.0: []}
    errors = []
    for k in range(min(5, ours.steps_per_epoch)):
        batch = ours[k]
        h, h_hat, topk = exact(theirs[k]), decode(batch), TopK.of(batch, len(batch["labels"]))
        if len(h) != len(h_hat):  # other positions: nothing is lost at those that are stored
            return {"kl_1": 0.0, "kl_2": 0.0, "cosine_error": 0.0}
        errors.append(1 - torch.cosine_similarity(h, h_hat))
        for temperature, parts in kl.items():
            log_p = (head(h) / temperature).log_softmax(-1)
            log_q = distribution.log_probs(head(h_hat), topk, temperature)
            parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    figures = {f"kl_{t:g}": float(torch.cat(parts).mean()) for t, parts in kl.items()}
    return {**figures, "cosine_error": float(torch.cat(errors).mean())}

"""Predictions of teacher and students at the positions of one sequence, small enough for a page.

A distribution at temperature T is kept as raw logits of a few tokens and one normaliser per
temperature, ``log p_v = z_v / T - n_T``, so the page can change T without the whole vocabulary. The
teacher can have two normalisers and a bias per token: stored tokens keep their own fraction of the
mass, and a replay at a temperature of the codec adds the codec's bias:

    log p_v = z_v / T - stored_T                   of a stored token
    log p_v = (z_v + bias_T,v) / T - rest_T        of any other

Shapes: ``N`` positions, ``U`` tokens kept of a position, ``K`` stored tokens, ``V`` vocabulary,
``D`` width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from distilcache.data.codecs.joined import NEG, substituted_logits
from distilcache.data.distribution import TopK
from distilcache.pipeline.look.figures import bucket_entropy, entropy_of, mass_of
from distilcache.pipeline.look.sample import Sample
from distilcache.pipeline.look.students import Student
from distilcache.pipeline.look.teaching import Teaching

TEACHER_TOKENS = 10
STUDENT_TOKENS = 6
POSITIONS = 32
"""Positions shown of a sequence; a cache of all positions has more."""
GRID = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)
"""Temperatures to choose from where the full distribution is known."""


def temperatures_of(teaching: Teaching) -> tuple[float, ...]:
    """Temperatures at which distributions are known, ascending."""
    if teaching.replays or not teaching.encoding.top_k:
        return tuple(sorted({*GRID, *teaching.temperatures}))
    return tuple(sorted(set(teaching.temperatures)))


@dataclass(frozen=True, slots=True)
class TeacherOutput:
    """The teacher's signals at N positions."""

    logits_NV: Tensor | None
    """Replayed logits with the stored ones put in; None: not replayed."""
    plain_NV: Tensor | None
    """Replayed logits alone."""
    stored: TopK
    hidden_ND: Tensor | None


def choose_positions(sample: Sample) -> np.ndarray:
    """Rows of a sample's positions: masked ones, then others evenly spread."""
    masked = np.flatnonzero(np.isin(sample.positions, sample.masked))[:POSITIONS]
    others = np.setdiff1d(np.arange(len(sample.positions)), masked)
    room = min(POSITIONS - len(masked), len(others))
    spread = others[np.linspace(0, len(others) - 1, room).astype(int)] if room else others[:0]
    return np.union1d(masked, spread).astype(int)


def describe(
    teaching: Teaching,
    students: Sequence[Student],
    sample: Sample,
    chosen: np.ndarray,
    temperatures: Sequence[float],
) -> list[dict[str, Any]]:
    """One entry per chosen position of a sample.

    Args:
        teaching: The teacher.
        students: Run on the same masked sequence.
        sample: A sequence.
        chosen: Rows of ``sample.positions``.
        temperatures: Among ``temperatures_of``, or any where the cache is replayed.

    Returns:
        Per position ``position``, ``tokens`` [U], ``stored`` (how many of them, they come first),
        ``logits`` [U] (None: not known), by temperature ``stored_norm``, ``rest_norm``,
        ``entropy``, ``topk_mass``, and ``students``: each ``logits`` [U], ``norm``, ``kl`` by
        temperature, and ``cosine``.
    """
    with torch.no_grad():
        teacher = _ask_teacher(teaching, sample, chosen)
        answers = [student.answer(sample) for student in students]
        answers = [(logits[chosen], hidden[chosen]) for logits, hidden in answers]
        entries = _tokens(teacher, answers, sample, chosen)
        _add_teacher(teaching, teacher, entries, temperatures)
        _add_students(teaching, teacher, answers, entries, temperatures)
        return entries


def log_probs_of(
    teaching: Teaching, entry: Mapping[str, Any], number: int, temperature: float
) -> dict[int, float]:
    """The teacher's log probabilities of the tokens of an entry of ``describe``, as on the page.

    ``number`` is the index of the temperature among those given to ``describe``.
    """
    found = {}
    for place, (token, logit) in enumerate(zip(entry["tokens"], entry["logits"], strict=True)):
        if logit is None or not entry["stored_norm"]:
            continue
        if place < entry["stored"]:
            found[token] = logit / temperature - entry["stored_norm"][number]
        else:
            raised = logit + teaching.bias(temperature, token)
            found[token] = raised / temperature - entry["rest_norm"][number]
    return found


def _ask_teacher(teaching: Teaching, sample: Sample, chosen: np.ndarray) -> TeacherOutput:
    stored = teaching.stored(sample)[chosen]
    hidden_ND = teaching.hidden(sample)
    if hidden_ND is None:
        return TeacherOutput(None, None, stored, None)
    plain_NV = teaching.replayed(hidden_ND[chosen])
    joined_NV = plain_NV.clone()
    if stored.ids_NK.shape[1]:
        substituted_logits(joined_NV, stored.ids_NK, stored.values_NK)
    return TeacherOutput(joined_NV, plain_NV, stored, hidden_ND[chosen])


def _tokens(
    teacher: TeacherOutput,
    answers: list[tuple[Tensor, Tensor]],
    sample: Sample,
    chosen: np.ndarray,
) -> list[dict[str, Any]]:
    labels = dict(zip(sample.masked.tolist(), sample.labels.tolist(), strict=True))
    entries: list[dict[str, Any]] = []
    for row, place in enumerate(sample.positions[chosen].tolist()):
        stored_ids = teacher.stored.ids_NK[row][~teacher.stored.values_NK[row].isneginf()].tolist()
        wanted = _likeliest(teacher.logits_NV, row, TEACHER_TOKENS) or stored_ids[:TEACHER_TOKENS]
        for logits_NV, _ in answers:
            wanted += _likeliest(logits_NV, row, STUDENT_TOKENS)
        wanted += [labels[place]] if place in labels else []
        stored = [token for token in stored_ids if token in wanted]
        tokens = stored + [t for t in dict.fromkeys(wanted) if t not in stored]
        student = [{"logits": logits_NV[row, tokens].tolist()} for logits_NV, _ in answers]
        known = _teacher_logits(teacher, row, tokens)
        entries.append({"position": place, "tokens": tokens, "stored": len(stored)})
        entries[-1] |= {"logits": known, "students": student}
    return entries


def _likeliest(logits_NV: Tensor | None, row: int, count: int) -> list[int]:
    if logits_NV is None:
        return []
    return list(logits_NV[row].topk(min(count, logits_NV.shape[1]))[1].tolist())


def _teacher_logits(teacher: TeacherOutput, row: int, tokens: list[int]) -> list[float | None]:
    if teacher.logits_NV is not None:
        return list(teacher.logits_NV[row, tokens].tolist())
    ids_NK, values_NK = teacher.stored.ids_NK, teacher.stored.values_NK
    known = dict(zip(ids_NK[row].tolist(), values_NK[row].tolist(), strict=True))
    return [known.get(token) for token in tokens]


def _add_teacher(
    teaching: Teaching,
    teacher: TeacherOutput,
    entries: list[dict[str, Any]],
    temperatures: Sequence[float],
) -> None:
    """Normalisers, entropy and mass of the stored tokens by temperature."""
    names = ("stored_norm", "rest_norm", "entropy", "topk_mass")
    for entry in entries:
        entry |= {name: [] for name in names}
    if teacher.plain_NV is None and not teaching.encoding.top_k:
        return
    for temperature in temperatures:
        if teacher.plain_NV is None:
            log_p_NK, log_tail_N = teaching.topk_log_probs(teacher.stored, temperature)
            entropy_N, mass_N = bucket_entropy(log_p_NK, log_tail_N), 1 - log_tail_N.exp()
        else:
            log_p_NV = teaching.log_probs(teacher.plain_NV, teacher.stored, temperature)
            log_p_NK = log_p_NV.gather(-1, teacher.stored.ids_NK)
            entropy_N, mass_N = entropy_of(log_p_NV), mass_of(log_p_NV, teacher.stored)
        for row, entry in enumerate(entries):
            count = entry["stored"]
            own = teacher.stored.values_NK[row, :1] / temperature - log_p_NK[row, :1]
            entry["stored_norm"].append(float(own[0]) if count else 0.0)
            rest = 0.0
            if teacher.plain_NV is not None and len(entry["tokens"]) > count:
                token = entry["tokens"][count]
                raised = teacher.plain_NV[row, token] + teaching.bias(temperature, token)
                rest = float(raised / temperature - log_p_NV[row, token])
            entry["rest_norm"].append(rest)
            entry["entropy"].append(float(entropy_N[row]))
            entry["topk_mass"].append(float(mass_N[row]))


def _add_students(
    teaching: Teaching,
    teacher: TeacherOutput,
    answers: list[tuple[Tensor, Tensor]],
    entries: list[dict[str, Any]],
    temperatures: Sequence[float],
) -> None:
    """Normalisers and KL by temperature, and the cosine of the hidden states."""
    for number, (logits_NV, hidden_ND) in enumerate(answers):
        has_V = (logits_NV > NEG).any(0)
        kept_n = None if has_V.all() else has_V.nonzero()[:, 0]
        cosine_N = None
        if teacher.hidden_ND is not None and teacher.hidden_ND.shape == hidden_ND.shape:
            cosine_N = functional.cosine_similarity(teacher.hidden_ND, hidden_ND, -1)
        for row, entry in enumerate(entries):
            student = entry["students"][number]
            student |= {"norm": [], "kl": []}
            student["cosine"] = None if cosine_N is None else float(cosine_N[row])
        for temperature in temperatures:
            log_z_N = torch.logsumexp(logits_NV / temperature, -1)
            log_q_NV = logits_NV / temperature - log_z_N[:, None]
            kl_N = _kl(teaching, teacher, log_q_NV, kept_n, temperature)
            for row, entry in enumerate(entries):
                entry["students"][number]["norm"].append(float(log_z_N[row]))
                if kl_N is not None:
                    entry["students"][number]["kl"].append(float(kl_N[row]))


def _kl(
    teaching: Teaching,
    teacher: TeacherOutput,
    log_q_NV: Tensor,
    kept_n: Tensor | None,
    temperature: float,
) -> Tensor | None:
    """KL(teacher || student) [N]; without replay, of the stored tokens and one bucket.

    Of a student that has only the ids ``kept_n``, over these.
    """
    if teacher.plain_NV is not None:
        log_p_NV = teaching.log_probs(teacher.plain_NV, teacher.stored, temperature)
        if kept_n is not None:
            log_p_NV = log_p_NV[:, kept_n].log_softmax(-1)
            log_q_NV = log_q_NV[:, kept_n]
        return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
    if kept_n is not None:  # The mass of its ids is not known.
        return None
    if not teaching.encoding.top_k:
        return None
    log_p_NK, log_tail_N = teaching.topk_log_probs(teacher.stored, temperature)
    padding_NK = log_p_NK.isneginf()
    log_q_NK = log_q_NV.gather(-1, teacher.stored.ids_NK)
    rest_N = 1 - log_q_NK.exp().masked_fill(padding_NK, 0.0).sum(-1)
    head_N = (log_p_NK.exp() * (log_p_NK - log_q_NK)).masked_fill(padding_NK, 0.0).sum(-1)
    tail_N = log_tail_N.exp()
    kl_N: Tensor = head_N - torch.special.entr(tail_N) - tail_N * rest_N.clamp(min=1e-12).log()
    return kl_N

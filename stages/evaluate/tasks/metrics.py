"""The metrics of GLUE and SQuAD.

All are from 0 to 1 (correlations and Matthews' from -1); higher is better.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distilcache.data.errors import UserError, to_install
from distilcache.stages.evaluate.tasks.catalogue import CLASSES, TAGS, Task
from distilcache.stages.evaluate.tasks.values import Answers

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def require_libraries() -> None:
    """Check for missing libraries before hours are spent."""
    try:
        import scipy  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"tasks: metrics must be computed with scikit-learn and scipy, got no {error.name}; "
            f"{to_install('tasks')}"
        ) from None


def measure(task: Task, predictions: Any, labels: Sequence[Any]) -> dict[str, float]:
    """The metrics of one held-out split.

    Args:
        task: The task.
        predictions: Class numbers, scores, names of tags, or texts of answers; one, or of tags one
            sequence, per example.
        labels: As ``Split`` has them; tags by name.
    """
    return {name: float(_METRICS[name](predictions, labels)) for name in task.metrics}


def majority(task: Task, train: Sequence[Any], dev: Sequence[Any]) -> dict[str, float]:
    """Metrics of always predicting the most frequent training label; 0 for scores and spans."""
    if task.kind == TAGS:
        usual = Counter(tag for tags in train for tag in tags).most_common(1)[0][0]
        named = [[task.labels[tag] for tag in tags] for tags in dev]
        return measure(task, [[task.labels[usual]] * len(tags) for tags in dev], named)
    if task.kind != CLASSES:
        return dict.fromkeys(task.metrics, 0.0)
    most = int(np.bincount(np.asarray(train)).argmax())
    return measure(task, np.full(len(dev), most), dev)


def _accuracy(predictions: Any, labels: Any) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def _f1(predictions: Any, labels: Any) -> float:
    """F1 of class 1 (GLUE), or of common words (SQuAD)."""
    if len(labels) and isinstance(labels[0], Answers):
        return _best(word_f1, predictions, labels)
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0.0))


def _matthews(predictions: Any, labels: Any) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def _pearson(predictions: Any, labels: Any) -> float:
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, labels)


def _spearman(predictions: Any, labels: Any) -> float:
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, labels)


def _correlation(function: Any, predictions: Any, labels: Any) -> float:
    """Correlation; 0 for a constant, where the formula gives 0 / 0."""
    x: NDArray[np.float64] = np.asarray(predictions, dtype=np.float64)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(np.asarray(labels)) == 0:
        return 0.0
    value = float(function(x, labels).statistic)
    return value if math.isfinite(value) else 0.0


def _exact(predictions: Any, labels: Any) -> float:
    return _best(lambda text, answer: float(normal(text) == normal(answer)), predictions, labels)


def _best(function: Any, predictions: Sequence[str], labels: Sequence[Answers]) -> float:
    """Mean over questions of the best value over the right answers."""
    best: list[float] = [
        max(function(text, answer) for answer in answers.texts)
        for text, answers in zip(predictions, labels, strict=True)
    ]
    return sum(best) / max(len(best), 1)


def normal(text: str) -> str:
    """Lower case, without punctuation, articles and doubled spaces (Rajpurkar et al. 2016)."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def word_f1(text: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words, as a bag."""
    words, wanted = normal(text).split(), normal(answer).split()
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2 * common / (len(words) + len(wanted)) if common else 0.0


def _word_accuracy(predictions: Any, labels: Any) -> float:
    return _accuracy(*([tag for tags in all_ for tag in tags] for all_ in (predictions, labels)))


def _entity_f1(predictions: Any, labels: Any) -> float:
    """F1 of whole entities over all examples, as the CoNLL shared tasks count them."""
    found, wanted = (
        {(row, entity) for row, tags in enumerate(all_) for entity in entities(tags)}
        for all_ in (predictions, labels)
    )
    common = len(found & wanted)
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def entities(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Type, first word and the word after the last of each entity, from O, B-TYPE, I-TYPE.

    I-TYPE begins an entity where none of its type goes on.
    """
    found: list[tuple[str, int, int]] = []
    begun, kind = 0, ""
    for at, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if prefix == "I" and name == kind:
            continue
        if kind:
            found.append((kind, begun, at))
        begun, kind = at, name
    return found


_METRICS = {
    "accuracy": _accuracy,
    "word_accuracy": _word_accuracy,
    "entity_f1": _entity_f1,
    "f1": _f1,
    "matthews": _matthews,
    "pearson": _pearson,
    "spearman": _spearman,
    "exact_match": _exact,
}

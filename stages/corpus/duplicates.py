"""Count held-out documents that are also training text, in bounded memory."""

from collections import Counter

MAX_KEYS = 1 << 19
"""Hashes in memory, about 50 MB. If there are more, the smallest ones are a fair sample."""


class Duplicates:
    """Document hashes of 64 bits that occur in both splits."""

    def __init__(self) -> None:
        self._limit = 1 << 64
        self._train: set[int] = set()
        self._heldout: Counter[int] = Counter()

    def add(self, split: str, key: int) -> None:
        """Add one document."""
        if key >= self._limit:
            return
        if split == "train":
            self._train.add(key)
        else:
            self._heldout[key] += 1
        while len(self._train) + len(self._heldout) > MAX_KEYS:
            self._limit //= 2
            self._train = {k for k in self._train if k < self._limit}
            self._heldout = Counter({k: n for k, n in self._heldout.items() if k < self._limit})

    def line(self) -> str:
        """Line for the console; empty if there are no duplicates."""
        found = sum(n for key, n in self._heldout.items() if key in self._train)
        if not found:
            return ""
        about = "" if self._limit == 1 << 64 else "about "
        scale = (1 << 64) / self._limit
        return (
            f"{about}{found * scale:,.0f} of {self._heldout.total() * scale:,.0f} held-out "
            "documents are also training text, apart from white space: quality on them is too "
            "good; remove them from corpus.sources or corpus.heldout_sources"
        )

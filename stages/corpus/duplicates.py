"""Held-out documents that are training text, too: counted in bounded memory."""

from collections import Counter

MAX_KEYS = 1 << 19
"""Hashes that are kept: some 50 MB. Of more, only the smaller ones are, as a fair sample."""


class Copies:
    """Which hashes of documents, 64 bits each, occur in both splits."""

    def __init__(self) -> None:
        self._limit = 1 << 64
        self._train: set[int] = set()
        self._heldout: Counter[int] = Counter()

    def add(self, split: str, key: int) -> None:
        """Take in one document."""
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
        """What there is to say; empty: there are none."""
        found = sum(n for key, n in self._heldout.items() if key in self._train)
        if not found:
            return ""
        about = "" if self._limit == 1 << 64 else "about "
        scale = (1 << 64) / self._limit
        return (
            f"{about}{found * scale:,.0f} of {self._heldout.total() * scale:,.0f} held-out "
            "documents are training text, too, but for spaces: quality on them says too much; take "
            "them out of corpus.sources or corpus.heldout_sources"
        )

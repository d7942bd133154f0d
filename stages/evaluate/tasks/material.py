"""What the runs of one task read: its examples as token ids, and altered copies of them."""

from functools import cached_property

from distilcache.stages.evaluate.tasks.features import Encoded, encode
from distilcache.stages.evaluate.tasks.finetune import Place
from distilcache.stages.evaluate.tasks.jobs import Job


class Material:
    """The token ids of one task for one tokenizer, made when they are first asked for."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._copied: tuple[str, Encoded] | None = None

    @cached_property
    def train(self) -> Encoded:
        """Training examples."""
        job = self.job
        return encode(job.data.task, job.data.train, job.model.tokenizer, job.max_length)

    @cached_property
    def dev(self) -> dict[str, Encoded]:
        """Held-out parts."""
        job, parts = self.job, self.job.data.dev.items()
        return {
            suffix: encode(job.data.task, part, job.model.tokenizer, job.max_length)
            for suffix, part in parts
        }

    def with_copies(self, job: Job, place: Place) -> Encoded:
        """Training examples, and behind them those copies that a job asks for."""
        if job.copies is None:
            return self.train
        if self._copied is None or self._copied[0] != job.copies.key:
            found = job.copies.of(self.train, job.model.tokenizer, place)
            self._copied = (job.copies.key, found)
        return self._copied[1]

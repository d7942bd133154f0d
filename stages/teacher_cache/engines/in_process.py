"""The default: all shards in this process, the device never waiting between them."""

from contextlib import closing

from distilcache.data.cache.manifest import CacheManifest
from distilcache.stages.teacher_cache.encoding import say
from distilcache.stages.teacher_cache.engines.base import Progress, alone, tokens_of
from distilcache.stages.teacher_cache.pipeline import run_shards
from distilcache.stages.teacher_cache.run import Build, finish, prepare, reused
from distilcache.stages.teacher_cache.task import tasks_of


class InProcessEngine:
    """One process, one device."""

    def run(self, build: Build) -> CacheManifest:
        """Prepare, make what is missing, finish."""
        with alone(build):
            job = prepare(build)
            manifest = reused(build)
            if manifest is not None:
                return manifest
            tasks = tasks_of(job.corpus, job.config)
            total = tokens_of(job.corpus.manifest, job.config.rounds)
            progress = Progress(build, job.identity, total)
            with progress.bar:
                missing = (task for task in tasks if not progress.finished(task, before=True))
                with closing(run_shards(job, missing, progress.bar.update)) as made:
                    for _ in made:
                        pass
            if progress.reused:
                say(f"{progress.reused} of {len(tasks)} shards were there already")
            return finish(job)

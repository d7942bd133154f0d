"""What a worker answers where a call fails."""

import errno

from distilcache.stages.workers.pool import answer


def fail(error):
    raise error


def test_faults_of_storage_and_of_the_program_are_two_things(capsys):
    full = answer(fail, OSError(errno.ENOSPC, "No space left on device", "cache/shard.tar"))
    assert full.user_error is not None
    assert full.user_error.startswith("storage: cache/shard.tar must be usable, got: No space left")
    assert full.failure is None
    assert not capsys.readouterr().err
    ours = answer(fail, FileNotFoundError(errno.ENOENT, "No such file", "shard.tra"))
    assert (ours.user_error, ours.failure is None) == (None, False)
    assert "Traceback" in capsys.readouterr().err

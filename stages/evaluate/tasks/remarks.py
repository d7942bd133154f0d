"""Lines on the texts of a task of one's own, as a model reads them."""

import numpy as np

from distilcache.data.errors import tell
from distilcache.stages.evaluate.tasks.catalogue import TAGS, Task
from distilcache.stages.evaluate.tasks.examples import Split
from distilcache.stages.evaluate.tasks.features import Encoded
from distilcache.stages.evaluate.tasks.task_models import Candidate
from distilcache.stages.models.tokenizers import MANY_UNKNOWN


def tell_cut(task: Task, split: Split, encoded: Encoded, length: int, remedy: str) -> None:
    """A line on texts of a task of one's own, or their words, that are cut off."""
    if not encoded.cut or not any(task.files):
        return
    about = f"tasks: {task.name}: {encoded.cut:,} of"
    if task.kind == TAGS:
        tell(
            f"{about} {sum(map(len, split.texts[0])):,} words lie beyond {length} tokens, or have "
            f"none; their tags are not learnt, and count as missed; {remedy}"
        )
    else:
        tell(f"{about} {len(split):,} texts are longer than {length} tokens and are cut; {remedy}")


def tell_unknown(task: Task, encoded: Encoded, model: Candidate) -> None:
    """A line on many tokens that the model does not know."""
    share = float(np.mean(encoded.ids == model.tokenizer.unk_token_id))
    if share >= MANY_UNKNOWN and any(task.files):
        tell(
            f"tasks: {task.name}: {100 * share:.2f} % of the tokens are unknown to "
            f"{model.entry.name}; a model for their language, script and case learns more"
        )

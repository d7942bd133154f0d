"""Is a student trained from the cache the student that a live teacher would have made?

The same student, seeds, batches and steps with the teacher beside it and from caches:

    a        live teacher, full distribution, masked positions (weights 5/2/1, T = 2)
    a_all    the same at all positions: the published recipe
    a_sampled  live at masked positions, over a sample of the vocabulary at each step
    b        the default cache: coded hidden states and 8 exact logits
    b_sampled  the same over a sample of the vocabulary at each step, which is the default
    b_extra  the same at the masked and a tenth of the other positions, weighted
    c8, c64  the 8 or 64 largest logits alone, the rest as one bucket; no L_cos
    c50      50 draws from the softened distribution alone; no L_cos
    d        no teacher: L_mlm alone
    r        live teacher, relations of the last layer alone
    r_cache  the same from a cache, at the default quality of 0.005 nats
    r_coarse, r_coarser  at 0.02 and 0.05 nats

    python -m benchmarks.offline_equals_online --plot docs/offline_equals_online.png
"""

from benchmarks.arms import Arm
from benchmarks.comparison import comparison_command
from benchmarks.comparison_summary import Comparison
from distilcache.stages.student_train.config import TrainConfig

_LIVE = {"signal": "replay"}
_SAMPLED = {"vocabulary_fraction": TrainConfig().vocabulary_fraction}
_SPARSE = {"signal": "sparse", "alpha_cos": 0.0}
_ALONE = {"alpha_ce": 0.0, "alpha_mlm": 1.0, "alpha_cos": 0.0}
_RELATIONS = {**_ALONE, "alpha_mlm": 0.0, "alpha_rel": 1.0}

COMPARISON = Comparison(
    arms=(
        Arm("a", "live, masked", "live", "masks", _LIVE),
        Arm("a_all", "live, all positions", "live everywhere", "masks", _LIVE),
        # The cache tells how likely tokens are, by which both draw the same samples.
        Arm("a_sampled", "live, sampled vocabulary", "live", "default", {**_LIVE, **_SAMPLED}),
        Arm("b", "cache (default)", "cache", "default"),
        Arm("b_sampled", "cache, sampled vocabulary", "cache", "default", _SAMPLED),
        Arm("b_extra", "cache, masked+0.1", "cache", "extra"),
        Arm("c8", "top-8 logits", "logits", "top8", _SPARSE),
        Arm("c64", "top-64 logits", "logits", "top64", _SPARSE),
        Arm("c50", "50 draws", "logits", "draws50", _SPARSE),
        Arm("d", "L_mlm alone", "mlm", "masks", _ALONE),
        Arm("r", "live, relations", "live", "masks", _RELATIONS),
        Arm("r_cache", "relations (default)", "cache", "only_relations", _RELATIONS),
        Arm("r_coarse", "relations, 0.02 nats", "cache", "coarse_relations", _RELATIONS),
        Arm("r_coarser", "relations, 0.05 nats", "cache", "coarser_relations", _RELATIONS),
    ),
    reference="a",
    pairs=(
        *(("b", "a"), ("b_sampled", "a_sampled"), ("b_sampled", "a"), ("b_sampled", "b")),
        ("b_extra", "a_all"),
        *(("r_cache", "r"), ("r_coarse", "r"), ("r_coarser", "r")),
    ),
)
main = comparison_command(
    COMPARISON,
    about="Students from a live teacher against students from caches, on held-out text.",
    steps=250,
    out="runs/offline_equals_online",
)

if __name__ == "__main__":
    main()

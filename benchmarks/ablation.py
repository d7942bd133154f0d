"""What each part of the loss, and the start from the teacher's layers, is worth.

The ablation of DistilBERT's paper (Sanh et al. 2019, table 4) on this scale: the same student,
batches and steps from one cache, with all three losses, without each of them, and from random
weights. In the paper, in GLUE points, random weights cost most (3.69), then no L_ce (2.96), no
L_cos (1.46) and no L_mlm (0.31). Whether the first two cost more than the others is tested here.

    python -m benchmarks.ablation --json runs/ablation/ablation.json --plot docs/ablation.png
"""

from itertools import product

from benchmarks.arms import Arm
from benchmarks.comparison import comparison_command
from benchmarks.comparison_summary import Comparison

COMPARISON = Comparison(
    arms=(
        Arm("full", "all losses, teacher's layers", "cache", "default"),
        Arm("no_mlm", "without L_mlm", "cache", "default", {"alpha_mlm": 0.0}),
        Arm("no_cos", "without L_cos", "cache", "default", {"alpha_cos": 0.0}),
        Arm("no_ce", "without L_ce", "cache", "default", {"alpha_ce": 0.0}),
        Arm("random", "random initialisation", "cache", "default", {}, {"init": "random"}),
    ),
    reference="full",
    pairs=tuple(product(("random", "no_ce"), ("no_cos", "no_mlm"))),
)
main = comparison_command(
    COMPARISON,
    about="Students without one loss each, and from random weights, on held-out text.",
    steps=300,
    out="runs/ablation",
)

if __name__ == "__main__":
    main()

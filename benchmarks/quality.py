"""Which loss, signal, masking and start give the best student of half the depth?

Students of one shape and equal tokens, each from a cache of its own kind: held-out text, then the
tasks that each is fine-tuned on, by labels alone, with the settings of ``recipes/wiki100.toml``.

    default        masked positions: L_ce, L_mlm, L_cos
    no_ce          without L_ce
    all_cos        L_cos at all positions, L_ce at masked ones: recipes/wiki100.toml
    rel, rel_5     relations of the last layer, or of the last but one, alone
    rel_ce         relations of the last layer, and L_ce
    all_rel        all_cos, and relations of the last layer
    rel_cos        relations of the last layer, and L_cos at all positions
    rel_masked     relations of the last layer, and L_cos at masked ones: recipes/minilm.toml
    inner          default, and L_cos of inner layers at all positions, with the teacher at hand
    dropout        default, with dropout in distillation and fine-tuning
    words          whole words are masked
    first, ends    starts from the teacher's layers 0, 2, 4, or 0, 2, 5, not 1, 3, 5

    python -m benchmarks.quality --seeds 0          # 2.5 hours: two processes, a core each
"""

from benchmarks.arms import Arm
from benchmarks.comparison import comparison_command
from benchmarks.comparison_summary import Comparison

_BERT = {"family": "teacher"}
"""Keeps token types, which tell the two texts of a pair apart."""
_EVERYWHERE = {"restrict_ce_to_mask": True, "alpha_cos": 10.0}
_RELATIONS = {"alpha_ce": 0.0, "alpha_cos": 0.0, "alpha_mlm": 0.0, "alpha_rel": 1.0}


def _arm(name: str, label: str, cache: str = "default", **train: object) -> Arm:
    return Arm(name, label, "cache", cache, train, _BERT)


COMPARISON = Comparison(
    arms=(
        _arm("default", "default"),
        _arm("no_ce", "without L_ce", alpha_ce=0.0),
        _arm("all_cos", "L_cos at all positions", "all", **_EVERYWHERE),
        _arm("rel", "relations alone", "relations", **_RELATIONS),
        _arm("rel_5", "relations of layer -2 alone", "relations_5", **_RELATIONS),
        _arm("rel_ce", "relations and L_ce", "relations", **{**_RELATIONS, "alpha_ce": 5.0}),
        _arm(
            "all_rel",
            "L_cos at all positions and relations",
            "all_relations",
            **{**_EVERYWHERE, "alpha_rel": 1.0},
        ),
        _arm(
            "rel_cos",
            "relations and L_cos at all positions",
            "all_relations",
            **{**_RELATIONS, "alpha_cos": 10.0},
        ),
        _arm(
            "rel_masked",
            "relations and L_cos at masked positions",
            "relations",
            **{**_RELATIONS, "alpha_cos": 5.0},
        ),
        Arm("inner", "inner layers as well", "inner", "default", {}, _BERT),
        Arm("dropout", "dropout of 0.1", "cache", "default", {}, {**_BERT, "dropout": 0.1}),
        _arm("words", "whole words masked", "words"),
        Arm("first", "layers 0, 2, 4", "cache", "default", {}, {**_BERT, "init_layers": (0, 2, 4)}),
        Arm("ends", "layers 0, 2, 5", "cache", "default", {}, {**_BERT, "init_layers": (0, 2, 5)}),
    ),
    reference="default",
    pairs=(("rel_masked", "default"), ("default", "dropout")),
    tasks=("sst2", "rte", "stsb"),
)
main = comparison_command(
    COMPARISON,
    about="Students by loss, signal, masking and start, on held-out text and on tasks.",
    steps=1400,
    out="runs/quality",
)

if __name__ == "__main__":
    main()

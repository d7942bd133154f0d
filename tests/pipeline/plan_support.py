"""What tests of plans share."""

import json

from distilcache.pipeline.check_recipe import check_recipe
from distilcache.pipeline.plan.shapes import student_shape
from distilcache.pipeline.recipe import override_recipe


def students_of(recipe, *sizes):
    """Shapes of a recipe's students, of these sizes where any are given."""
    if sizes:
        recipe = override_recipe(recipe, [f"student.sizes={json.dumps(sizes)}"])
    return [student_shape(recipe, config) for config, _ in check_recipe(recipe).values()]

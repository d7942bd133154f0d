"""What a user drives: recipes, commands, the flow of stages, reports."""

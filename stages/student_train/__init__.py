"""Stage two: train a student from a teacher cache, no teacher loaded."""

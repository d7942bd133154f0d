"""Quality, size and speed of teacher, students and control on held-out text."""

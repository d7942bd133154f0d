"""Tasks: teacher, students and controls fine-tuned alike; how much of the teacher survives."""

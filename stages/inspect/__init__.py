"""Looking into a cache: sampled sequences, what the teacher said there, what takes the bytes."""

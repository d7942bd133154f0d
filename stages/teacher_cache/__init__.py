"""Stage one: run the teacher once over the masked corpus and store its signals."""

"""Stage one: run the teacher once over the masked corpus and write what it said."""

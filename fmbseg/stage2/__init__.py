"""Stage 2 (Sec. 3.3): the alignment module, its losses, its training and its use. No disk."""

"""Stage 1 (Sec. 3.1, 3.2): one image in, pseudo labels out. No disk, no process."""

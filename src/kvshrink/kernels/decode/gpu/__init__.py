"""The Triton programs of ../triton.py: what a side's pages look like to them (side), tiles of latents (tiles), scores
of rebuilt keys (keys), attention over a range of pages (attend), and the sum of such ranges (join)."""

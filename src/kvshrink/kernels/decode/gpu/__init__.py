"""The Triton programs of ../triton.py: what a side's pages look like to them (side), tiles of latents (tiles), attention
over a range of pages (attend), and the sum of such ranges (join)."""

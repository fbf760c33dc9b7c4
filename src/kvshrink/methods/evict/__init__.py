"""Fewer tokens: what leaves the window is dropped."""

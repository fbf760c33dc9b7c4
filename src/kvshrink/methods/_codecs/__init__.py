"""Codecs that several families of methods share, and what they are built on."""

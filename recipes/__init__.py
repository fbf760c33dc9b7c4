"""Recipes: how things that the project ships were made, runnable from start to end."""

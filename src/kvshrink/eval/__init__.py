"""Evaluation: tasks (data and score), a runner that forces the compressed cache to be read, tables and plots."""

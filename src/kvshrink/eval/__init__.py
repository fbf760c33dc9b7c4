"""Evaluation at equal real bytes: tasks, metrics, a runner that makes every score read the cache, fidelity, reports.

The path of a suite: catalogue -> budget -> fitting -> prefill -> runner -> summary -> report.
"""

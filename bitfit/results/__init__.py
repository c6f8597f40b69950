"""Scores as one long table, their plots, and the summary of a sweep.

Nothing here computes scores or changes the state of a training.
"""

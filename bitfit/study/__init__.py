"""The paper's tables and figures: planned cells, their workers, statistics and the report.

This package starts run_glue.py as a process to train and score a cell; nothing here trains.
"""

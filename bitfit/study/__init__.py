"""The paper's tables and figures: planned cells, their workers, statistics and the report.

What trains and scores one cell is run_glue.py, which this package starts as a process.
"""

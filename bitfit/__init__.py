"""The parts of BitFit: data, models, results, training, files, tools, and the study of the paper.

The public interface is outside, in `glue_evaluator.py` and `run_glue.py`.
"""

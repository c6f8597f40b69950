"""The plan, the state and the loop of a training, its checkpoints, and its progress.

The files of a finished run, except scores, belong in `bitfit.artifacts`.
"""

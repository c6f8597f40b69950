"""The plan, the state and the loop of a training, its checkpoints, and its progress.

What a finished run writes beside its scores belongs in `bitfit.artifacts`.
"""

"""Experiment trackers: TensorBoard, Weights & Biases, and MLflow.

The project's own result files do not belong here.
"""

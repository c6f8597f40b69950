"""Experiment trackers: TensorBoard, Weights & Biases, and MLflow.

The result files in the output folder do not belong here.
"""

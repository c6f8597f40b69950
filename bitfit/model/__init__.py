"""The model: loading, trainable parameters, batches, the forward pass, and the axis of runs.

Optimization, files of results and the state of a training do not belong here.
"""

"""Programs that use saved evaluators: comparison and arithmetic of deltas, predictions.

Nothing here trains.
"""

"""Tasks and their data: task files, readers, tokenized splits, and the sampling of rows.

Models, batches and anything that runs on a device do not belong here.
"""

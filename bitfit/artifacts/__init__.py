"""Output folders, saved evaluators, model cards, and uploads to the Hugging Face Hub.

Scores and figures belong in `bitfit.results`.
"""

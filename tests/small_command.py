"""Flags of a small command of run_glue.py."""

from conftest import GLUE, TINY_BERT

SMALL = ["--data-dir", str(GLUE), "--epochs", "1", "--train-size", "24", "--gpu-device", "cpu"]


def flags(output, *more, task="rte", kind="bitfit", model=TINY_BERT):
    return ["-o", str(output), "-t", task, "-f", kind, "-m", str(model), *SMALL, *more]

"""The checks of --halving that need no file, without importing torch.

A candidate is a learning rate with a set of bias terms.
"""

import argparse
from collections.abc import Sequence

from bitfit import parsing


def check_halving(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse --halving where it cannot stop a run."""
    if args.halving and args.fine_tune_type not in ("bitfit", "frozen"):
        parser.error(f"--halving needs runs that share a pass, and those of {args.fine_tune_type} "
                     "do not: leave it out")  # fmt: skip
    candidates = len(args.learning_rate) * len(parsing.split_repeated(args.bias_terms))
    epochs, limits = args.halving or (), (args.epochs, args.evaluation_frequency)
    if problem := halving_problem(epochs, *limits, candidates=candidates):
        parser.error(f"--halving {problem}")


def halving_problem(
    halving: Sequence[int], epochs: int, frequency: int, candidates: int
) -> str | None:
    """Return why halving after these epochs is not possible, or None if it is."""
    most = (candidates - 1).bit_length()
    if halving and candidates < 2:
        return "compares learning rates or sets of bias terms: give several, or leave it out"
    if list(halving) != sorted(set(halving) & set(range(1, epochs))):
        return f"takes epochs in ascending order, all before the last, {epochs}"
    if not_scored := [epoch for epoch in halving if epoch % frequency]:
        return f"{not_scored[0]}: scores exist every {frequency} epochs: give a multiple of it"
    if len(halving) > most:
        return f"takes at most {most} epochs for {candidates} candidates: then one is left"
    return None

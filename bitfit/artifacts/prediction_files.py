"""Files of test predictions for the GLUE server."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from bitfit.data.tasks import predictions
from bitfit.distributed import Group
from bitfit.results.scores import write_predictions
from bitfit.training.setup import LoadedData

LOGGER = logging.getLogger("bitfit")


def write_test_predictions(
    folder: str | Path, data: LoadedData, predict: Callable[[str], np.ndarray], group: Group
) -> list[Path]:
    """Predict all test splits, write one file per split, and return the paths.

    Args:
        predict: returns the logits of a split; all processes of the group call it together.
        group: the processes that predict together; the first one writes the files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    task, written = data.dataset.task, []
    for split, name in data.test_files().items():
        if not data.dataset.has_split(split):
            LOGGER.info("there is no %s set: %s is not written", split, name)
            continue
        written.append(folder / name)
        predicted = predictions(task, predict(split))
        if group.rank == 0:
            write_predictions(written[-1], task, predicted)
    return written

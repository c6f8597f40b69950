"""Files of test predictions: for the GLUE server, or tagged sentences in the input's format."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from bitfit.data.splits import read_split, source_file
from bitfit.data.tagged_files import write_tags
from bitfit.data.tasks import predictions, tags_of_sentences
from bitfit.distributed import Group
from bitfit.results.scores import write_predictions
from bitfit.training.setup import LoadedData
from utils import LOGGER, UserError


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
        if group.rank == 0 and task.is_tagging:
            write_tagged_split(written[-1], data, split, predicted=predicted)
        elif group.rank == 0:
            write_predictions(written[-1], task, predicted)
    return written


def write_tagged_split(path: Path, data: LoadedData, split: str, predicted: np.ndarray) -> None:
    """Write a split's sentences with predicted tags (words,); UserError if they have changed."""
    task, folder, tokens = data.dataset.task, data.dataset.data_dir or ".", data.tokens(split)
    known = tokens.sentences_of(np.arange(len(tokens.lengths)))
    (sentences,) = read_split(task, split, folder).columns
    counts = [len(words) for words in sentences]
    if not np.array_equal(counts, () if known is None else known):
        raise UserError(f"the {split} split of {task.name} has changed since it was read")
    tags = tags_of_sentences(task, predicted, counts)
    columns = {task.texts[0]: sentences, task.tsv_label: tags}
    write_tags(path, source_file(task, split, folder), columns)

"""Tables as they lie in files and in the Hub's data sets, whatever the task.

Every fault is a `UserError` that names the file and, where there are lines, the line.
"""

import csv
import io
import json

from utils import UserError, blaming, one_line


def read_lines(path):
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text; convert the file to UTF-8") from None
    # Not splitlines(): it would also break rows at characters such as U+2028.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines[:-1] if lines[-1] == "" else lines


def read_csv(path):
    """Comma-separated UTF-8 with a header line, quoted with `"` -> a frame of words.

    pandas itself would fill up short rows, cut long ones, and take `NA` for nothing.
    """
    import pandas as pd

    csv.field_size_limit(2**31 - 1)  # else a text has no more than 131,072 letters
    rows = csv.reader(io.StringIO("\n".join(read_lines(path)), newline=""), strict=True)
    try:
        names, kept = next(rows, []), []
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise UserError(f"{path}:1: the column {twice[0]!r} is there twice")
        for row in rows:
            if len(row) != len(names):
                what = f"{len(row)} columns where {len(names)} are expected"
                raise UserError(f"{path}:{rows.line_num}: {what}")
            kept.append(row)
    except csv.Error as error:
        raise UserError(f"{path}:{rows.line_num}: not CSV: {error}") from None
    return pd.DataFrame(kept, columns=names)


def read_json_lines(path):
    """A JSON object a line -> a frame; nothing is taken for a date or a number that is none."""
    import pandas as pd

    rows = []
    for number, line in enumerate(read_lines(path), 1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError):
            rows.append(None)
        if not isinstance(rows[-1], dict):
            raise UserError(f"{path}:{number}: not a JSON object in one line")
    return pd.DataFrame(rows, dtype=object)


def read_parquet(paths):
    import pandas as pd

    def unreadable(error):
        return UserError(f"{paths[0]}: not a readable Parquet file: {one_line(error)}")

    with blaming(unreadable):  # pyarrow raises several kinds of its own
        return pd.concat([pd.read_parquet(path) for path in paths], ignore_index=True)


def load_hub(name, config, split, revision, otherwise):
    """(frame, features) of a data set on the Hub; `otherwise`: what to do where there is none."""

    def unreachable(error):
        what = f"cannot load {name} ({config or 'default'}) from the Hub or its cache"
        return UserError(f"{what}: {one_line(error)}; {otherwise}")

    with blaming(unreachable):  # network, cache and parser faults have no common class
        import datasets

        datasets.disable_progress_bars()
        rows = datasets.load_dataset(name, config, split=split, revision=revision)
        return rows.to_pandas(), rows.features


READERS = {".csv": read_csv, ".jsonl": read_json_lines, ".parquet": lambda p: read_parquet([p])}
ENDINGS = (".tsv", *READERS)  # of the files that a record may name

"""The tables of a study's report, as texts: scores, differences between methods, selections."""

import pandas as pd

from bitfit.results.scores import format_mean_std
from bitfit.study.cells import slug
from bitfit.study.protocol import ROWS
from bitfit.study.published import COLUMNS, average

SYMBOLS = {"b_m2+b_q": "b_m2, b_q", "full_ft": "Full-FT", "bitfit": "BitFit", "frozen": "Frozen",
           "rand_uniform": "Rand uniform", "rand_row_col": "Rand row/col"}  # fmt: skip


def headline_tables(scores: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return {model: table} for models with scores; the columns' names include the metrics."""
    split = scores[(scores["selection"] == "split") & scores["train_size"].isna()]
    labels = column_labels(scores)
    return {slug(model): headline_table(of_model).rename(columns=labels)
            for model, of_model in split.groupby("model", sort=False)}  # fmt: skip


def column_labels(scores: pd.DataFrame) -> dict[str, str]:
    """Return {column: column and metric}, such as "CoLA (MCC)"."""
    return {c: f"{c} ({m})" for c, m in zip(scores["column"], scores["metric"], strict=True)}


def headline_table(split: pd.DataFrame) -> pd.DataFrame:
    """Return one model's Tables 2 and 3 in the paper's layout, as text: rows × columns."""
    columns = [c for c in [*COLUMNS, *split["column"]] if c in set(split["column"])]
    rows = {}
    for row in ROWS:
        of_row = split[split["row"] == row].set_index("column")
        if len(of_row):
            texts = {c: entry_text(of_row.loc[c]) if c in of_row.index else "" for c in columns}
            mean = average({c: of_row["mean"].get(c) for c in COLUMNS})
            paper = average({c: of_row["published"].get(c) for c in COLUMNS})
            texts["Avg."] = "" if mean is None else f"{mean:.1f}"
            texts["Avg."] += "" if paper is None or mean is None else f" ({paper:.1f})"
            rows[SYMBOLS.get(row, row)] = texts
    table = pd.DataFrame(rows).T
    return table if table["Avg."].any() else table.drop(columns="Avg.")


def entry_text(entry: pd.Series) -> str:
    """Return one cell of the headline table."""
    text = spread(entry["mean"], entry["std"])
    if pd.notna(entry["published"]):
        text += f" ({spread(entry['published'], entry['published_std'])})"
    text += "!" * (pd.notna(entry["off"]) and bool(entry["off"]))
    if 0 < entry["seeds"] < entry["of"] and entry["state"] == "done":
        text += f" ({entry['seeds']} of {entry['of']} seeds)"
    return text + " ..." * (entry["state"] != "done")


def spread(mean: float, std: float) -> str:
    """Return mean ± standard deviation as text; NaN means that no run counts."""
    return "no run counts" if pd.isna(mean) else format_mean_std(mean, std)


def format_numbers(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table with its floats as texts with two decimals, empty for NaN."""
    return frame.map(lambda v: f"{v:.2f}" if isinstance(v, float) else v).replace("nan", "")


def difference_table(differences: pd.DataFrame, labels: dict[str, str]) -> pd.DataFrame:
    """Return the comparisons as a table of texts; `labels` are {column: name with metric}."""
    shown = pd.DataFrame()
    if differences.empty:
        return shown
    shown["a - b"] = differences["a"] + " - " + differences["b"]
    shown["column"] = differences["column"].map(lambda column: labels.get(column, column))
    shown["difference"] = differences["difference"].map("{:+.1f}".format)
    limits = zip(differences["low"], differences["high"], strict=True)
    shown["95 % CI"] = [f"{low:+.1f} to {high:+.1f}" for low, high in limits]
    shown["pairs"] = differences["pairs"]
    for name, title in (("p", "p"), ("p_holm", "p (Holm)"), ("least_p", "least p")):
        shown[title] = differences[name].map("{:.4f}".format)
    several = differences["model"].nunique() > 1
    return shown.assign(model=differences["model"].map(slug)) if several else shown


def selection_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the three selections side by side, with trials and the settings of `split`.

    Scores of cells that are not finished end with `...`.
    """
    ends = scores["state"].map(lambda state: "" if state == "done" else " ...")
    texts = [spread(*pair) for pair in zip(scores["mean"], scores["std"], strict=True)]
    sizes = scores["train_size"].map(lambda n: "" if pd.isna(n) else f" ({n:.0f} examples)")
    selected = scores.assign(split=texts + ends, column=scores["column"] + sizes)
    parts = dict(list(selected.groupby("selection")))
    titles = {"last epoch": "last", "best epoch (optimistic)": "best"}
    others = {title: parts[name]["split"].to_numpy() for title, name in titles.items()}
    table = parts["split"].assign(**others, model=parts["split"]["model"].map(slug))
    columns = ["model", "row", "column", "metric", *titles, "split", "seeds", "trials"]
    table = table[[*columns, "learning_rate", "epoch"]].reset_index(drop=True)
    return table.rename(columns={"learning_rate": "learning rate"})

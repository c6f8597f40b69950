"""`paper.py report`: tables.csv, .md, .tex, pictures, and all of it in one report.html."""

import base64
import html
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd

from bitfit.files import write_text
from bitfit.results import escape
from bitfit.results.plots import save_figure
from bitfit.study import cell_states, cost, figures, results
from bitfit.study.cells import Study, slug
from bitfit.study.figures import Figures
from bitfit.study.protocol import (
    BATCH_SIZE,
    PAPER_MODELS,
    ROWS,
    SEEDS,
    default_epochs,
    paper_learning_rates,
    paper_model_name,
)
from bitfit.study.published import COLUMNS, NOTE, average
from utils import UserError

SYMBOLS = {"b_m2+b_q": "b_m2, b_q", "full_ft": "Full-FT", "bitfit": "BitFit", "frozen": "Frozen",
           "rand_uniform": "Rand uniform", "rand_row_col": "Rand row/col"}  # fmt: skip
LEGEND = (
    "Scores x 100 on the validation set, mean ± sample standard deviation over the seeds. Learning "
    "rate and epoch are chosen on one half of the validation rows and scored on the other, and the "
    f"other way round (`split`). In brackets the paper's number ({NOTE}); `!` where the 95 % "
    "interval of the mean has nothing in common with it ± its deviation; `...` where the cell is "
    "not finished. A run that diverged counts nowhere."
)
STATISTICS = (
    "a - b, by `split`, paired by seed, of finished cells. The interval (95 %) is of a bootstrap "
    "over seeds and validation rows together, widened as Student's t is for so few seeds; `all` is "
    "the mean over the tasks. p is of flipping the signs of the seeds' differences, so it cannot "
    "be below `least p`; p (Holm) is corrected for all columns of a model's pairs, or for its "
    "pooled rows."
)
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:75em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0;font-size:13px}td,th{padding:.2em .6em;"
    "border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}td:first-child,"
    "th:first-child{text-align:left}img{width:100%;height:auto}figure{margin:1em 0}"
    ".pictures{display:grid;grid-template-columns:1fr 1fr;gap:1em 2em;align-items:start}"
    "pre{background:#f6f6f6;padding:.8em;overflow-x:auto;font-size:12px}figcaption{color:#555}"
)


def write(study: Study, resamples: int = 1000) -> str:
    """Write the report of what there is; returns what to print.

    Raises:
        UserError: no run has been scored yet.
    """
    entries = results.entries(study)
    if not entries:
        raise UserError(f"{study.output} has no scores yet: `paper.py run` makes them")
    rng = np.random.default_rng(0)
    scores = results.score_frame(entries)
    differences = results.comparisons(entries, rng, resamples)
    headline = {slug(m): table_of(scores, m) for m in dict.fromkeys(scores["model"])}
    headline = {name: table for name, table in headline.items() if len(table)}
    pictures = figures.all_of(study, entries)
    folder = study.output / "figures"
    folder.mkdir(exist_ok=True)
    for name, (figure, _) in pictures.items():
        save_figure(figure, folder / f"{name}.png")
    out = study.output
    write_text(out / "tables.csv", scores.round(4).to_csv(index=False))
    write_text(out / "differences.csv", differences.round(4).to_csv(index=False))
    write_text(out / "tables.md", markdown(study, headline, differences))
    write_text(out / "tables.tex", latex(headline))
    write_text(out / "report.html", page(study, headline, scores, differences, pictures, folder))
    shown = "\n\n".join(f"{name}\n{table.to_string()}" for name, table in headline.items())
    return f"{shown}\n{out / 'report.html'}"


def table_of(scores: pd.DataFrame, model: str) -> pd.DataFrame:
    """Tables 2 and 3 in the paper's layout, as text: rows x columns."""
    own = scores[(scores["model"] == model) & (scores["selection"] == "split")]
    own = own[own["train_size"].isna()]
    columns = [c for c in [*COLUMNS, *own["column"]] if c in set(own["column"])]
    rows = {}
    for row in ROWS:
        of = own[own["row"] == row].set_index("column")
        if len(of):
            texts = {c: entry_text(of.loc[c]) if c in of.index else "" for c in columns}
            mean = average({c: of["mean"].get(c) for c in COLUMNS})
            paper = average({c: of["published"].get(c) for c in COLUMNS})
            texts["Avg."] = "" if mean is None else f"{mean:.1f}"
            texts["Avg."] += "" if paper is None or mean is None else f" ({paper:.1f})"
            rows[SYMBOLS.get(row, row)] = texts
    table = pd.DataFrame(rows).T
    return (
        table if len(table) and table["Avg."].any() else table.drop(columns="Avg.", errors="ignore")
    )


def entry_text(entry: pd.Series) -> str:
    text = spread(entry["mean"], entry["std"])
    if pd.notna(entry["published"]):
        text += f" ({spread(entry['published'], entry['published_std'])})"
    text += "!" * (pd.notna(entry["off"]) and bool(entry["off"]))
    if 0 < entry["seeds"] < entry["of"] and entry["state"] == "done":
        text += f" ({entry['seeds']} of {entry['of']} seeds)"
    return text + " ..." * (entry["state"] != "done")


def spread(mean: float, std: float) -> str:
    if pd.isna(mean):
        return "no run counts"
    return f"{mean:.1f}" if pd.isna(std) else f"{mean:.1f} ± {std:.1f}"


def difference_table(differences: pd.DataFrame) -> pd.DataFrame:
    """The comparisons as text."""
    shown = pd.DataFrame()
    if differences.empty:
        return shown
    shown["a - b"] = differences["a"] + " - " + differences["b"]
    shown["column"] = differences["column"]
    for name in ("difference", "low", "high"):
        shown[name] = differences[name].map("{:+.1f}".format)
    shown["pairs"] = differences["pairs"]
    for name, title in (("p", "p"), ("p_holm", "p (Holm)"), ("least_p", "least p")):
        shown[title] = differences[name].map("{:.4f}".format)
    several = differences["model"].nunique() > 1
    return shown.assign(model=differences["model"].map(slug)) if several else shown


def selection_table(scores: pd.DataFrame) -> pd.DataFrame:
    """The three selections side by side, with trials and learning rates."""
    whole = scores[scores["train_size"].isna()]
    if whole.empty:
        return pd.DataFrame()
    keys = ["model", "row", "column"]
    texts = whole.assign(text=[spread(*pair) for pair in zip(whole["mean"], whole["std"],
                                                             strict=True)])  # fmt: skip
    wide = texts.pivot(index=keys, columns="selection", values="text")[list(results.SELECTIONS)]
    wide.columns = ["last epoch", "best epoch (optimistic)", "split"]
    more = whole[whole["selection"] == "split"].set_index(keys)[["seeds", "trials",
                                                                 "learning_rate"]]  # fmt: skip
    joined = wide.join(more)
    order = [tuple(key) for key in whole[keys].drop_duplicates().to_numpy()]
    table = joined.loc[order].reset_index().rename(columns={"learning_rate": "learning rate"})
    return table.assign(model=table["model"].map(slug))


def deviations(study: Study) -> list[str]:
    """What of the plan is not the paper's, in words."""
    said = []
    for cell in study.cells:
        if paper_model_name(cell.model) not in PAPER_MODELS:
            said.append(f"model {cell.model}")
        if tuple(cell.rates) != tuple(paper_learning_rates(cell.model, cell.row)):
            rates = " ".join(f"{rate:g}" for rate in cell.rates)
            said.append(f"learning rates of {cell.row}: {rates}")
        if tuple(cell.seeds) != SEEDS:
            said.append(f"seeds of {cell.row}: {' '.join(map(str, cell.seeds))}")
        for name, papers in (("batch_size", BATCH_SIZE), ("max_seq_length", 128)):
            if cell.args[name] != papers:
                said.append(f"{name.replace('_', ' ')} {cell.args[name]}")
        if cell.args["data_dir"]:
            said.append(f"data of {cell.args['data_dir']}")
        if cell.args["train_size"] and not cell.size:
            said.append(f"{cell.args['train_size']} training rows, drawn by each seed")
        if cell.args["epochs"] != default_epochs(cell.task):
            said.append(f"{cell.args['epochs']} epochs of {cell.task} (not this program's default)")
    precisions = {
        (cell_states.read_cell_args(study, cell) or {}).get("precision") for cell in study.cells
    }
    if "bf16" in precisions:
        said.append("computed in bf16; what trains is kept in float32")
    return list(dict.fromkeys(said))


def markdown(study: Study, headline: dict[str, pd.DataFrame], differences: pd.DataFrame) -> str:
    parts = ["# Results", LEGEND]
    for model, table in headline.items():
        parts += [f"## {escape.markdown(model)}", pipes(table.reset_index(names=""))]
    if len(differences):
        parts += ["## Differences", STATISTICS, pipes(difference_table(differences))]
    parts += ["## Not the paper's", items_of(deviations(study))]
    return "\n\n".join(parts) + "\n"


def items_of(texts: list[str]) -> str:
    """A list in Markdown."""
    return "\n".join(f"- {escape.markdown(text)}" for text in texts) or "-"


def pipes(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table."""
    lines = [list(map(str, frame.columns)), ["---"] * len(frame.columns)]
    lines += [[escape.markdown(str(cell)) for cell in row] for row in frame.to_numpy()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def latex(headline: dict[str, pd.DataFrame]) -> str:
    """A tabular per model, for booktabs."""
    parts = []
    for model, table in headline.items():
        lines = [[model, *table.columns], *([i, *row] for i, row in zip(
            table.index, table.to_numpy(), strict=True))]  # fmt: skip
        body = [" & ".join(map(escape.latex, line)) + r" \\" for line in lines]
        body[1:1] = [r"\midrule"]
        begin = rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}"
        parts.append("\n".join([begin, r"\toprule", *body, r"\bottomrule", r"\end{tabular}"]))
    return "% " + LEGEND + "\n" + "\n\n".join(parts) + "\n"


def page(
    study: Study,
    headline: dict[str, pd.DataFrame],
    scores: pd.DataFrame,
    differences: pd.DataFrame,
    pictures: Figures,
    folder: Path,
) -> str:
    """One HTML page that needs nothing else."""
    images = [picture(folder / f"{name}.png", text) for name, (_, text) in pictures.items()]
    commands = "\n".join(html.escape(cell.shell(study.output)) for cell in study.cells)
    parts = ["<h1>BitFit: the paper's tables, measured</h1>", paragraph(progress(study))]
    parts += [paragraph(LEGEND)]
    for model, table in headline.items():
        parts += [f"<h2>{html.escape(model)}</h2>", table.to_html(border=0)]
    parts += ["<h2>Not the paper's</h2>", items(deviations(study))]
    if len(differences):
        parts += ["<h2>Differences between methods</h2>", paragraph(STATISTICS)]
        parts += [difference_table(differences).to_html(border=0, index=False)]
    parts += ["<h2>Three ways to select</h2>"]
    parts += [selection_table(scores).to_html(border=0, index=False)]
    parts += ["<h2>Pictures</h2>", "<div class='pictures'>", *images, "</div>"]
    parts += ["<h2>Cost and machine</h2>", items(machine(study))]
    parts += ["<h2>Commands</h2>", f"<pre>{commands}</pre>"]
    head = f"<meta charset='utf-8'><title>BitFit: results</title><style>{STYLE}</style>"
    body = "\n".join(parts)
    return f"<!doctype html><html lang='en'><head>{head}</head><body>\n{body}\n</body></html>\n"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text).replace('`', '')}</p>"


def items(texts: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in texts or ["-"]) + "</ul>"


def picture(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    caption = html.escape(text)
    return (f"<figure><img src='data:image/png;base64,{data}' alt='{caption}'>"
            f"<figcaption>{caption}</figcaption></figure>")  # fmt: skip


def progress(study: Study) -> str:
    states = [cell_states.cell_state(study, cell) for cell in study.cells]
    done = states.count("done")
    text = f"{done} of {len(states)} cells are done." + " Partial." * (done < len(states))
    foreign = [c.name for c, state in zip(study.cells, states, strict=True) if state == "foreign"]
    return text + f" Left out, of another command: {', '.join(foreign)}." * bool(foreign)


def machine(study: Study) -> list[str]:
    """Where and in what time the cells were done."""
    said, hours = [], 0.0
    for cell in study.cells:
        facts = cell_states.read_cell_args(study, cell)
        if facts:
            facts = defaultdict(lambda: "unknown", facts)
            versions = " ".join(f"{n} {facts[n]}" for n in ("torch", "transformers", "python"))
            commit = (facts["commit"] or "unknown")[:7]
            where = f"{facts['device']}, {facts['threads']} threads, {facts['precision']}"
            said.append(f"{where}; {versions}; commit {commit}")
        hours += (cost.training_seconds(study, cell) or 0) / 3600
    runs = sum(cell.runs for cell in study.cells)
    said = list(dict.fromkeys(said))
    return [f"{hours:.2f} hours of the {runs} planned runs that are done", *said]

"""The report of a study: tables.csv, .md and .tex, figures, and all of it in report.html."""

import base64
import html
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from bitfit.files import write_text
from bitfit.results import escape
from bitfit.results.plots import save_figure
from bitfit.study import cell_states, cost, figures, halving, power, protocol, results, tables
from bitfit.study.cells import Study
from bitfit.study.published import NOTE
from utils import UserError

LEGEND = (
    "Scores × 100 on the validation set in the metric named in each column, mean ± sample standard "
    "deviation over the seeds. Learning rate and epoch are chosen on one half of the validation "
    "examples and scored on the other, and the other way round (`split`). In brackets the paper's "
    f"number ({NOTE}); `!` where the 95 % CI of our mean does not overlap the paper's mean ± "
    "standard deviation; `...` where the cell is not finished. A run that diverged counts nowhere."
)
STATISTICS = (
    "a - b, by `split`, paired by seed, of finished cells, in the metric of the column × 100. The "
    "95 % CI comes from a bootstrap over seeds and validation examples together, widened as "
    "Student's t is for so few seeds; `all` is the mean over the tasks. The p-values come from a "
    "paired sign-flip permutation test over seeds, so p cannot be below `least p`; p (Holm) is "
    "corrected for all columns of a model's pairs, or for its pooled rows."
)
SEARCH_TITLE = "Search that may be too small"
SEARCH = "By mean scores at the last epoch. Other rates or more epochs may raise these scores."
PRINTED = power.TITLE, halving.TITLE  # the sections that are also printed
Sections = dict[str, tuple[str, pd.DataFrame]]  # {title: (how to read the table, table)}
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:75em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0;font-size:13px}td,th{padding:.2em .6em;"
    "border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}td:first-child,"
    "th:first-child{text-align:left}img{width:100%;height:auto}figure{margin:1em 0}"
    ".figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,30em),1fr));"
    "gap:1em 2em;align-items:start}"
    "pre{background:#f6f6f6;padding:.2em .8em .2em 2.8em;margin:.3em 0;white-space:pre-wrap;"
    "overflow-wrap:anywhere;font-size:12px;text-indent:-2em}pre span{white-space:nowrap}"
    ".table{overflow-x:auto}figcaption{color:#555}"
)


def write_report(
    study: Study, resamples: int = 1000, formats: Sequence[str] = (), halvings: Sequence[int] = ()
) -> str:
    """Write the report of the scores so far, and return the text to print.

    Args:
        formats: "pdf" or "svg", in which the figures are written beside PNG.
        halvings: epochs of a simulated halving.

    Raises:
        UserError: no run has been scored yet, or no cell has the epochs of halving.
    """
    entries = results.read_entries(study)
    if not entries:
        raise UserError(f"{study.output} has no scores yet: `paper.py run` makes them")
    scores = results.score_frame(entries)
    files = {"halving": halving.halving_frame(entries, halvings, resamples)} if halvings else {}
    differences = results.comparisons(entries, np.random.default_rng(0), resamples)
    chances = power.power_frame(entries, np.random.default_rng(0), resamples)
    headline, captions = tables.headline_tables(scores), write_figures(study, entries, formats)
    out, metrics = study.output, tables.column_labels(scores)
    files |= {"tables": scores, "differences": differences, "power": chances}
    (out / "halving.csv").unlink(missing_ok=True)  # of an earlier report
    for name, frame in files.items():
        write_text(out / f"{name}.csv", frame.round(4).to_csv(index=False))
    sections = {
        "Differences between methods": (STATISTICS, tables.difference_table(differences, metrics)),
        power.TITLE: (power.NOTE, power.power_table(chances, metrics)),
        halving.TITLE: (halving.NOTE, tables.format_numbers(files.get("halving", pd.DataFrame()))),
        SEARCH_TITLE: (SEARCH, results.search_warnings(entries)),
    }
    sections = {title: section for title, section in sections.items() if len(section[1])}
    write_text(out / "tables.md", markdown(study, headline, sections))
    write_text(out / "tables.tex", latex(headline))
    page = html_page(study, headline, scores, sections=sections, captions=captions)
    write_text(out / "report.html", page)
    shown = [f"{name}\n{table.to_string()}" for name, table in headline.items()]
    shown += [section_text(title, *sections[title]) for title in PRINTED if title in sections]
    shown += [f"warning: {SEARCH_TITLE.lower()}, see the report"] * (SEARCH_TITLE in sections)
    return "\n\n".join(shown) + f"\n{out / 'report.html'}"


def section_text(title: str, note: str, table: pd.DataFrame) -> str:
    """Return a section of the report as text to print."""
    text = f"{title}\n{table.to_string(index=False)}\n{textwrap.fill(note, 100)}"
    return text.replace("`", "")


def write_figures(
    study: Study, entries: results.Entries, formats: Sequence[str]
) -> dict[Path, str]:
    """Write all figures as PNG and in other formats, and return {PNG file: caption}."""
    folder = study.output / "figures"
    folder.mkdir(exist_ok=True)
    captions = {}
    for name, (figure, caption) in figures.all_figures(study, entries).items():
        for suffix in ("png", *formats):
            save_figure(figure, folder / f"{name}.{suffix}")
        captions[folder / f"{name}.png"] = caption
    return captions


def deviations(study: Study) -> list[str]:
    """Return the differences between the plan and the paper's protocol, as texts."""
    messages = []
    for cell in study.cells:
        args, size, epochs = cell.args, cell.args["train_size"], cell.args["epochs"]
        model, rates, seeds = protocol.paper_model_name(cell.model), cell.rates, cell.seeds
        differs = {
            f"model {cell.model}": model not in protocol.PAPER_MODELS,
            f"learning rates of {cell.row}: {' '.join(f'{rate:g}' for rate in rates)}":
                tuple(rates) != protocol.paper_learning_rates(model, cell.row),
            f"seeds of {cell.row}: {' '.join(map(str, seeds))}": tuple(seeds) != protocol.SEEDS,
            f"batch size {args['batch_size']}": args["batch_size"] != protocol.BATCH_SIZE,
            f"max seq length {args['max_seq_length']}": args["max_seq_length"] != 128,
            f"data of {args['data_dir']}": args["data_dir"],
            f"{size} training examples, sampled by each seed": size and not cell.size,
            f"{cell.task} starts from {cell.start}": cell.start,
            f"{epochs} epochs of {cell.task} (not this program's default)":
                epochs != protocol.default_epochs(cell.task),
        }  # fmt: skip
        messages += [text for text, is_different in differs.items() if is_different]
    metadata = [cell_states.read_cell_args(study, cell) or {} for cell in study.cells]
    if "bf16" in [content.get("precision") for content in metadata]:
        messages.append("computed in bf16; the trained parameters are kept in float32")
    return list(dict.fromkeys(messages))


def markdown(study: Study, headline: dict[str, pd.DataFrame], sections: Sections) -> str:
    """Return the tables in Markdown."""
    parts = ["# Results", LEGEND]
    for model, table in headline.items():
        parts += [f"## {escape.markdown(model)}", pipes(table.reset_index(names=""))]
    for title, (note, table) in sections.items():
        parts += [f"## {title}", note, pipes(table)]
    parts += ["## Deviations from the paper", markdown_list(deviations(study))]
    return "\n\n".join(parts) + "\n"


def markdown_list(texts: Iterable[str]) -> str:
    """Return a list in Markdown."""
    return "\n".join(f"- {escape.markdown(text)}" for text in texts) or "-"


def pipes(frame: pd.DataFrame) -> str:
    """Return a table in Markdown."""
    lines = [list(map(str, frame.columns)), ["---"] * len(frame.columns)]
    lines += [[escape.markdown(str(cell)) for cell in row] for row in frame.to_numpy()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def latex(headline: dict[str, pd.DataFrame]) -> str:
    """Return a tabular for each model, for the package booktabs."""
    parts = []
    for model, table in headline.items():
        lines = [[model, *table.columns], *([i, *row] for i, row in zip(
            table.index, table.to_numpy(), strict=True))]  # fmt: skip
        body = [" & ".join(map(escape.latex, line)) + r" \\" for line in lines]
        body[1:1] = [r"\midrule"]
        begin = rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}"
        parts.append("\n".join([begin, r"\toprule", *body, r"\bottomrule", r"\end{tabular}"]))
    return "% " + LEGEND + "\n" + "\n\n".join(parts) + "\n"


def html_page(
    study: Study, headline: dict[str, pd.DataFrame], scores: pd.DataFrame,
    sections: Sections, captions: dict[Path, str],
) -> str:  # fmt: skip
    """Return one HTML page that needs no other file.

    Args:
        headline: {model: table}.
        captions: {file of a figure: caption}.
    """
    parts = ["<h1>BitFit: the paper's tables, measured</h1>", paragraph(progress(study))]
    parts += [paragraph(LEGEND)]
    for model, table in headline.items():
        parts += [f"<h2>{html.escape(model)}</h2>", html_table(table, index=True)]
    parts += ["<h2>Deviations from the paper</h2>", html_list(deviations(study))]
    for title, (note, table) in sections.items():
        parts += [f"<h2>{title}</h2>", paragraph(note), html_table(table)]
    parts += ["<h2>Three ways to select</h2>", html_table(tables.selection_table(scores))]
    images = [html_figure(path, caption) for path, caption in captions.items()]
    parts += ["<h2>Figures</h2>", "<div class='figures'>", *images, "</div>"]
    if len(data := data_table(study)):
        parts += ["<h2>Data</h2>", html_table(data)]
    parts += ["<h2>Cost and machine</h2>", html_list(machine(study))]
    commands = [html_command(cell.shell(study.output)) for cell in study.cells]
    parts += ["<h2>Commands</h2>", *commands]
    head = f"<meta charset='utf-8'><title>BitFit: results</title><style>{STYLE}</style>"
    body = "\n".join(parts)
    return f"<!doctype html><html lang='en'><head>{head}</head><body>\n{body}\n</body></html>\n"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text).replace('`', '')}</p>"


def html_table(frame: pd.DataFrame, index: bool = False) -> str:
    with pd.option_context("display.max_colwidth", None):
        return f"<div class='table'>{frame.to_html(border=0, index=index)}</div>"


def html_list(texts: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(text)}</li>" for text in texts or ["-"]) + "</ul>"


def html_command(command: str) -> str:
    """Return a command in HTML; long ones wrap, but not within the name of a flag."""
    words = re.sub(r"(?<= )--[a-z-]+", r"<span>\g<0></span>", html.escape(command))
    return f"<pre>{words}</pre>"


def html_figure(path: Path, caption: str) -> str:
    """Return a figure and a caption in HTML; the image is part of the page."""
    data, text = base64.b64encode(path.read_bytes()).decode(), html.escape(caption)
    image = f"<img src='data:image/png;base64,{data}' alt='{text}'>"
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def progress(study: Study) -> str:
    """Return a sentence with the number of finished cells, and the cells that are left out."""
    states = [cell_states.cell_state(study, cell) for cell in study.cells]
    done = states.count("done")
    text = f"{done} of {len(states)} cells are done." + " Partial." * (done < len(states))
    foreign = [c.name for c, state in zip(study.cells, states, strict=True) if state == "foreign"]
    return text + f" Left out, of another command: {', '.join(foreign)}." * bool(foreign)


def data_table(study: Study) -> pd.DataFrame:
    """Return the sizes and the labels of the splits that the cells' args.json describe."""
    rows = []
    for cell in study.cells:
        args = cell_states.read_cell_args(study, cell) or {}
        for split, description in (args.get("splits") or {}).items():
            known = description.items() if isinstance(description, dict) else ()
            sizes = [f"{name} {count}" for name, count in known if not isinstance(count, dict)]
            labels = [f"{label} {count}" for _, counts in known if isinstance(counts, dict)
                      for label, count in counts.items()]  # fmt: skip
            sample = " (drawn by any seed)" * bool(split == "train" and args.get("train_size"))
            rows.append((cell.task, split + sample, ", ".join(sizes), ", ".join(labels)))
    columns = ["task", "split", "size", "labels or scores"]
    return pd.DataFrame(rows, columns=columns).drop_duplicates(ignore_index=True)


def machine(study: Study) -> list[str]:
    """Return the hours that the cells took, and the machines and versions that were used."""
    machines, hours = [], 0.0
    for cell in study.cells:
        args = cell_states.read_cell_args(study, cell)
        if args:
            known = defaultdict(lambda: "unknown", args)
            versions = " ".join(f"{n} {known[n]}" for n in ("torch", "transformers", "python"))
            commit = str(known["commit"] or "unknown")[:7]
            commit += " with uncommitted changes" * (args.get("uncommitted_changes") is True)
            device = f"{known['device']}, threads: {known['threads']}, {known['precision']}"
            machines.append(f"{device}; {versions}; commit {commit}")
        hours += (cost.training_seconds(study, cell) or 0) / 3600
    runs = sum(cell.runs for cell in study.cells)
    time = (
        f"{hours:.3f} hours of training and scoring, without the start of each command, for the "
        f"finished ones of {runs} planned runs"
    )
    return [time, *dict.fromkeys(machines)]

"""Escape names of folders and tasks, so that Markdown, LaTeX and figures show them unchanged."""

import html
import re

# `_` inside a word means nothing in Markdown.
SPECIAL = re.compile(r"([\\`*{}\[\]#|~$]|(?<![^\W_])_|_(?![^\W_]))")
LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
})  # fmt: skip


def markdown(text: str) -> str:
    """Return text that Markdown shows unchanged, also in a cell of a table."""
    return SPECIAL.sub(r"\\\1", html.escape(text, quote=False))


def markdown_code(text: str) -> str:
    """Return text as Markdown code."""
    plain = re.fullmatch(r"[\w./ -]+", text)
    return f"`{text}`" if plain else f"<code>{markdown(text)}</code>"


def latex(text: str) -> str:
    """Return text that LaTeX prints unchanged."""
    return text.translate(LATEX)


def plot(text: str) -> str:
    """Return text that matplotlib draws unchanged.

    `$` would start a formula, and legends leave out labels that start with `_`.
    """
    return " " * text.startswith("_") + text.replace("$", r"\$")

"""Names that users give (folders, tasks) as plain text in Markdown, LaTeX and pictures."""

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
    """Text that Markdown shows as it is, in a table's cell too."""
    return SPECIAL.sub(r"\\\1", html.escape(text, quote=False))


def markdown_code(text: str) -> str:
    """Return text as Markdown code."""
    plain = re.fullmatch(r"[\w./ -]+", text)
    return f"`{text}`" if plain else f"<code>{markdown(text)}</code>"


def latex(text: str) -> str:
    """Text that LaTeX sets as it is."""
    return text.translate(LATEX)


def plot(text: str) -> str:
    """Text that matplotlib draws as it is: no formula, and no label that its legends leave out."""
    return " " * text.startswith("_") + text.replace("$", r"\$")

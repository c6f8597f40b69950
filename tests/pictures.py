"""Placeholders for pictures: drawing costs more than the short trainings whose scores are shown.

Tests write placeholders unless they have the mark `pictures` or use `real_pictures()`.
"""

from contextlib import contextmanager
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DRAWING = {(Figure, "savefig"): Figure.savefig, (FigureCanvasAgg, "draw"): FigureCanvasAgg.draw}


def write_placeholder(figure, path, **options):
    Path(path).write_bytes(b"a picture")


def use_placeholders():
    replace_drawing([write_placeholder, lambda canvas: None])


def replace_drawing(functions):
    for (owner, name), function in zip(DRAWING, functions, strict=True):
        setattr(owner, name, function)


@contextmanager
def real_pictures():
    """Draw pictures within this context."""
    replace_drawing(DRAWING.values())
    try:
        yield
    finally:
        use_placeholders()

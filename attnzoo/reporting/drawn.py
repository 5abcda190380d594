"""matplotlib's types for annotations, which can be read where matplotlib is not installed, and without importing it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.axis import Axis as Axis
    from matplotlib.figure import Figure as Figure
    from matplotlib.lines import Line2D as Line2D
    from matplotlib.text import Annotation as Annotation
    from matplotlib.text import Text as Text
else:
    Annotation = Axes = Axis = Figure = Line2D = Text = Any

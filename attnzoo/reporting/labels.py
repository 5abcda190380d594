"""Labels in pictures, beside points and at the ends of lines, none over another."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from attnzoo.reporting.charts import INK
from attnzoo.reporting.drawn import Annotation, Axes, Line2D, Text

Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in pixels."""

EDGE = 1.03
"""Of the width of axes, where labels of lines begin."""

NEAR = 7.0
"""Points of a picture (1/72 inch): what lies nearer than this has one label."""

RADII = (7.0, 12.0, 20.0, 30.0, 42.0, 56.0, 72.0, 90.0, 115.0, 145.0, 180.0, 220.0)
"""Points of a picture from a marker to its label, nearest first."""

BAD = 40.0
"""How bad a place is whose stroke crosses something, or that seems to be another point's."""

BEARABLE = 60.0
"""How bad a place may be that would do: some lines are covered, or another point is nearer."""

PASSES = 4
"""How often labels are placed anew, when all others have a place."""

MOST_LINES = 3
"""Points that have a line each in a common label; more of them are a list."""

WIDE = 46
"""Characters of a line of a list."""

TINY = 1e-9
"""Pixels that are none."""

DIRECTIONS = tuple(math.radians(degrees) for degrees in (0, 180, 90, 270, 30, 330, 150, 210, 60, 300, 120, 240))


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights from 0 to 1 moved apart by at least ``gap``, in the same order, as little upwards as that takes."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    moved = list(heights)
    floor = 0.0
    for i in order:
        moved[i] = max(heights[i], floor)
        floor = moved[i] + gap
    # What has been pushed out at the top comes back, and pushes the others down.
    ceiling = 1.0
    for i in reversed(order):
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - gap
    return moved


def at_ends(axes: Axes, names: Sequence[str] = ()) -> list[Text]:
    """Writes each line's label to the right of the axes, as high as the line ends, with a stroke from there.

    Limits, scales and everything else that is drawn should be there before: places are measured.

    Args:
        axes: Its lines with a label of their own are named.
        names: In place of the labels, one for each of these lines.
    """
    from matplotlib.lines import Line2D

    lines = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    told = zip(lines, names or [str(line.get_label()) for line in lines], strict=True)
    ends = [(line, name, *end) for line, name in told if (end := _end(line)) is not None]
    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())
    made = [
        axes.text(EDGE, 0.5, name, color=line.get_color(), fontsize=9, va="center", transform=axes.transAxes)
        for line, name, _, _ in ends
    ]
    if not made:
        return made
    # The layout makes room for the labels, wherever they are; then heights can be measured.
    _draw(axes)
    fraction = axes.transData + axes.transAxes.inverted()
    points = [fraction.transform((x, y)) for _, _, x, y in ends]
    gap = 1.1 * max(label.get_window_extent().height for label in made) / axes.get_window_extent().height
    heights = spread([float(y) for _, y in points], gap)
    for (line, *_), label, (x, y), height in zip(ends, made, points, heights, strict=True):
        label.set_y(height)
        stroke = Line2D([x, EDGE - 0.01], [y, height], color=line.get_color(), linewidth=0.6, transform=axes.transAxes)
        stroke.set(clip_on=False, in_layout=False, zorder=1.5, label="_stroke")
        axes.add_artist(stroke)
    return made


def _end(line: Line2D) -> tuple[float, float] | None:
    """A line's last point that there is."""
    xs: Any = line.get_xdata()
    ys: Any = line.get_ydata()
    known = [(float(x), float(y)) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    return known[-1] if known else None


def beside(
    axes: Axes, points: Sequence[tuple[float, float]], texts: Sequence[str], colours: Sequence[str] = ()
) -> list[Annotation]:
    """Writes a text beside each point, inside the axes, over no other text and no other point.

    Points that lie on each other have one label of several lines. Limits and scales should be final: places are
    measured.

    Args:
        axes: Where the points have been drawn.
        points: In data coordinates.
        texts: One for each point.
        colours: One for each point, or none.
    """
    from matplotlib.patheffects import withStroke

    _draw(axes)
    room = Room(axes, points)
    groups = room.groups()
    made = []
    for group in groups:
        label = axes.annotate(
            _joined([texts[i] for i in group]),
            xy=points[group[0]],
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=9,
            color=_common_colour([colours[i] for i in group if colours]),
            va="center",
            ha="center",
            linespacing=1.05,
            path_effects=[withStroke(linewidth=2.5, foreground="white")],
            arrowprops={"arrowstyle": "-", "color": "#8a8a8a", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
        )
        label.set_in_layout(False)
        made.append(label)
    extents = [label.get_window_extent() for label in made]
    places = room.arrange(groups, [(float(extent.width), float(extent.height)) for extent in extents])
    for label, place in zip(made, places, strict=True):
        label.set_position((place.across / room.scale, place.up / room.scale))
        label.set_multialignment(place.alignment)
        if label.arrow_patch is not None:
            label.arrow_patch.set_visible(place.far)
    return made


@dataclass(frozen=True)
class Place:
    """Where a label may go.

    Attributes:
        x: Of the point, in pixels.
        y: Of the point.
        across: From the point to the label's middle.
        up: Likewise.
        width: Of the label, with a margin.
        height: Likewise.
        far: Whether a stroke leads to it.
    """

    x: float
    y: float
    across: float
    up: float
    width: float
    height: float
    far: bool

    @property
    def alignment(self) -> Literal["left", "center", "right"]:
        """Towards the point."""
        if abs(self.across) < self.width / 2:
            return "center"
        return "left" if self.across > 0 else "right"

    @property
    def box(self) -> Box:
        """What the label covers."""
        x = self.x + self.across
        y = self.y + self.up
        return x - self.width / 2, y - self.height / 2, x + self.width / 2, y + self.height / 2


class Room:
    """The inside of axes, as far as it is taken.

    Args:
        axes: After they have been drawn.
        points: What has a marker, in data coordinates.
    """

    def __init__(self, axes: Axes, points: Sequence[tuple[float, float]]) -> None:
        import numpy
        from matplotlib.text import Annotation

        figure: Any = axes.get_figure()
        frame = axes.get_window_extent()
        self.scale: float = figure.dpi / 72
        self.inside: Box = (float(frame.x0), float(frame.y0), float(frame.x1), float(frame.y1))
        self.pixels = [(float(x), float(y)) for x, y in (axes.transData.transform(point) for point in points)]
        around = 4 * self.scale
        self.markers: list[Box] = [(x - around, y - around, x + around, y + around) for x, y in self.pixels]
        self.arrows: list[Box] = []
        for arrow in axes.texts:
            # An arrow without a text, given by its head and an offset in points.
            if isinstance(arrow, Annotation) and not arrow.get_text():
                x, y = (float(part) for part in axes.transData.transform(arrow.xy))
                tail = [float(part) * self.scale for part in arrow.get_position()]
                wide = 3 * self.scale
                self.arrows.append(
                    (min(x, x + tail[0]) - wide, min(y, y + tail[1]), max(x, x + tail[0]) + wide, max(y, y + tail[1]))
                )
        along = [point for line in axes.lines for point in _along(line)]
        self.lines = numpy.array(along).reshape(-1, 2)

    def groups(self) -> list[list[int]]:
        """Points that lie on each other: one of a group is near all others of it."""
        groups: list[list[int]] = []
        for i, point in enumerate(self.pixels):
            for group in groups:
                if math.dist(point, self.pixels[group[0]]) < NEAR * self.scale:
                    group.append(i)
                    break
            else:
                groups.append([i])
        # Read from above, and in the given order where they are equally high.
        return [sorted(group, key=lambda i: -round(self.pixels[i][1] / self.scale)) for group in groups]

    def arrange(self, groups: Sequence[Sequence[int]], sizes: Sequence[tuple[float, float]]) -> list[Place]:
        """A place for each group's label, in the best of some orders in which they may choose."""
        narrow = sorted(range(len(groups)), key=lambda i: self._choice(groups[i], sizes[i]))
        best: tuple[float, list[Place]] | None = None
        for order in (narrow, narrow[::-1], sorted(narrow)):
            places = self._in_turn(order, groups, sizes)
            others = [[*places[:i], *places[i + 1 :]] for i in range(len(places))]
            covered = [self._covered(*one) for one in zip(places, groups, others, strict=True)]
            if best is None or sum(covered) < best[0]:
                best = (sum(covered), places)
            if max(covered, default=0.0) < BAD:
                break
        return best[1] if best else []

    def _in_turn(
        self, order: Sequence[int], groups: Sequence[Sequence[int]], sizes: Sequence[tuple[float, float]]
    ) -> list[Place]:
        """One after the other, then each again when all the others are known."""
        places: dict[int, Place] = {}
        for _ in range(PASSES):
            before = dict(places)
            for i in order:
                others = [place for j, place in places.items() if j != i]
                places[i] = self._find(groups[i], sizes[i], others)
            if places == before:
                break
        return [places[i] for i in range(len(groups))]

    def _choice(self, group: Sequence[int], size: tuple[float, float]) -> int:
        """How many places near a point would do: those with few are first to choose."""
        near = [place for radius in RADII[:2] for place in self._around(group, size, radius)]
        return sum(self._covered(place, group, []) <= BEARABLE for place in near)

    def _around(self, group: Sequence[int], size: tuple[float, float], radius: float) -> list[Place]:
        """The places for a label of so many pixels of which an edge or a corner is so far from the point."""
        x, y = self.pixels[group[0]]
        width = size[0] + 3 * self.scale
        height = size[1] + 1.5 * self.scale
        found = []
        for direction in DIRECTIONS:
            cosine = math.cos(direction)
            sine = math.sin(direction)
            across = radius * self.scale * cosine + width / 2 * _side(cosine)
            up = radius * self.scale * sine + height / 2 * _side(sine)
            found.append(Place(x, y, across, up, width, height, far=radius > RADII[1]))
        return found

    def _find(self, group: Sequence[int], size: tuple[float, float], taken: Sequence[Place]) -> Place:
        """The nearest place for a label of so many pixels; where each covers something, the one that covers least."""
        found: list[tuple[float, Place]] = []
        for radius in RADII:
            found += [
                (radius + self._covered(place, group, taken), place) for place in self._around(group, size, radius)
            ]
            # Places farther off are worse already.
            if min(found, key=_first)[0] <= radius:
                break
        return min(found, key=_first)[1]

    def _covered(self, place: Place, group: Sequence[int], taken: Sequence[Place]) -> float:
        """How bad a place is: what its label covers and what its stroke crosses; 0 is good."""
        box = place.box
        covered = 4 * sum(_common(box, other.box) for other in taken)
        covered += 8 * (place.width * place.height - _common(box, self.inside))
        xs, ys = self.lines.T
        covered += 1.5 * int(((xs >= box[0]) & (xs <= box[2]) & (ys >= box[1]) & (ys <= box[3])).sum())
        covered += 40 * sum(_crosses(other, box) for other in taken if other.far)
        covered += 4 * sum(_common(box, arrow) for arrow in self.arrows)
        own = _apart(box, place.x, place.y)
        for i, other in enumerate(self.markers):
            covered += 2 * _common(box, other)
            if i not in group:
                # A label without a stroke that is nearer to another point would seem to be that one's.
                to_other = _apart(box, (other[0] + other[2]) / 2, (other[1] + other[3]) / 2)
                covered += 40 * (_crosses(place, other) if place.far else to_other < own + self.scale)
        if place.far:
            covered += 80 * sum(_crosses(place, other.box) + (other.far and _meet(place, other)) for other in taken)
        return covered


def _apart(box: Box, x: float, y: float) -> float:
    """From a point to a box, in pixels."""
    return math.hypot(max(box[0] - x, 0.0, x - box[2]), max(box[1] - y, 0.0, y - box[3]))


def _side(part: float) -> float:
    """Of a sine or cosine: -1, 0 or 1."""
    return float(round(1.2 * part))


def _along(line: Line2D) -> list[tuple[float, float]]:
    """Points every few pixels of a line, or none where it is markers alone."""
    if line.get_linestyle() in ("None", "", " "):
        return []
    corners = [(float(x), float(y)) for x, y in line.get_transform().transform(line.get_xydata())]
    found = []
    for (x0, y0), (x1, y1) in pairwise(corners):
        count = int(math.hypot(x1 - x0, y1 - y0) / 4) + 1 if math.isfinite(x0 + y0 + x1 + y1) else 0
        found += [(x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count) for i in range(count)]
    return found


def _meet(one: Place, other: Place) -> bool:
    """Whether the strokes of two places cross: the ends of each lie on either side of the other."""
    return _parted(one, other) and _parted(other, one)


def _parted(one: Place, other: Place) -> bool:
    """Whether the ends of the one's stroke lie on either side of the other's line."""
    ends = ((one.x, one.y), (one.x + one.across, one.y + one.up))
    sides = [other.across * (y - other.y) - other.up * (x - other.x) for x, y in ends]
    return sides[0] * sides[1] < 0


def _first(pair: tuple[float, Place]) -> float:
    return pair[0]


def _common_colour(colours: Sequence[str]) -> str:
    return colours[0] if len(set(colours)) == 1 else INK


def _joined(texts: Sequence[str]) -> str:
    """A label of several: a line each, or as a list where they are many."""
    return "\n".join(texts) if len(texts) <= MOST_LINES else textwrap.fill("; ".join(texts), WIDE)


def _draw(axes: Axes) -> None:
    """Settles layout and limits, by drawing."""
    figure: Any = axes.get_figure()
    figure.canvas.draw()


def _common(one: Box, other: Box) -> float:
    """Square pixels that two boxes share."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, wide) * max(0.0, high)


def _crosses(place: Place, box: Box) -> bool:
    """Whether a place's stroke passes through a box: some share of its length is inside both across and upwards."""
    enters = 0.0
    leaves = 1.0
    for start, way, low, high in ((place.x, place.across, box[0], box[2]), (place.y, place.up, box[1], box[3])):
        if abs(way) < TINY:
            if not low <= start <= high:
                return False
            continue
        shares = ((low - start) / way, (high - start) / way)
        enters = max(enters, min(shares))
        leaves = min(leaves, max(shares))
    return enters <= leaves

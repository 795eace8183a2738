"""Draws a chart as a picture: the metric, each checkpoint from save to end, the bytes on disk."""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from checkpointer._display import number_text, one_line, size_text
from checkpointer._new_file import new_file
from checkpointer.errors import PolicyError
from checkpointer.tools.chart.data import Chart, ChartItem

INK: Final = "#1f2933"
FAINT: Final = "#9aa5b1"
GRID: Final = "#e4e7eb"
KEPT: Final = "#2563eb"
RETIRED: Final = "#b8c1cc"
ABANDONED: Final = "#b07bd8"
RESCUE: Final = "#dc2626"
BEST: Final = "#f59e0b"
DISK: Final = "#0f766e"
_MARKS: Final = {
    "kept": ("o", KEPT, KEPT),
    "retired": ("o", "white", FAINT),
    "abandoned": ("o", "white", ABANDONED),
    "rescue": ("o", RESCUE, RESCUE),
    "best": ("*", BEST, INK),
}
"""Marker, fill and outline of each kind of point."""
FORMATS: Final = ("png", "svg", "pdf", "jpg", "webp")
"""Formats of a picture: the extensions of its file."""
_LEAST: Final = 3
"""There is room for at least so many bars."""
_LABEL: Final = 9.0
"""Height of a label of a bar in points. Two labels are at least so far apart."""


_LARGEST: Final = 1e300
_NEAREST: Final = 1e-9
"""The axis of steps is at least this part of the last step wide: two limits must not be equal as floats."""


def plot(chart: Chart, path: str | os.PathLike[str] | None = None) -> bytes:
    r"""Draw a chart as a picture, by default a PNG of 1440 x 1080 pixels, and write it to ``path`` if given.

    Above: the metric at each step; filled points are kept, hollow ones were retired, the star is the best. Middle: a
    bar from each checkpoint's save to its end. Below: bytes on disk. What is not known is left out.

    Args:
        chart: From `checkpointer.tools.chart.data.chart_of_records` or ``chart_of_timeline``.
        path: The file, replaced if it is there. Its extension is the format: png, svg, pdf, jpg or webp.

    Raises:
        PolicyError: If the extension is another one.
        ImportError: If matplotlib is not installed; the message names the extra.

    Example:
        >>> from checkpointer import Manifest
        >>> from checkpointer.tools.chart.data import chart_of_records
        >>> plot(chart_of_records("empty", Manifest()))[:4]
        b'\x89PNG'
    """
    form = "png" if path is None else Path(path).suffix.lower().lstrip(".")
    if form not in FORMATS:
        msg = f"{path} has no extension of a picture; use one of .{', .'.join(FORMATS)}"
        raise PolicyError(msg)
    figure = _figure(chart)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form)
    data = buffer.getvalue()
    if path is not None:
        with new_file(path, replaces=True) as stream:
            stream.write(data)
    return data


def _figure(chart: Chart) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = "drawing needs one more package: pip install 'torch-checkpointer[plot]'"
        raise ImportError(msg) from error
    figure = Figure(figsize=(10, 7.5), dpi=144, facecolor="white")
    FigureCanvasAgg(figure)
    bars = min(max(0.35 * len(chart.items), 1.0), 3.0)
    parts = [(_metric, 3.0, _is_measured(chart)), (_bars, bars, True), (_disk, 1.3, bool(chart.disk))]
    known = [(draw, height) for draw, height, is_known in parts if is_known]
    heights = {"height_ratios": [height for _, height in known], "hspace": 0.14}
    rows = figure.subplots(len(known), 1, sharex=True, squeeze=False, gridspec_kw=heights)[:, 0]
    figure.subplots_adjust(left=0.115, right=0.97, top=0.87, bottom=0.07)
    _title(figure, chart)
    rows[0].set_xlim(*_limits(chart))
    for axes, (draw, _) in zip(rows, known, strict=True):
        _quiet(axes)
        draw(axes, chart)
    _legend(rows[0], chart)
    rows[-1].set_xlabel("step (finished optimizer steps)", color=INK)
    figure.align_ylabels(list(rows))
    return figure


def _is_measured(chart: Chart) -> bool:
    """Return whether there is a value of the metric to draw."""
    return bool(chart.line) or any(math.isfinite(item.metrics.get(chart.metric, math.nan)) for item in chart.items)


def _limits(chart: Chart) -> tuple[float, float]:
    width = max(chart.last_step - chart.first_step, 1, chart.last_step * _NEAREST)
    return chart.first_step - 0.03 * width, chart.last_step + 0.03 * width


def _text(text: str, length: int) -> str:
    # A dollar sign would begin a formula.
    text = one_line(text).replace("$", r"\$")
    return text if len(text) <= length else text[: length - 3] + "..."


def _title(figure: Any, chart: Chart) -> None:
    figure.text(0.115, 0.96, _text(chart.title, 90), fontsize=13, fontweight="bold", color=INK)
    lines = textwrap.wrap(_text(chart.subtitle, 300), 130)[:2]
    figure.text(0.115, 0.95, "\n".join(lines), va="top", fontsize=8, color="#52606d", linespacing=1.4)


def _quiet(axes: Any) -> None:
    """Hide everything but the data."""
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, labelsize=8, colors="#52606d")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _color(item: ChartItem) -> str:
    if item.kind == "rescue":
        return RESCUE
    return {"kept": KEPT, "retired": RETIRED, "abandoned": ABANDONED}[item.fate]


def _drawn(value: float) -> float:
    """Return where a value is drawn: matplotlib computes with distances, which overflow at the ends of the range."""
    return max(-_LARGEST, min(_LARGEST, value))


def _metric(axes: Any, chart: Chart) -> None:
    better = {"min": " (lower is better)", "max": " (higher is better)"}.get(chart.mode, "")
    axes.set_ylabel(f"{_text(chart.metric, 30)}{better}", color=INK, fontsize=9)
    if chart.line:
        line = [(step, _drawn(value)) for step, value in chart.line]
        axes.plot(*zip(*line, strict=True), color=FAINT, linewidth=1.1, zorder=1)
    values = [(item, item.metrics.get(chart.metric, math.nan)) for item in chart.items]
    points = [(item, value) for item, value in values if math.isfinite(value)]
    points.sort(key=lambda point: ("retired", "abandoned", "kept").index(point[0].fate))
    # The points of many checkpoints are small, so that they do not cover each other.
    size = 26 * min(1.0, max(0.2, 60 / max(len(points), 1)))
    axes.scatter(
        [item.step for item, _ in points],
        [_drawn(value) for _, value in points],
        s=[size if item.fate == "kept" else 0.8 * size for item, _ in points],
        facecolors=[_color(item) if item.fate == "kept" else "white" for item, _ in points],
        edgecolors=[_color(item) if item.fate != "retired" else FAINT for item, _ in points],
        linewidths=1.2 if len(points) <= 100 else 0.8,
        zorder=2,
    )
    for item, value in points:
        if item.is_best or item.aliases:
            _label(axes, item, value, chart)
    axes.margins(y=0.18)


def _star(axes: Any, step: int, y: float, size: int) -> None:
    axes.scatter([step], [y], marker="*", s=size, color=BEST, edgecolors=INK, linewidths=0.7, zorder=5)


def _label(axes: Any, item: ChartItem, value: float, chart: Chart) -> None:
    if item.is_best:
        _star(axes, item.step, _drawn(value), 190)
    labels = [*(["best"] if item.is_best else []), *(alias.rpartition(".")[0] or alias for alias in item.aliases)]
    text = f"{', '.join(dict.fromkeys(labels))}: {number_text(value, 4)}"
    # Above the largest value the label of the best covers no point. The other labels are on the other side.
    above = 11 if item.is_best == (chart.mode == "max") else -16
    left, right = _limits(chart)
    place = (item.step - left) / (right - left)
    axes.annotate(
        _text(text, 40), (item.step, _drawn(value)), xytext=(0, above), textcoords="offset points", zorder=6,
        ha="right" if place > 0.9 else "left" if place < 0.1 else "center", fontsize=8, color=INK,
    )  # fmt: skip


def _legend(axes: Any, chart: Chart) -> None:
    there = {name for item in chart.items for name in (item.fate, item.kind, "best" if item.is_best else "")}
    for name, (marker, face, edge) in _MARKS.items():
        if name in there:
            size = 90 if marker == "*" else 26
            label = "survivor" if name == "kept" and chart.gone else name
            axes.scatter([], [], marker=marker, s=size, facecolors=face, edgecolors=edge, linewidths=1, label=label)
    if there:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=5, fontsize=8, frameon=False)


def _bars(axes: Any, chart: Chart) -> None:
    from matplotlib.collections import PolyCollection

    axes.set_ylabel(f"{'survivors' if chart.gone else 'checkpoints'},\nfrom save to removal", color=INK, fontsize=9)
    axes.set_yticks([])
    axes.grid(visible=False)
    count = len(chart.items)
    height = 0.62 if count <= 200 else 1.0
    left, right = _limits(chart)
    least = (right - left) * 0.006
    bars = []
    for number, item in enumerate(chart.items):
        # A checkpoint that is kept has no end: its bar runs out of the picture.
        end = right if item.fate == "kept" else max(item.end, item.step + least)
        low, high = -number - height / 2, -number + height / 2
        bars.append([(item.step, low), (end, low), (end, high), (item.step, high)])
        if item.is_best:
            _star(axes, item.step, -number, 110)
    rows = max(count, _LEAST)
    axes.add_collection(PolyCollection(bars, facecolors=[_color(item) for item in chart.items], linewidths=0))
    axes.set_ylim(-rows + 0.3, 0.7)
    room = axes.get_window_extent().height / axes.figure.dpi * 72 / rows
    for number in labelled(chart.items, room):
        _name(axes, chart.items[number], -number, (left, right), inside=room >= _LABEL)


def labelled(items: Sequence[ChartItem], room: float) -> list[int]:
    """Return which bars have a label: all if there is room, else the best, aliases, and what is kept, where it fits.

    Args:
        items: The checkpoints, from top to bottom.
        room: Height of each row in points.
    """
    if room >= _LABEL:
        return [*range(len(items))]
    order = sorted(range(len(items)), key=lambda n: (not items[n].is_best, not items[n].aliases, -items[n].step))
    chosen: list[int] = []
    for number in order:
        if items[number].fate == "kept" and all(abs(number - other) * room >= 1.2 * _LABEL for other in chosen):
            chosen.append(number)
    return chosen


def _name(axes: Any, item: ChartItem, y: float, limits: tuple[float, float], *, inside: bool) -> None:
    left, right = limits
    text = _text(f"{item.name}{f' <- {chr(44).join(item.aliases)}' if item.aliases else ''}", 60)
    is_late = item.step > (left + right) / 2
    offset = (-8, 0) if is_late else (8, 0)
    on_bar = not is_late and item.fate == "kept"
    # If bars are lower than the label, it covers some of them.
    box = None if inside else {"boxstyle": "square,pad=0.15", "facecolor": "white", "alpha": 0.9, "linewidth": 0}
    axes.annotate(
        text, (item.step if is_late or on_bar else item.end, y), xytext=offset, textcoords="offset points",
        va="center", ha="right" if is_late else "left", fontsize=7, color="white" if on_bar and inside else INK,
        bbox=box, zorder=6, annotation_clip=True,
    )  # fmt: skip


def _disk(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.set_ylabel("bytes of the\nsurvivors" if chart.gone else "bytes on disk", color=INK, fontsize=9)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size_text(value)))
    axes.locator_params(axis="y", nbins=4)
    steps, sizes = zip(*chart.disk, strict=True)
    steps, sizes = (*steps, _limits(chart)[1]), (*sizes, sizes[-1])
    axes.fill_between(steps, sizes, step="post", color=DISK, alpha=0.16, linewidth=0)
    axes.step(steps, sizes, where="post", color=DISK, linewidth=1.3)
    axes.set_ylim(0, max(sizes) * 1.15)

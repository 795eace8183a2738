"""Draws a story as a PNG: the metric, each checkpoint's life, the bytes on disk."""

from __future__ import annotations

import io
import math
import os
import textwrap
from pathlib import Path
from typing import Any, Final

from checkpointer._display import number_text, one_line, size_text
from checkpointer.tools.chart.data import Chart, ChartItem

__all__ = ["plot"]

INK: Final = "#1f2933"
FAINT: Final = "#9aa5b1"
GRID: Final = "#e4e7eb"
KEPT: Final = "#2563eb"
RETIRED: Final = "#b8c1cc"
ABANDONED: Final = "#b07bd8"
RESCUE: Final = "#dc2626"
BEST: Final = "#f59e0b"
DISK: Final = "#0f766e"
_LEAST: Final = 8
"""Room for so many bars, also if there are fewer."""
_NAMED: Final = 16
"""With more lives than this, only those that are kept have their name beside them."""


def plot(story: Chart, path: str | os.PathLike[str] | None = None) -> bytes:
    r"""Draw a story as a PNG of 1440 x 1080 pixels, and write it to ``path`` if given.

    Above: the metric at each step; filled points are kept, hollow ones were retired, the star is the best. Middle: a
    bar from each checkpoint's save to its end. Below: bytes on disk.

    Args:
        story: From `checkpointer.tools.chart.data.story_of_records` or ``story_of_timeline``.
        path: The file, replaced if it is there.

    Raises:
        ImportError: If matplotlib is not installed; the message names the extra.

    Example:
        >>> from checkpointer import Manifest
        >>> from checkpointer.tools.chart.data import story_of_records
        >>> plot(story_of_records("empty", Manifest()))[:4]
        b'\x89PNG'
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        msg = "drawing needs a package more: pip install 'torch-checkpointer[plot]'"
        raise ImportError(msg) from error
    figure = Figure(figsize=(10, 7.5), dpi=144, facecolor="white")
    FigureCanvasAgg(figure)
    rows = figure.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": [3, 3, 1.3], "hspace": 0.12})
    figure.subplots_adjust(left=0.09, right=0.97, top=0.88, bottom=0.07)
    _title(figure, story)
    for axes, draw in zip(rows, (_metric, _lives, _disk), strict=True):
        _quiet(axes)
        draw(axes, story)
    rows[0].set_xlim(*_limits(story))
    rows[2].set_xlabel("step", color=INK)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = buffer.getvalue()
    if path is not None:
        Path(path).write_bytes(data)
    return data


def _limits(story: Chart) -> tuple[float, float]:
    width = max(story.last_step - story.first_step, 1)
    return story.first_step - 0.03 * width, story.last_step + 0.03 * width


def _text(text: str, length: int) -> str:
    # A dollar sign would begin a formula.
    text = one_line(text).replace("$", r"\$")
    return text if len(text) <= length else text[: length - 3] + "..."


def _title(figure: Any, story: Chart) -> None:
    figure.text(0.09, 0.96, _text(story.title, 90), fontsize=13, fontweight="bold", color=INK)
    lines = textwrap.wrap(_text(story.subtitle, 300), 130)[:2]
    figure.text(0.09, 0.95, "\n".join(lines), va="top", fontsize=8, color="#52606d", linespacing=1.4)


def _quiet(axes: Any) -> None:
    """Take away what is not data."""
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, labelsize=8, colors="#52606d")
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _color(scene: ChartItem) -> str:
    if scene.kind == "rescue":
        return RESCUE
    return {"kept": KEPT, "retired": RETIRED, "abandoned": ABANDONED}[scene.fate]


def _metric(axes: Any, story: Chart) -> None:
    mode = f" ({story.mode})" if story.mode else ""
    axes.set_ylabel(_text(f"{story.metric or 'no metric'}{mode}", 40), color=INK)
    if story.line:
        axes.plot(*zip(*story.line, strict=True), color=FAINT, linewidth=1.1, zorder=1)
    values = [(scene, scene.metrics[story.metric]) for scene in story.scenes if story.metric in scene.metrics]
    points = [(scene, value) for scene, value in values if math.isfinite(value)]
    for zorder, fate in enumerate(("retired", "abandoned", "kept"), start=2):
        _points(axes, [(scene, value) for scene, value in points if scene.fate == fate], zorder)
    for scene, value in points:
        _label(axes, scene, value, story)
    axes.margins(y=0.18)
    _legend(axes, story)


def _points(axes: Any, points: list[tuple[ChartItem, float]], zorder: int) -> None:
    axes.scatter(
        [scene.step for scene, _ in points],
        [value for _, value in points],
        s=[26 if scene.fate == "kept" else 20 for scene, _ in points],
        facecolors=[_color(scene) if scene.fate == "kept" else "white" for scene, _ in points],
        edgecolors=[_color(scene) if scene.fate != "retired" else FAINT for scene, _ in points],
        linewidths=1.2,
        zorder=zorder,
    )


def _label(axes: Any, scene: ChartItem, value: float, story: Chart) -> None:
    """Say beside a point that it is the best, or what alias names it."""
    if scene.is_best:
        axes.scatter([scene.step], [value], marker="*", s=190, color=BEST, edgecolors=INK, linewidths=0.7, zorder=5)
    words = [*(["best"] if scene.is_best else []), *(alias.rpartition(".")[0] or alias for alias in scene.aliases)]
    if not words:
        return
    text = f"{', '.join(dict.fromkeys(words))}: {number_text(value, 4)}"
    above = 11 if story.mode == "max" or not scene.is_best else -16
    axes.annotate(
        _text(text, 40), (scene.step, value), xytext=(0, above), textcoords="offset points", zorder=6,
        ha="right" if scene.step > 0.9 * story.last_step else "center", fontsize=8, color=INK,
    )  # fmt: skip


def _legend(axes: Any, story: Chart) -> None:
    marks: dict[str, tuple[str, str, str]] = {
        "kept": ("o", KEPT, KEPT),
        "retired": ("o", "white", FAINT),
        "abandoned": ("o", "white", ABANDONED),
        "rescue": ("o", RESCUE, RESCUE),
        "best": ("*", BEST, INK),
    }
    there = {scene.fate for scene in story.scenes} | {scene.kind for scene in story.scenes}
    there |= {"best"} if any(scene.is_best for scene in story.scenes) else set()
    for name, (marker, face, edge) in marks.items():
        if name in there:
            size = 90 if marker == "*" else 26
            axes.scatter([], [], marker=marker, s=size, facecolors=face, edgecolors=edge, linewidths=1, label=name)
    if there:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=5, fontsize=8, frameon=False)


def _lives(axes: Any, story: Chart) -> None:
    from matplotlib.collections import PolyCollection

    axes.set_ylabel("lives of checkpoints", color=INK)
    axes.set_yticks([])
    axes.grid(visible=False)
    count = len(story.scenes)
    height = 0.62 if count <= 200 else 1.0
    left, right = _limits(story)
    least = (right - left) * 0.006
    bars = []
    for number, scene in enumerate(story.scenes):
        # One that lives on has no end: its bar runs out of the picture.
        end = right if scene.fate == "kept" else max(scene.end, scene.step + least)
        low, high = -number - height / 2, -number + height / 2
        bars.append([(scene.step, low), (end, low), (end, high), (scene.step, high)])
        if scene.is_best:
            axes.scatter(
                [scene.step], [-number], marker="*", s=110, color=BEST, edgecolors=INK, linewidths=0.6, zorder=5
            )
        if count <= _NAMED or (scene.fate == "kept" and count <= 4 * _NAMED):
            _name(axes, scene, -number, (left, right))
    axes.add_collection(PolyCollection(bars, facecolors=[_color(scene) for scene in story.scenes], linewidths=0))
    axes.set_ylim(-max(count, _LEAST) + 0.3, 0.7)


def _name(axes: Any, scene: ChartItem, y: float, limits: tuple[float, float]) -> None:
    left, right = limits
    text = _text(f"{scene.name}{f' <- {chr(44).join(scene.aliases)}' if scene.aliases else ''}", 60)
    is_late = scene.step > (left + right) / 2
    offset = (-6, 0) if is_late else (8, 0)
    inside = not is_late and scene.fate == "kept"
    axes.annotate(
        text, (scene.step if is_late or inside else scene.end, y), xytext=offset, textcoords="offset points",
        va="center", ha="right" if is_late else "left", fontsize=7, color="white" if inside else INK,
    )  # fmt: skip


def _disk(axes: Any, story: Chart) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.set_ylabel("on disk", color=INK)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size_text(value)))
    axes.locator_params(axis="y", nbins=4)
    if story.disk:
        steps, sizes = zip(*story.disk, strict=True)
        steps, sizes = (*steps, _limits(story)[1]), (*sizes, sizes[-1])
        axes.fill_between(steps, sizes, step="post", color=DISK, alpha=0.16, linewidth=0)
        axes.step(steps, sizes, where="post", color=DISK, linewidth=1.3)
        axes.set_ylim(0, max(max(sizes), 1) * 1.15)

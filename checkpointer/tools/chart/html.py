"""Makes one HTML page of a chart: it needs no network, and what storage says in it is text, never markup."""

from __future__ import annotations

import json
import os
from importlib import resources

from checkpointer._display import escaped_json
from checkpointer._new_file import new_file
from checkpointer.tools.chart.data import Chart


def report(chart: Chart, path: str | os.PathLike[str] | None = None) -> str:
    """Return a chart as a self-contained HTML page, and write it to ``path`` if given.

    The same as the picture, with details under the pointer, a table that sorts by any column and filters, and a light
    and a dark look. A content policy in the page forbids it to load anything from anywhere.

    Args:
        chart: From `checkpointer.tools.chart.data.chart_of_records` or ``chart_of_timeline``.
        path: The file, replaced if it is there.

    Example:
        >>> from checkpointer import Manifest
        >>> from checkpointer.tools.chart.data import chart_of_records
        >>> report(chart_of_records("</script><b>", Manifest())).count("</script>")
        2
    """
    template = resources.files("checkpointer.tools.chart").joinpath("report.html").read_text(encoding="utf-8")
    data = json.dumps(chart.to_dict(), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # With these escapes a name cannot end the element that it is in.
    for char in "<>&":
        data = data.replace(char, f"\\u{ord(char):04x}")
    data = escaped_json(data)
    page = template.replace("__CHART__", data)
    if path is not None:
        with new_file(path, replaces=True) as stream:
            stream.write(page.encode(errors="backslashreplace"))
    return page

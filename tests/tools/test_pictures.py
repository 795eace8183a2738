"""The picture and the page: they show what there is, in a real browser too, and believe nothing that a name says."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image
from support.chromium import CHROMIUM, browser
from support.commands import POLICY, command, train
from support.factories import history as records_of
from support.factories import manifest, record
from support.servers.fixtures import lacks

from checkpointer import EverySteps, KeepBest, KeepLast, Metric, Policy
from checkpointer.tools.chart.data import Chart, chart_of_records, chart_of_timeline
from checkpointer.tools.chart.html import report
from checkpointer.tools.chart.png import BEST, KEPT, RETIRED, plot
from checkpointer.tools.history import read_history
from checkpointer.tools.simulate import simulate

TRIED = Policy(EverySteps(10), [KeepBest(2, "loss", mode="min"), KeepLast(1)], last="link")
CSV = b"step,epoch,loss\n" + b"".join(
    b"%d,%d,%.3f\n" % (10 * n, n, loss) for n, loss in enumerate((0.9, 0.4, 0.6, 0.3, 0.5, 0.35), start=1)
)


def tried(policy: Policy = TRIED) -> Chart:
    """Return the chart of six checkpoints, two of which are kept."""
    history = read_history(CSV, "metrics.csv")
    return chart_of_timeline("tried", simulate(policy, history, size=10**6), history)


def pixels(data: bytes, color: str) -> int:
    """Return how many pixels of a PNG have very nearly this colour."""
    picture = image.imread(io.BytesIO(data))[..., :3]
    wanted = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return int((abs(picture - wanted).max(axis=-1) < 0.02).sum())


# The chart


def test_the_chart_of_a_simulation_has_every_checkpoint() -> None:
    """Also of what is retired."""
    chart = tried()
    assert [(10, "retired", 30), (20, "retired", 60), (30, "retired", 40)] == [
        (s.step, s.fate, s.end) for s in chart.items[:3]
    ]
    assert ["last.ckpt"] == [alias for item in chart.items for alias in item.aliases]
    assert [40] == [item.step for item in chart.items if item.is_best]
    assert 2 * 10**6 == chart.disk[-1][1]


def test_the_chart_of_a_directory_has_what_is_there() -> None:
    """And says how many are not."""
    found = [*records_of(0.5, 0.3), record(step=9, metrics={"loss": float("nan")}, kind="rescue")]
    chart = chart_of_records("run", manifest(found), metric=Metric("loss", mode="min"))
    assert [False, True, False] == [item.is_best for item in chart.items]
    assert ((1, 0.5), (2, 0.3)) == chart.line
    assert "6 more were retired" in chart.subtitle
    assert "nan" == chart.to_dict()["items"][2]["metrics"]["loss"]


# The picture


def test_the_picture_shows_what_is_kept_retired_and_best() -> None:
    """The colours are compared."""
    data = plot(tried())
    assert (1080, 1440) == image.imread(io.BytesIO(data)).shape[:2]
    for color, least in ((KEPT, 2000), (RETIRED, 2000), (BEST, 60)):
        assert least < pixels(data, color), color
    assert 0 == pixels(plot(chart_of_records("empty", manifest())), KEPT)


@pytest.mark.parametrize("name", ["$x_{$", "a" * 250, "\u202e\x1b[31m", "<b>&"])
def test_no_name_breaks_the_picture(name: str) -> None:
    """Neither formulas, nor long ones, nor control characters."""
    chart = chart_of_records(name, manifest([record(name, metrics={name: 1.0, "y": float("inf")})]))
    assert b"\x89PNG" == plot(chart)[:4]


# The page


def test_the_page_holds_all_it_needs_and_nothing_that_a_name_smuggles_in() -> None:
    """No address to load from, and no element but our own."""
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>.ckpt"
    page = report(chart_of_records(evil, manifest([record(evil, reason=evil, metrics={evil: 1.0})])))
    assert 2 == page.count("<script")
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    assert evil == json.loads(found[1])["items"][0]["name"]


@pytest.mark.slow
def test_the_page_works_in_a_browser(tmp_path: Path) -> None:
    """It is drawn, says more under the pointer, sorts at a click, filters, and turns dark; the network is not asked."""
    if CHROMIUM is None:
        lacks("chromium", "there is none; run as root: .ci/install-servers")
    evil = "<img src=https://example.org/x onerror=document.title='owned'>.ckpt"
    path = tmp_path / "report.html"
    report(tried(), path)
    with browser(tmp_path / "profile") as page:
        page.open(path)
        assert "tried" == page.run("document.title")
        names = "[...document.querySelectorAll('#rows tr')].map((row) => row.children[1].textContent)"
        assert ["10", "20", "30", "40", "50", "60"] == page.run(names)
        assert 6 == page.run("document.querySelectorAll('#bars rect').length")

        page.point("#bars rect.kept")
        tip = page.run("getComputedStyle(tip).display + ' ' + tip.textContent")
        assert tip.startswith("block epoch=4-step=40.ckpt")
        assert "step 40, epoch 4, 1.0 MB" in tip
        assert 3 == page.run("document.querySelectorAll('.on').length")  # Its bar, its star and its row.

        page.point("#head th:nth-child(4) button", click=True)
        assert ["40", "60", "20", "50", "30", "10"] == page.run(names)
        page.point("#head th:nth-child(4) button", click=True)
        assert ["10", "30", "50", "20", "60", "40"] == page.run(names)

        light = page.screenshot()
        page.point("#look", click=True)
        assert "dark" == page.run("getComputedStyle(document.documentElement).colorScheme")
        dark = page.screenshot()
        assert pixels(light, "#ffffff") > 500_000 > pixels(dark, "#ffffff")
        assert min(pixels(light, KEPT), pixels(dark, "#6ea0ff")) > 1000

        page.open(path, look="dark", width=420)
        assert "dark" == page.run("getComputedStyle(document.documentElement).colorScheme")
        assert page.run("document.documentElement.scrollWidth <= innerWidth")  # Nothing sticks out on a phone.

        report(chart_of_records(evil, manifest([record(evil, reason=evil, metrics={"loss": 1.0})])), path)
        page.open(path)
        assert (evil, 0) == (page.run("title.textContent"), page.run("document.querySelectorAll('img').length"))
        assert [] == page.errors


# The commands


def test_plot_and_report_take_a_directory_or_a_file_of_metrics(tmp_path: Path) -> None:
    """What is there, or what would be."""
    folder = train(tmp_path / "run", 0.9, 0.2, 0.5)
    POLICY.to_yaml(tmp_path / "p.yaml")
    (tmp_path / "m.csv").write_bytes(CSV)
    ask: list[tuple[Any, ...]] = [(folder,), (tmp_path / "m.csv", "-p", tmp_path / "p.yaml", "--size", "1GB")]
    for number, (source, *more) in enumerate(ask):
        png, html = tmp_path / f"{number}.png", tmp_path / f"{number}.html"
        assert f"{png}\n" == command("plot", source, png, *more).out
        assert 0 == command("report", source, html, *more).code
        assert b"\x89PNG" == png.read_bytes()[:4]
        assert "-step=20.ckpt" in html.read_text()


def test_plot_and_report_say_what_is_wrong_and_write_nothing(tmp_path: Path) -> None:
    """As every command."""
    (tmp_path / "m.csv").write_bytes(CSV)
    folder = train(tmp_path / "run", 0.9)
    for name, out in (("plot", tmp_path / "out.png"), ("report", tmp_path / "out.html")):
        for source, more, expected in (
            (tmp_path / "m.csv", (), "pass --policy FILE"),
            (tmp_path / "nothing", (), "there is no file or directory"),
            (folder, ("--by", "los", "--mode", "min"), "did you mean 'loss'?"),
            (folder, ("--by", "loss"), "belong together"),
        ):
            said = command(name, source, out, *more)
            assert (2, "", True) == (said.code, said.out, expected in said.err), said
            assert not out.exists()

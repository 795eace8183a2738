"""The picture and the page: they show what there is, in a real browser too, and believe nothing that a name says."""

from __future__ import annotations

import io
import itertools
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
from checkpointer.errors import PolicyError
from checkpointer.tools.chart.data import Chart, ChartItem, chart_of_records, chart_of_timeline
from checkpointer.tools.chart.html import report
from checkpointer.tools.chart.picture import BEST, DISK, FORMATS, KEPT, RETIRED, labelled, plot
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
    assert "3 survivors of 9 checkpoints; 6 more were retired" in chart.subtitle
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


def test_a_size_that_is_not_known_is_left_out_and_is_not_zero() -> None:
    """Of the picture, of the page and of the table of ``simulate``."""
    history = read_history(CSV, "metrics.csv")
    chart = chart_of_timeline("tried", simulate(TRIED, history), history)
    assert ((), {None}) == (chart.disk, {item.size for item in chart.items})
    assert 0 < pixels(plot(tried()), DISK)
    assert 0 == pixels(plot(chart), DISK)
    known, unknown = record("a", size=10), record("b", step=2, size=0)
    assert () == chart_of_records("run", manifest([known, unknown])).disk


@pytest.mark.parametrize(("count", "room"), [(3, 40.0), (19, 9.1), (40, 4.3), (400, 0.4)])
def test_bars_have_labels_where_they_fit(count: int, room: float) -> None:
    """All of few; of many the best, and others that do not cover its label."""
    items = [
        ChartItem(name=f"{n}", step=n, epoch=0, size=1, metrics={}, fate="kept", end=count, why="", is_best=n == 2)
        for n in range(count)
    ]
    chosen = sorted(labelled(items, room))
    assert 2 in chosen
    assert (count <= 19) == (count == len(chosen))
    assert all(9 <= (after - before) * room for before, after in itertools.pairwise(chosen))
    assert len(chosen) <= 19


def test_the_extension_is_the_format_of_a_picture(tmp_path: Path) -> None:
    """Another extension is refused by name, and nothing is written."""
    begins = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF", "jpg": b"\xff\xd8", "webp": b"RIFF"}
    for form in FORMATS:
        plot(tried(), tmp_path / f"a.{form}")
        assert (tmp_path / f"a.{form}").read_bytes().startswith(begins[form])
    with pytest.raises(PolicyError, match=r"a\.gif has no extension of a picture; use one of \.png, \.svg"):
        plot(tried(), tmp_path / "a.gif")
    folder = train(tmp_path / "run", 0.9)
    said = command("plot", folder, tmp_path / "b.gif")
    assert (2, True) == (said.code, "'" in said.err and ".svg" in said.err), said
    assert 0 == command("plot", folder, tmp_path / "b.svg").code


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

        page.open(path, width=500)
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        sizes = "[...document.querySelectorAll('svg text')].map((node) => node.getBoundingClientRect().height)"
        assert min(page.run(sizes)) >= 10  # Text in a drawing does not shrink with the page.
        cells = "[...document.querySelectorAll('#rows td')].map((node) => node.getBoundingClientRect().right)"
        assert max(page.run(cells)) <= 500  # The table needs no scrolling to the side.

        unknown = chart_of_timeline("x", simulate(TRIED, read_history(CSV, "m.csv")), read_history(CSV, "m.csv"))
        report(unknown, tmp_path / "unknown.html")
        page.open(tmp_path / "unknown.html")
        assert "on disk" not in page.run("document.body.innerText")
        report(chart_of_records("x", manifest([record("a", serial=9)])), tmp_path / "survivors.html")
        page.open(tmp_path / "survivors.html")
        assert "survivors" in page.run("tiles.textContent")
        assert "8retired, or not copied" in page.run("tiles.textContent")

        page.open(path, look="dark", width=420)
        assert "dark" == page.run("getComputedStyle(document.documentElement).colorScheme")
        assert page.run("document.documentElement.scrollWidth <= innerWidth")  # Nothing sticks out on a phone.

        report(chart_of_records(evil, manifest([record(evil, reason=evil, metrics={"loss": 1.0})])), path)
        page.open(path)
        assert (evil, 0) == (page.run("title.textContent"), page.run("document.querySelectorAll('img').length"))
        assert [] == page.errors


ENDS = (1e17, 1e17 + 16), (-1.7976931348623157e308, 1.7976931348623157e308), (0.0, 5e-324), (1e308, 1.7e308)
STEPS = (1, 2), (2**62, 2**62), (0, 2**63 - 1)


def two(values: tuple[float, float], steps: tuple[int, int]) -> Chart:
    """Return the chart of two checkpoints."""
    records = [record(f"a{n}", step=steps[n], serial=n + 1, metrics={"loss": values[n]}) for n in (0, 1)]
    return chart_of_records("ends", manifest(records), metric=Metric("loss", mode="min"))


@pytest.mark.slow
def test_the_page_draws_metrics_whose_neighbours_are_far_apart_or_at_the_ends(tmp_path: Path) -> None:
    """The script ends, each point has a place, and there are ticks."""
    if CHROMIUM is None:
        lacks("chromium", "there is none; run as root: .ci/install-servers")
    places = "[...document.querySelectorAll('#metric circle')].map((node) => Number(node.getAttribute('cy')))"
    with browser(tmp_path / "profile") as page:
        for values, steps in itertools.product(ENDS, STEPS):
            report(two(values, steps), tmp_path / "report.html")
            page.open(tmp_path / "report.html")
            assert [] == page.errors, (values, steps)
            assert 2 == page.run("document.querySelectorAll('#rows tr').length")
            assert all(0 <= place <= 270 for place in page.run(places)), (values, steps)
            assert page.run("document.querySelectorAll('#metric .grid').length > 0")
            assert not page.run("document.body.innerHTML.includes('NaN')"), (values, steps)


@pytest.mark.parametrize(("values", "steps"), [(ENDS[0], STEPS[1]), (ENDS[1], STEPS[2]), (ENDS[2], STEPS[0])])
def test_the_picture_draws_them_too(values: tuple[float, float], steps: tuple[int, int]) -> None:
    """Without a warning about numbers that overflow."""
    assert len(plot(two(values, steps))) > 10_000


@pytest.mark.slow
def test_the_page_of_200_000_rows_opens_and_is_thinned(tmp_path: Path) -> None:
    """It draws some of them, names the number of all, and its filter finds each one."""
    if CHROMIUM is None:
        lacks("chromium", "there is none; run as root: .ci/install-servers")
    items = tuple(
        ChartItem(
            name=f"step={n}.ckpt", step=n, epoch=0, size=10, metrics={"loss": 1 / n}, why="",
            fate="kept" if n % 1000 == 0 else "retired", end=n + 9, is_best=n == 200_000,
        )
        for n in range(1, 200_001)
    )  # fmt: skip
    line = tuple((item.step, item.metrics["loss"]) for item in items)
    disk = tuple((item.step, 10 * item.step) for item in items)
    chart = Chart(
        title="many", subtitle="", metric="loss", mode="min", line=line, items=items, disk=disk, risk=disk,
        last_step=200_000,
    )  # fmt: skip
    report(chart, tmp_path / "report.html")
    with browser(tmp_path / "profile") as page:
        page.open(tmp_path / "report.html")
        assert [] == page.errors
        count = "document.querySelectorAll('{}').length"
        assert 500 == page.run(count.format("#rows tr"))
        assert "199500 more are not shown: sort or filter to see them" == page.run("more.textContent")
        bars = page.run(count.format("#bars rect"))
        assert 1500 < bars < 4100
        assert f"{bars} of 200000 are drawn" in page.run("barsname.textContent")
        assert 200 == page.run(count.format("#bars rect.kept"))
        assert 1 == page.run(count.format("#metric .star"))
        assert "200000" == page.run("tiles.querySelector('b').textContent")
        assert page.run("document.querySelector('#metric .line').getAttribute('points').length") < 200_000
        page.run("(filter.value = 'step=123457.ckpt', filter.dispatchEvent(new Event('input')))")
        assert ["step=123457.ckpt"] == page.run(
            "[...document.querySelectorAll('#rows tr')].map((row) => row.children[0].textContent)"
        )


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

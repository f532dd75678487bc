"""Reports and the app in a real Chromium: tables, plots, every tab, hostile texts, and no request that leaves."""

import http.client
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from src.common.html_report import page as html_page
from src.common.html_report import table
from src.view import ViewConfig, main
from tests.browser import CHROMIUM, Watched
from tests.conftest import ROOT, module_command
from tests.some_runs import HOSTILE, make_runs

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path and no CHROMIUM variable")
CHART, NOTHING, TABLE = ".main-svg", '[data-testid="stAlert"]', '[data-testid="stDataFrame"]'
TABS = {
    "Entropy": CHART, "Top-k mass": CHART, "Thinking tokens": CHART, "Correlations": CHART, "Compare": CHART,
    "Dose–response": NOTHING, "Directions": NOTHING, "Raw data": TABLE,
}  # fmt: skip
"""Each tab and what it shows of two runs of personas."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_runs(tmp_path_factory.mktemp("runs"))


def free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]


@contextmanager
def view(*words: str | Path) -> Iterator[int]:
    """`src.view` in a process of its own, once it listens; yields the port."""
    port = free_port()
    command = module_command("view", [*map(str, words), "--port", str(port)])
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        end = time.monotonic() + 120
        while not listens(port):
            assert process.poll() is None and time.monotonic() < end, process.stdout.read()
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(30)


def listens(port: int) -> bool:
    with socket.socket() as some:
        return some.connect_ex(("127.0.0.1", port)) == 0


def shown_rows(watched: Watched, n_table: int = 0) -> int:
    return watched.page.locator(".table").nth(n_table).locator("tbody tr:visible").count()


def test_tables_sort_and_filter_by_text_category_and_range(watched: Watched, tmp_path: Path) -> None:
    animals = (("ant", "small", 1.5), ("bee", "small", None), ("cow", "large", 10), ("<i>dog</i>", "large", 9))
    rows = [{"name": name, "kind": kind, "n": n} for name, kind, n in animals]
    file = tmp_path / "page.html"
    file.write_text(html_page("Animals", [("Rows", table(rows))]), encoding="utf-8")
    watched.page.goto(file.as_uri())
    box = watched.page.locator(".table")
    assert shown_rows(watched) == 4
    watched.page.get_by_placeholder("filter rows").fill("large <i>")
    assert shown_rows(watched) == 1 and box.locator(".count").inner_text() == "1 of 4"
    watched.page.get_by_placeholder("filter rows").fill("")
    box.get_by_text("filter by column").click()
    box.get_by_label("kind").select_option("small")
    assert shown_rows(watched) == 2
    box.get_by_placeholder("to").fill("2")
    assert shown_rows(watched) == 1
    box.get_by_label("kind").select_option("all")
    box.get_by_placeholder("from").fill("9.5")
    assert shown_rows(watched) == 0
    box.get_by_placeholder("to").fill("")
    assert box.locator("tbody tr:visible").inner_text().startswith("cow")
    box.get_by_placeholder("from").fill("")
    box.locator("thead button", has_text="n").last.click()
    assert box.locator("tbody tr td:last-child").all_inner_texts() == ["1.5", "9", "10", "–"]
    watched.assert_quiet()


def test_a_report_in_a_browser_is_text_and_plots_and_loads_nothing(watched: Watched, root: Path) -> None:
    main(ViewConfig(runs=[root / "cool", root / "doses", root / "french"]))
    for run, heading in (
        ("cool", "Entropy (nats) by category"),
        ("doses", "Dose and response: projection"),
        ("french", "Scores by layer"),
    ):
        watched.page.goto((root / run / "report.html").as_uri())
        watched.page.locator(".plot .main-svg").first.wait_for()
        assert watched.page.get_by_role("heading", name=heading).count() == 1
        assert watched.page.title() != "owned"
    watched.page.goto((root / "cool" / "report.html").as_uri())
    assert HOSTILE.strip() in watched.page.locator("section", has_text="Answers side by side").first.inner_text()
    watched.page.locator(".plot").first.hover(position={"x": 300, "y": 200})
    watched.page.locator(".hoverlayer .hovertext").first.wait_for()
    watched.assert_quiet()


def status(port: int, path: str, host: str = "localhost") -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest("GET", path, skip_host=True)
    connection.putheader("Host", f"{host}:{port}")
    connection.endheaders()
    return connection.getresponse().status


def test_served_reports_are_the_named_ones_and_nothing_else(watched: Watched, root: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.html").write_text("secret")
    with view("--serve", root / "cool", root / "french") as port:
        watched.page.goto(f"http://localhost:{port}/")
        watched.page.get_by_role("link", name="cool").click()
        watched.page.locator(".plot .main-svg").first.wait_for()
        assert "Personas and prompts · some/model" in watched.page.title()
        watched.assert_quiet()
        for path in (
            "/doses.html", "/../secret.html", "/%2e%2e/secret.html", "/cool/config.json", "/config.json", "/cool",
            f"/..%2f..%2f{tmp_path.name}%2fsecret.html", "//etc/passwd", "/cool.html%00",
        ):  # fmt: skip
            assert status(port, path) == 404, path
        assert status(port, "/cool.html") == 200 and status(port, "/cool.html", host="evil.example") == 403
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(f"http://{socket.gethostname()}:{port}/cool.html", timeout=5)


@pytest.fixture(scope="module")
def app(root: Path) -> Iterator[str]:
    with view("--app", root / "cool", root / "warm", "--root", root) as port:
        yield f"http://localhost:{port}/?run="


def opened(watched: Watched, address: str) -> None:
    watched.page.goto(address)
    watched.page.get_by_text("rows").first.wait_for()
    settled(watched)


def settled(watched: Watched) -> None:
    """Wait until the page's script has run, and see that it raised nothing."""
    watched.page.locator('[data-testid="stApp"][data-test-script-state="notRunning"]').wait_for()
    assert watched.page.locator('[data-testid="stException"]').count() == 0, watched.page.inner_text("body")


def choose(watched: Watched, label: str, value: str, within: str = "body") -> None:
    """One value of a select box or multiselect."""
    box = watched.page.locator(within).get_by_label(label, exact=True).last
    takes_several = box.locator("xpath=ancestor::*[@data-testid='stMultiSelect']").count() > 0
    box.click()
    box.fill(value)
    watched.page.get_by_role("option", name=value, exact=True).first.click()
    settled(watched)
    if takes_several:
        # Its list stays open, in front of what is below it. In a box of one value Escape would empty it.
        watched.page.keyboard.press("Escape")
        settled(watched)


def open_tab(watched: Watched, name: str, content: str) -> None:
    """Open a tab and wait for what it is to show."""
    watched.page.get_by_role("tab", name=name, exact=True).click()
    watched.page.locator('[role="tabpanel"]:visible').locator(content).first.wait_for()
    settled(watched)


def test_every_tab_on_two_runs(watched: Watched, app: str) -> None:
    opened(watched, f"{app}cool&run=warm")
    assert watched.page.get_by_text("32 of 32 rows").count() == 1
    for name, content in TABS.items():
        open_tab(watched, name, content)
    open_tab(watched, "Compare", CHART)
    watched.page.get_by_text("mean difference, first − second: ").wait_for()
    watched.page.get_by_text("16 pairs").wait_for()
    watched.assert_quiet()


def test_filters_and_the_way_down_to_a_hostile_answer(watched: Watched, app: str) -> None:
    opened(watched, f"{app}cool")
    choose(watched, "Category", "animal")
    watched.page.get_by_text("8 of 16 rows").wait_for()
    choose(watched, "Persona", "<b>Owl</b>")
    watched.page.get_by_text("4 of 16 rows").wait_for()
    opened(watched, f"{app}cool")
    shown = '[role="tabpanel"]:visible'
    choose(watched, "Look into one category", "fiction", shown)
    choose(watched, "Look into one persona", "Hamlet", shown)
    # Those in closed expanders are there before it; a click waits for the element that it found first.
    rows = watched.page.locator(f"{TABLE}:visible").last
    rows.wait_for()
    rows.scroll_into_view_if_needed()
    answer = watched.page.locator('[data-testid="stCode"]').last
    deadline, number = time.monotonic() + 60, 0
    while time.monotonic() < deadline:
        rows.click(position={"x": 15, "y": 50 + 35 * (number % 4)})
        # The script begins a moment after the click.
        watched.page.wait_for_timeout(500)
        settled(watched)
        if answer.count() and "document.title" in answer.inner_text():
            break
        number += 1
    text = answer.inner_text()
    assert text.strip() == HOSTILE.strip() and watched.page.title() == "Tiller"
    watched.assert_quiet()


def test_doses_directions_and_an_older_tools_rows(watched: Watched, app: str) -> None:
    opened(watched, f"{app}doses&run=french")
    open_tab(watched, "Dose–response", CHART)
    watched.page.get_by_text("random control").first.wait_for()
    open_tab(watched, "Directions", CHART)
    opened(watched, f"{app}older")
    open_tab(watched, "Thinking tokens", CHART)
    watched.assert_quiet()


def test_no_run_and_runs_elsewhere(watched: Watched, app: str) -> None:
    opened(watched, f"{app}cool")
    watched.page.get_by_role("button", name="Clear all").first.click()
    watched.page.get_by_text("Choose a run on the left.").wait_for()
    for name in ("../..", "/etc", "absent"):
        watched.page.goto(f"{app}{name}")
        watched.page.get_by_text("The runs cannot be shown").wait_for()
    assert watched.left == []

"""In a browser: a release from the dashboard's form, its run page and report, and MLflow's pages.

Screenshots stay in the test's folder.
"""

import re
import shutil

import pytest
from conftest import PATIENCE

from infra.orchestration.services import ui
from infra.registry import Registry
from infra.registry.tracking import tracking_store

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path"),
]
SECOND = 1000  # ms
MODEL = "from-the-form"


@pytest.fixture(scope="module")
def addresses(services_home):
    with ui(services_home) as addresses:
        yield addresses


@pytest.fixture
def browser_page(addresses, worker):
    """A page, until which no loop of Playwright's runs in this thread, and after which none."""
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1400})
        page.set_default_timeout(30 * SECOND)
        yield page
        browser.close()


class Form:
    """The form of `release`, as a person finds it."""

    def __init__(self, page, address):
        self.page = page
        page.goto(f"{address}/deployments")
        page.locator("a.deployment-list__name", has_text=re.compile("^release$")).click()
        page.get_by_role("button", name="Run", exact=True).click()
        page.get_by_text("Custom run").click()

    def field(self, name):
        title = self.page.get_by_text(f"{name} (Optional)", exact=True)
        return self.page.locator(".schema-form-property", has=title).last

    def fill(self, name, text):
        self.field(name).locator("input, textarea").fill(text)

    def choose(self, name, option):
        self.field(name).locator(".p-select-button__control").press("ArrowDown")
        self.page.get_by_role("option", name=option, exact=True).click()

    def submit(self):
        self.page.get_by_role("button", name="Submit").click()


def test_a_release_from_the_form(
    browser_page, addresses, recipes, content, brief, services_home, tmp_path
):
    page, pictures = browser_page, iter(range(100))

    def look(name, page=page):
        page.screenshot(path=tmp_path / f"{next(pictures)}-{name}.png", full_page=True)

    evaluation = {
        "perplexity": {"dataset": {"path": "json", "data_files": brief.partition("=")[2]}}
    }
    evaluation["perplexity"]["sequence_length"] = 128
    recipe = recipes("form", registry={"name": MODEL}, evaluation=evaluation)

    form = Form(page, addresses.prefect)
    assert "columns that share one group scale; at least 8" in form.field("group_size").inner_text()
    form.field("recipe").get_by_role("button", name="file").click()
    form.fill("recipe", recipe)
    form.choose("order", "gar")
    form.choose("enabled", "false")
    form.field("settings").get_by_role("button", name="Add item").click()
    form.fill("settings", "calibration.batch_size=2")
    form.fill("group_size", "4")
    form.submit()
    page.get_by_text("4 is less than the minimum of 8").first.wait_for()
    look("refused")
    form.fill("group_size", "64")
    with page.expect_response("**/create_flow_run") as answered:
        form.submit()
    parameters = answered.value.request.post_data_json["parameters"]
    filled = {name: fields for name, fields in parameters["overrides"].items() if fields}
    assert filled == {"scheme": {"order": "gar", "group_size": 64}, "repair": {"enabled": False}}
    assert parameters["settings"] == ["calibration.batch_size=2"]

    run = answered.value.json()["id"]
    promoted = page.get_by_text("Promoted", exact=True).first
    cards = page.locator(".artifact-card__title")

    def open_run():
        page.goto(f"{addresses.prefect}/runs/flow-run/{run}")
        promoted.wait_for(timeout=PATIENCE * SECOND)
        page.get_by_text("Artifacts", exact=True).click()
        cards.first.wait_for()

    open_run()
    look("run")
    for name, shown in {"verdict": "version 1, MLflow run", "gates": "perplexity_token"}.items():
        cards.get_by_text(name, exact=True).click()
        page.get_by_text(shown).wait_for()
        look(name)
        open_run()
    cards.get_by_text("report", exact=True).click()
    link = page.get_by_role("link", name=re.compile("report.html$"))
    link.wait_for()
    look("link")
    with page.expect_popup() as opened:
        link.click()
    title = opened.value.frame_locator("iframe").get_by_role("heading", level=1)
    assert title.inner_text().splitlines() == ["Promoted", f"{MODEL} version 1"]
    look("report", opened.value)

    page.goto(f"{addresses.mlflow}/#/models/{MODEL}")
    page.get_by_text("champion").first.wait_for()
    look("model")
    page.get_by_role("link", name="Version 1").click()
    page.get_by_text("model_digest").first.wait_for()
    look("version")
    page.locator("a[href*='/runs/']").click()
    page.get_by_text("perplexity_token").first.wait_for()
    look("mlflow-run")

    assert Registry(tracking_store(services_home)[0]).champion(MODEL) == 1

"""The page of the app: its options, and all of it in a real browser."""

from __future__ import annotations

import gc
import shutil
from dataclasses import fields
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio", reason="the extra app is not installed")

from sd_tokenmerge import METHODS, PRESETS, MergeConfig
from sd_tokenmerge.app.components import FieldComponent
from sd_tokenmerge.app.page import AppPage
from sd_tokenmerge.app.studio import Studio
from sd_tokenmerge.sampling.options import GenerateOptions

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.mark.parametrize("preset", PRESETS)
def test_options_are_read_back(preset):
    config = PRESETS[preset]
    options = [
        FieldComponent(MergeConfig, entry.name, getattr(config, entry.name))
        for entry in fields(MergeConfig)
    ]
    values = {option.component: option.component.value for option in options}
    assert MergeConfig(**{option.name: option.read(values) for option in options}) == config
    by_name = {option.name: option for option in options}
    assert [value for _, value in by_name["method"].component.choices] == list(METHODS)
    switch = by_name["first_order"]
    assert switch.read({switch.component: "off"}) is False
    assert by_name["seed"].component.label == "merge seed"
    levels = by_name["levels"]
    assert [levels.read({levels.component: text}) for text in ("", "2", "x")] == [None, 2, "x"]


# gradio's server leaves its event loop and sockets to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def page(tiny_model):
    options = GenerateOptions(out="-", model=str(tiny_model), device="cpu")
    page = AppPage(Studio(options))
    page.url = page.launch(host="127.0.0.1", port=None)
    yield page
    page.blocks.close()
    del page
    gc.collect()


@pytest.fixture
def tab(page):
    """A browser's tab with the page; its `urls` are all that it has asked for."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        tab = browser.new_page()
        urls = []
        tab.on("request", lambda request: urls.append(request.url))
        tab.goto(page.url)
        yield SimpleNamespace(page=tab, urls=urls)
        browser.close()


@pytest.mark.slow
def test_in_a_browser(page, tab):
    at = tab.page

    def fill(**values):
        for label, value in values.items():
            at.get_by_role("spinbutton", name=label, exact=True).fill(str(value))

    def click(name, role="button"):
        at.get_by_role(role, name=name, exact=True).first.click()

    fill(height=64, width=64, steps=2)
    at.get_by_role("button", name="More merging options").click()  # options keep their values
    click("Generate")
    at.get_by_role("row", name="merged").last.wait_for()
    assert at.locator("img").count() >= 3

    click("Clusters", "tab")
    at.get_by_text("step 1 of 3").wait_for()
    at.get_by_role("slider", name="step").fill("3")
    at.get_by_text("step 3 of 3").wait_for()

    fill(height=60)
    click("Generate")
    at.get_by_text("`height` must be a multiple of 8, got 60.").wait_for()

    fill(height=64, steps=900, seed=1)
    click("Side by side", "tab")
    click("Generate")
    at.get_by_text("Unmerged picture").first.wait_for()
    click("Cancel")
    click("Compare methods", "tab")
    fill(steps=2)
    click("Compare")  # the device is free
    at.get_by_role("row", name="random two-sided").wait_for()

    assert [url for url in tab.urls if not url.startswith((page.url, "data:", "blob:"))] == []

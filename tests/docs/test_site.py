"""The site in a browser: no error, nothing that sticks out, tables that sort."""

import importlib.util
import shutil
import time
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
SIZES = {"desktop": (1240, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("docs_build", DOCS / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    out = tmp_path_factory.mktemp("site")
    begun = time.process_time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["build.py", "--out", str(out)])
        build.main()
    assert time.process_time() - begun < 60
    return out


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, Debian's."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium or chromedriver here (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    yield found
    found.quit()


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("page", ["index", "board", "strategy/gpm", "seeds"])
def test_a_page_in_a_browser(site, browser, page, size):
    width, height = SIZES[size]
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get((site / f"{page}.html").as_uri())
    ask = browser.execute_script
    assert browser.get_log("browser") == []
    assert ask("return document.documentElement.scrollWidth") <= width
    assert ask("return [...document.images].every(i => i.complete && i.naturalWidth > 0)")
    if page == "board":
        column = (
            "return [...document.querySelectorAll('.md-typeset table')[0].tBodies[0].rows]"
            ".map(r => parseFloat(r.cells[2].textContent))"
        )
        button = (
            "document.querySelectorAll('.md-typeset table')[0].querySelectorAll('th button')[2]"
        )
        ask(f"{button}.click()")
        down = ask(column)
        assert down == sorted(down, reverse=True)
        ask(f"{button}.click()")
        assert ask(column) == sorted(down)

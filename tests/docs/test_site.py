"""Serve the built site and look at it with a real browser. Nothing may leave the machine.

`make docs` builds the site. Without a site or without Chromium these tests are skipped, but not
where `CI=true`: there they fail. `CHROMIUM` names another executable, `SITE` another folder, and
with `SHOTS` every page is photographed into that folder.
"""

import functools
import http.server
import json
import os
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[2]
SITE = Path(os.environ.get("SITE", ROOT / "site"))
CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
PREFIX = "/mmau/"
PAGES = sorted(
    path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html") if path.name != "404.html"
)
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-domain-reliability",
    "--disable-sync",
    "--no-first-run",
    "--no-pings",
]
SCREENS = {"desktop": (1300, 900), "phone": (390, 844)}


def _need(found, sentence):
    """Skip, or fail where the build machine has promised to have everything."""
    if found:
        return
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(sentence)
    pytest.skip(sentence)


@pytest.fixture(scope="session")
def site():
    _need(PAGES, f"there is no built site at {SITE}: run `make docs`")
    return SITE


def test_the_site_is_built(site):
    expected = {
        "index.html",
        "gallery/index.html",
        "reference/modules.html",
        "paper.html",
        "components.html",
        "components/hga.html",
        "explanation/selective_scan.html",
        "reference/config.html",
        "reference/command_line.html",
        "glossary.html",
    }
    assert expected <= set(PAGES)


# ------------------------------------------------------------------ what the files say
class _References(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.assets, self.ids = [], [], set()

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if given.get("id"):
            self.ids.add(given["id"])
        if tag == "a" and given.get("name"):
            self.ids.add(given["name"])
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag in {"img", "script", "source", "iframe"} and given.get("src"):
            self.assets.append(given["src"])
        if tag == "link" and given.get("rel") not in {"canonical", "next", "prev", "alternate"}:
            self.assets.append(given["href"])


@functools.cache
def _references(page):
    parser = _References()
    parser.feed((SITE / page).read_text(encoding="utf-8"))
    return parser


def _target(page, url):
    """File and anchor that a link of a page leads to, or `None` if it leaves the site."""
    full = urlsplit(urljoin("http://site" + PREFIX + page, url))
    if full.netloc != "site":
        return None
    assert full.path.startswith(PREFIX), f"{page}: {url} leaves the site"
    path = unquote(full.path[len(PREFIX) :])
    return path + "index.html" if path == "" or path.endswith("/") else path, unquote(full.fragment)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_assets(page):
    found = _references(page)
    for url in found.assets:
        assert url.startswith("data:") or _target(page, url), f"{page}: {url} is on another host"
    for url in [*found.links, *found.assets]:
        if url.startswith(("mailto:", "data:")) or not _target(page, url):
            continue
        path, anchor = _target(page, url)
        assert (SITE / path).is_file(), f"{page}: {url} is dead"
        # `__` anchors are the theme's own, made by its script.
        if anchor and path.endswith(".html") and not anchor.startswith("__"):
            assert anchor in _references(path).ids, f"{page}: there is no anchor {url}"


def test_downloads(site):
    notebooks = sorted(site.rglob("*.ipynb"))
    assert len(notebooks) == len(list((ROOT / "examples").glob("plot_*.py")))
    for path in notebooks:
        book = json.loads(path.read_text(encoding="utf-8"))
        code = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
        compile("\n".join(code[1:]), path.name, "exec")  # the first cell is `%matplotlib inline`
        script = path.with_suffix(".py")
        assert script.read_bytes() == (ROOT / "examples" / script.name).read_bytes()


# ------------------------------------------------------------------ what a reader sees
@pytest.fixture(scope="session")
def base(site):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def translate_path(self, path):
            path = urlsplit(path).path
            return (
                str(site / unquote(path[len(PREFIX) :])) if path.startswith(PREFIX) else "/nowhere"
            )

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}{PREFIX}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def browser(site):
    _need(CHROMIUM.exists(), f"there is no Chromium at {CHROMIUM}: install it or set CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=QUIET)
        yield browser
        browser.close()


@pytest.fixture(params=SCREENS)
def tab(browser, base, request):
    width, height = SCREENS[request.param]
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    problems = []

    def outside(url):
        return not url.startswith((base, SITE.as_uri(), "data:", "blob:"))

    page.on(
        "console",
        lambda m: (
            problems.append(f"{m.type}: {m.text}") if m.type in {"error", "warning"} else None
        ),
    )
    page.on("pageerror", lambda error: problems.append(f"script error: {error}"))
    page.on(
        "requestfailed",
        # What was under way when a click left the page is aborted, and no fault.
        lambda request: (
            None
            if request.failure == "net::ERR_ABORTED"
            else problems.append(f"failed: {request.url}")
        ),
    )
    page.on(
        "request",
        lambda request: (
            problems.append(f"left the machine: {request.url}") if outside(request.url) else None
        ),
    )
    page.on(
        "response",
        lambda response: (
            problems.append(f"{response.status}: {response.url}")
            if response.status >= 400
            else None
        ),
    )
    yield page
    context.close()
    assert not problems, problems


def _shoot(tab, name):
    if folder := os.environ.get("SHOTS"):
        width = tab.viewport_size["width"]
        tab.screenshot(path=f"{folder}/{width}_{name}.png", full_page=True)


@pytest.mark.parametrize("path", PAGES)
def test_page(tab, base, path):
    tab.goto(base + path, wait_until="load")
    tab.evaluate(
        "async () => { for (const i of document.images) { i.loading = 'eager';"
        " await i.decode().catch(() => {}) } }"
    )
    broken = tab.evaluate(
        "[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)"
    )
    assert not broken
    empty = tab.evaluate(
        "[...document.querySelectorAll('.formula')].map(f => f.querySelector('math'))"
        ".filter(m => !m || m.getBoundingClientRect().width < 4).length"
    )
    assert empty == 0, "a formula is not drawn"
    assert tab.locator(".arithmatex").count() == 0, "a formula is not rendered"
    text = tab.inner_text("article")
    assert "$$" not in text
    assert "\\(" not in text
    wider = tab.evaluate("document.documentElement.scrollWidth - innerWidth")
    assert wider <= 0, f"the page is {wider} px wider than the screen"
    _shoot(tab, path.removesuffix(".html").replace("/", "_"))


def test_formulas_are_there(tab, base):
    tab.goto(base + "paper.html", wait_until="networkidle")
    assert tab.locator("math[display=block]").count() >= 4
    assert tab.locator("math mfrac").count() >= 2


@pytest.mark.parametrize("opened", ["from a server", "from a folder"])
def test_search(tab, base, site, opened):
    start = base if opened == "from a server" else site.as_uri() + "/"
    tab.goto(start + "index.html", wait_until="networkidle")
    if tab.viewport_size["width"] < 600:
        tab.click("label.md-header__button[for=__search]")
    else:
        tab.click(".md-search__input")
    tab.locator(".md-search__input").press_sequentially("asymmetric", delay=30)
    result = tab.locator(".md-search-result__link").first
    result.wait_for(timeout=10_000)
    assert tab.locator(".md-search-result__item").count() >= 2
    result.click()
    tab.wait_for_load_state("networkidle")
    assert "asymmetric" in tab.inner_text("article").lower()


def test_dark_scheme(tab, base):
    tab.goto(base + "gallery/plot_asymmetric_loss.html", wait_until="networkidle")
    assert tab.evaluate("document.body.dataset.mdColorScheme") == "default"
    light = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.click("label[title=Dark]")
    assert tab.evaluate("document.body.dataset.mdColorScheme") == "slate"
    tab.wait_for_timeout(400)
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != light
    _shoot(tab, "dark")


def test_names_in_code_lead_to_the_api(tab, base):
    tab.goto(base + "gallery/plot_asymmetric_loss.html", wait_until="networkidle")
    tab.locator("pre code a", has_text="asymmetric_loss").first.click()
    tab.wait_for_url("**/reference/functional.html#*asymmetric_loss")


def test_an_api_page_shows_its_examples(tab, base):
    tab.goto(base + "reference/functional.html", wait_until="networkidle")
    tab.locator(".gl-mini a.gl-card[href*=plot_asymmetric_loss]").first.click()
    tab.wait_for_url("**/gallery/plot_asymmetric_loss.html")

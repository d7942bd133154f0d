"""The page in a real Chromium: from disk, by mouse and by keyboard, in light, dark and narrow.

``DISTILCACHE_SCREENSHOTS=CACHE`` also writes the pictures of docs/ from that cache.
"""

import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.view.command import view_command
from tests.pipeline.test_view import data_of
from tests.pipeline.view_support import HOSTILE, make_project, open_browser

DOCS = Path(__file__).resolve().parents[2] / "docs"
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def browser():
    yield from open_browser()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory, small_cache, small_teacher):
    home = tmp_path_factory.mktemp("browser") / "home"
    cache = make_project(home, small_cache(), small_teacher)
    out = home / "view.html"
    view_command(str(cache), students=[], out=out, sequences=12, seed=0, device="cpu")
    return out


@pytest.fixture
def visit(browser, page_file):
    """``visit(path=..., **context)``: the page, and a list of what went wrong on it."""
    contexts = []

    def go(path=page_file, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}, **options})
        contexts.append(context)
        page = context.new_page()
        page.wrong = []
        page.on("console", lambda message: page.wrong.append(message.text))
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("request", lambda r: r.url == path.as_uri() or page.wrong.append(r.url))
        page.goto(path.as_uri())
        page.wait_for_selector("#list [aria-selected=true]")
        return page

    yield go
    for context in contexts:
        context.close()


def shares(page):
    """Probabilities of the table, ``{word: [teacher, students ...]}``; of all others under -1."""
    rows = page.locator("#distribution tbody tr:not(.sum)")
    return {
        int(row.get_attribute("data-token") or -1): [
            float(p) if p else None
            for p in row.locator("td").evaluate_all("tds => tds.map(td => td.dataset.probability)")
        ]
        for row in rows.all()
    }


def expected(data, entry, number):
    """The same from the page's numbers, by numpy."""
    temperature = data["temperatures"][number]
    bias = data["bias"].get(str(number))
    found = {}
    for place, (word, logit) in enumerate(zip(entry["tokens"], entry["logits"], strict=True)):
        if place < entry["stored"]:
            own = [logit / temperature - entry["stored_norm"][number]]
        else:
            raised = logit + (bias[word] if bias else 0)
            own = [raised / temperature - entry["rest_norm"][number]]
        own += [
            told["logits"][place] / temperature - told["norm"][number] for told in entry["students"]
        ]
        found[word] = np.exp(own)
    return found


def current(page, data):
    """Entry of the position that the page shows."""
    number = int(page.locator("#list [aria-selected=true]").get_attribute("id").split("-")[1])
    place = int(page.locator("#text [aria-pressed=true]").get_attribute("data-place"))
    entries = data["sequences"][number]["positions"]
    return next(entry for entry in entries if entry["position"] == place)


def agrees(page, data, number):
    wanted, found = expected(data, current(page, data), number), shares(page)
    rest = found.pop(-1)
    assert len(found) >= 4
    for word, values in found.items():
        assert values == pytest.approx(list(wanted[word]), rel=1e-4)
    assert rest == pytest.approx([1 - sum(v[n] for v in found.values()) for n in range(len(rest))],
                                 abs=1e-4)  # fmt: skip
    caption = page.locator("#distribution caption").inner_text()
    assert caption == f"Probabilities at T = {data['temperatures'][number]:g}"


def test_opens_at_once_and_asks_for_nothing(visit):
    begun = time.perf_counter()
    page = visit()
    assert time.perf_counter() - begun < 2
    took = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
    assert 0 < took < 2000
    assert page.wrong == []
    assert page.title() == "home/cache: what the teacher said"


def test_the_policy_refuses_requests(visit):
    page = visit()
    refused = page.evaluate(
        """() => new Promise(done => {
            document.addEventListener("securitypolicyviolation", e => done(e.violatedDirective));
            document.body.append(Object.assign(new Image(), {src: "https://example.org/x.png"}));
            setTimeout(() => done("nothing"), 3000);
        })"""
    )
    assert refused == "img-src"


def test_slider_changes_probabilities(visit, page_file):
    page, data = visit(), data_of(page_file)
    assert data["temperatures"][data["start"]] == 1
    agrees(page, data, data["start"])
    seen = []
    for number in (0, data["temperatures"].index(2.0), len(data["temperatures"]) - 1):
        page.locator("#temperature").fill(str(number))
        agrees(page, data, number)
        seen.append(max(v[0] for word, v in shares(page).items() if word >= 0))
        value = data["temperatures"][number]
        assert page.locator("#temperature").get_attribute("aria-valuetext") == f"T = {value:g}"
    assert seen == sorted(seen, reverse=True)
    page.locator("#temperature").focus()
    page.keyboard.press("Home")
    agrees(page, data, 0)
    page.keyboard.press("]")
    agrees(page, data, 1)


def test_mouse(visit, page_file):
    page, data = visit(), data_of(page_file)
    page.locator("#list [role=option]").nth(4).click()
    assert page.locator("#sequence-4").get_attribute("aria-selected") == "true"
    button = page.locator("#text button").last
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert page.locator("#text [aria-pressed=true]").count() == 1
    agrees(page, data, data["start"])
    before = page.locator("#distribution tbody tr").count()
    page.get_by_role("button", name=re.compile("tokens kept")).click()
    assert page.locator("#distribution tbody tr").count() > before
    agrees(page, data, data["start"])
    assert page.wrong == []


def test_keyboard_alone(visit, page_file):
    page, data = visit(), data_of(page_file)
    active = "document.activeElement.id"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # skip to the sequences
    assert page.evaluate(active) == "reader"
    page.keyboard.press("/")
    assert page.evaluate(active) == "search"
    for _ in range(2):
        page.keyboard.press("Tab")
    assert page.evaluate(active) == "sequence-0"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.evaluate(active) == "sequence-2"
    assert page.locator("#sequence-2").get_attribute("aria-selected") == "true"
    page.keyboard.press("Enter")
    focused = "Number(document.activeElement.dataset.place)"
    first = page.evaluate(focused)
    page.keyboard.press("ArrowRight")
    second = page.evaluate(focused)
    assert second > first
    assert current(page, data)["position"] == second
    assert f"Position {second}, original" in page.locator("#live").inner_text()
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(focused) == first
    page.keyboard.press("ArrowDown")
    assert page.locator("#sequence-3").get_attribute("aria-selected") == "true"
    page.keyboard.press("Escape")
    assert page.evaluate(active) == "sequence-3"
    page.keyboard.press("End")
    assert page.evaluate(active) == f"sequence-{len(data['sequences']) - 1}"
    # What is redrawn keeps the focus.
    for focus in ("more", "told"):
        page.locator(f"#{focus}").focus()
        page.keyboard.press("]")
        assert page.evaluate(active) == focus
    agrees(page, data, data["start"] + 2)
    # No letter does anything outside of the section.
    page.locator("#theme").focus()
    page.keyboard.press("[")
    page.keyboard.press("/")
    assert page.evaluate(active) == "theme"
    agrees(page, data, data["start"] + 2)
    assert page.wrong == []


def test_search(visit, page_file):
    page, data = visit(), data_of(page_file)

    def text_of(sequence):
        pieces = zip(sequence["words"], sequence["glued"], strict=True)
        return "".join(
            (" " if glued == "0" else "") + data["words"][word] for word, glued in pieces
        )

    for wanted in ("river", "of gar", "RIVER"):
        page.locator("#search").fill(wanted)
        having = [n for n, s in enumerate(data["sequences"]) if wanted.lower() in text_of(s)]
        ids = page.locator("#list [role=option]").evaluate_all("all => all.map(item => item.id)")
        assert ids == [f"sequence-{n}" for n in having]
        assert f"{len(having)} of {len(data['sequences'])}" in page.locator("#found").inner_text()
        if having:
            assert page.locator("#text mark").count() >= 1
    page.locator("#search").fill("nothing like it")
    assert page.locator("#list [role=option]").count() == 0
    page.locator("#search").fill("")
    assert page.locator("#list [role=option]").count() == len(data["sequences"])
    page.locator("#order").select_option("unsure")
    means = [
        np.mean(
            [entry["entropy"][data["start"]] for entry in data["sequences"][int(n)]["positions"]]
        )
        for n in page.locator("#list [role=option]").evaluate_all(
            "all => all.map(item => item.id.split('-')[1])"
        )
    ]
    assert means == sorted(means, reverse=True)


def test_sections(visit, page_file):
    page, data = visit(), data_of(page_file)
    headings = page.get_by_role("heading", level=2).all_inner_texts()
    assert headings == [
        "Sequences", "Where the bytes go", "How the signals are spread",
        "How the students learnt", "Quality against latency", "Provenance",
    ]  # fmt: skip
    names = page.locator("#budget tbody th").all_inner_texts()
    assert names == [column["name"] for column in data["columns"]]
    assert page.locator("#histograms svg[role=img]").count() == len(data["histograms"])
    assert page.locator("#curves polyline").count() == 6
    assert page.locator("#pareto circle").count() == 3
    # Slower than the 1x32 and worse: not on the front.
    assert len(page.locator("#pareto .front").get_attribute("points").split()) == 2


def test_hostile_texts_stay_texts(visit):
    page = visit()
    assert page.evaluate("window.broken") is None
    assert page.locator("#pareto text", has_text="</script>").count() == 1
    assert HOSTILE in page.locator("#pareto tbody th").all_text_contents()
    assert page.locator("img").count() == 0


def test_usable_by_a_screen_reader(visit):
    page = visit()
    # What assistive technology sees: names of everything that can be operated.
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, [role=option]")]
            .filter(e => !(e.getAttribute("aria-label") || e.textContent.trim()
                || (e.labels && e.labels.length))).map(e => e.outerHTML)"""
    )
    assert unnamed == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(e => +e.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False))
    assert page.evaluate("document.documentElement.lang") == "en"
    for role, name in (
        ("searchbox", "Search the text"), ("combobox", "Order"),
        ("listbox", "Sampled sequences"), ("slider", "Temperature"),
        ("navigation", "Sections"), ("main", None), ("table", "Probabilities"),
    ):  # fmt: skip
        assert page.get_by_role(role, name=name).count() == 1, role
    assert page.get_by_role("button", name=re.compile(r"position \d+, masked")).count() >= 1
    replaced = page.locator("#text button.random").first
    for _ in range(12):
        if replaced.count():
            break
        page.locator("#text button").first.focus()
        page.keyboard.press("ArrowDown")
    seen = replaced.locator("small").inner_text()
    assert f"replaced by “{seen}”" in replaced.get_attribute("aria-label").replace("“…", "“")
    # One stop of the tab key in the list, one in the text.
    for box in ("#list", "#text"):
        assert page.locator(f"{box} [tabindex='0']").count() == 1


CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (e) => { for (; e; e = e.parentElement) {
    const c = rgb(getComputedStyle(e).backgroundColor);
    if (c.length === 3 || c[3] === 1) return c; } return [255, 255, 255]; };
  const texts = "p, dt, dd, h1, h2, h3, th, td, button.token, li span, a, label";
  const seen = [...document.querySelectorAll(texts)]
    .filter(e => e.textContent.trim() && e.checkVisibility());
  return seen.map(e => {
      const [a, b] = [light(rgb(getComputedStyle(e).color)), light(ground(e))];
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.outerHTML.slice(0, 90)]; })
    .filter(([ratio]) => ratio < 4.5);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(visit, scheme):
    page = visit(color_scheme=scheme)
    theme = "document.documentElement.dataset.theme"
    assert page.evaluate(theme) == scheme
    assert page.evaluate(CONTRAST) == []
    button = page.get_by_role("button", name="Dark")
    assert button.get_attribute("aria-pressed") == str(scheme == "dark").lower()
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    button.click()
    other = {"light": "dark", "dark": "light"}[scheme]
    assert page.evaluate(theme) == other
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.reload()
    assert page.evaluate(theme) == other
    assert page.wrong == []


def test_dark_from_the_first_moment(browser, page_file):
    """The style alone is dark, before any script has run."""
    context = browser.new_context(color_scheme="dark", java_script_enabled=False)
    page = context.new_page()
    page.goto(page_file.as_uri())
    ground = page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor")
    assert max(map(int, re.findall(r"\d+", ground))) < 60
    assert page.locator("main > noscript").is_visible()
    context.close()


LETTERS = "all => all.map(e => e.getBoundingClientRect().height)"
"""Heights of texts in pixels."""


def test_narrow_windows(visit):
    for width in (320, 400, 768):
        page = visit(viewport={"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator("#distribution table").is_visible()
        texts = page.locator("#pareto svg text").evaluate_all(LETTERS)
        assert min(texts) > 10
        assert page.wrong == []
    page.set_viewport_size({"width": 320, "height": 800})
    texts = "[...document.querySelectorAll('#pareto svg text')]"
    page.wait_for_function(f"() => Math.min(...({LETTERS})({texts})) > 10")  # once it is redrawn


def test_a_cache_without_a_teacher(visit, small_cache, tmp_path):
    view_command(
        str(small_cache(mask_only=True)), students=[], out=tmp_path / "view.html", sequences=4,
        seed=0, device="cpu",
    )  # fmt: skip
    page = visit(tmp_path / "view.html")
    assert "masks alone" in page.locator("#distribution").inner_text()
    assert page.locator("#training, #models").count() == 0
    assert page.wrong == []


def test_pictures_for_the_docs(visit, tmp_path):
    cache = os.environ.get("DISTILCACHE_SCREENSHOTS")
    if not cache:
        pytest.skip("writes docs/view-*.png where DISTILCACHE_SCREENSHOTS names a cache")
    out = tmp_path / "view.html"
    values, _ = view_command(cache, students=[], out=out, sequences=48, seed=0, device="cpu")
    assert values["bytes"] < 5_000_000
    kinds = {
        "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 1000}},
        "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 1000}},
        "narrow": {"color_scheme": "light", "viewport": {"width": 390, "height": 844}},
    }
    for name, options in kinds.items():
        scale = 2 if name == "narrow" else 1.5
        page = visit(out, device_scale_factor=scale, reduced_motion="reduce", **options)
        _choose_a_telling_position(page, data_of(out))
        if name == "narrow":
            page.evaluate("document.querySelector('article').scrollIntoView()")
        page.screenshot(path=DOCS / f"view-{name}.png")
        assert page.wrong == []
    assert json.loads(json.dumps(values))["students"]


def _choose_a_telling_position(page, data):
    """A place where the teacher finds the word, but is not sure of it."""
    found = []
    for number, sequence in enumerate(data["sequences"]):
        original = {place: word for place, word, kind in sequence["masked"] if kind == "mask"}
        for entry in sequence["positions"]:
            word = original.get(entry["position"])
            if word is not None and len(data["words"][word]) > 4:
                p = expected(data, entry, data["start"])[word][0]
                found.append((abs(p - 0.4), number, entry["position"]))
    _, number, place = min(found)
    page.locator(f"#sequence-{number}").click()
    page.locator(f"#text [data-place='{place}']").click()
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")

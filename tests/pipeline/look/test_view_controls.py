"""The page operated in a real Chromium: by mouse, by keyboard and by a screen reader."""

import re

import numpy as np
import pytest

from tests.pipeline.look.view_support import agrees, current, data_of, shares

pytestmark = pytest.mark.timeout(120)


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

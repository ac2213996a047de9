"""The page: what is in it, that nothing from outside gets out of its place, and that it is written whole or not at all."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from tests.inspect.made import drawn

from roadie import inspect as looking
from roadie.errors import ConfigError
from roadie.inspect.page import _table
from roadie.inspect.states import PlaceChange, StateChange

VOID = {"meta", "link", "br", "img", "hr", "input", "wbr"}
HOSTILE = '<script>alert(1)</script>" onload="x'


class Outline(HTMLParser):
    """Elements with their attributes, and whether every one is closed where it should be."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def states(name="road", places=3):
    changes = tuple(PlaceChange(n, 0.01 * n, 1 - 0.02 * n, (0, 0, 0), (1, 1, 1)) for n in range(places))
    return StateChange(name, 100, changes)


@pytest.fixture(scope="module")
def adapters():
    return {
        HOSTILE: drawn("road_1", seed=1, base_model_name_or_path=HOSTILE),
        "two": drawn("road_2", seed=2),
        "four": drawn("road_4", seed=3, spread=0.9),
    }


@pytest.fixture(scope="module")
def report(adapters):
    return looking.report(adapters, [states(HOSTILE), states("two")])


@pytest.fixture(scope="module")
def page(report):
    return looking.to_html(report)


@pytest.fixture(scope="module")
def outline(page):
    return Outline(page)


def test_it_holds_all_that_was_asked_for(report):
    assert [section.key for section in report.sections] == [
        *("overview", "comparison", "sharing", "states", "adapter-1", "adapter-2", "adapter-3")
    ]
    of_one = [picture.title for picture in report.sections[-1].pictures]
    assert of_one == [
        *("Angle by layer", "Log-scale by layer", "Change by layer", "Angles by kind", "Log-scales by kind"),
        *("All blocks", "Angle over depth", "Log-scale over depth"),
    ]
    assert [picture.title for picture in report.sections[1].pictures] == [
        *("Distances", "Families", "Alignments", "Agreement by layer")
    ]
    assert len({picture.key for picture in report.pictures}) == len(report.pictures)


def test_names_from_outside_are_text_and_nothing_else(page, outline):
    assert outline.all("script") == []
    assert not [name for _, attributes in outline.elements for name in attributes if name.startswith("on")]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_words_and_cells_of_a_picture_are_text_too(report):
    section = report.sections[-1]
    picture = replace(section.pictures[0], title=HOSTILE, caption=HOSTILE, alternative=HOSTILE)
    page = looking.to_html(replace(report, sections=(replace(section, pictures=(picture,)),)))
    outline = Outline(page + _table((HOSTILE, HOSTILE), [(HOSTILE, HOSTILE)], HOSTILE))
    assert outline.all("script") == []
    assert not [name for _, attributes in outline.elements for name in attributes if name.startswith("on")]
    assert outline.all("svg")[0]["aria-label"] == HOSTILE


def test_it_asks_for_nothing(outline):
    """Links lead inside the page, and the policy forbids the rest."""
    addresses = [
        value
        for tag, attributes in outline.elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "action", "data", "poster", "srcset")
        if (tag, name, value) != ("link", "href", "data:,")
    ]
    assert addresses
    assert all(address.startswith("#") for address in addresses)
    (policy,) = [each["content"] for each in outline.all("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")


def test_every_figure_has_words_for_those_who_do_not_see_it(outline, report):
    images = outline.all("svg")
    assert [image["aria-label"] for image in images] == [picture.alternative for picture in report.pictures]
    assert all(image["role"] == "img" and len(image["aria-label"]) > 40 for image in images)
    assert all(table in outline.elements for table in outline.elements if table[0] == "table")


def test_ids_are_unique_and_what_is_pointed_at_is_there(page, outline):
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    pointed = set(re.findall(r'(?:href="#|url\(#|aria-labelledby=")([^")]+)', page))
    assert pointed <= set(ids)
    assert len(pointed) > 10


def test_colours_are_those_of_the_scheme_alone(page):
    style, body = page.split("</style>")
    assert "prefers-color-scheme: dark" in style
    assert set(re.findall(r"var\(--([\w-]+)\)", body)) <= set(re.findall(r"--([\w-]+):", style))
    assert re.findall(r"#fe[0-9a-f]{2}a5", page) == []
    fixed = set(re.findall(r"#[0-9a-f]{6}\b", body))
    assert fixed == set()


def test_numbers_stand_in_tables_too(page, report):
    for portrait in report.findings.portraits:
        for layer in portrait.layers:
            assert layer.path in page
    assert page.count("<table>") >= 3 * 2 + 4


def test_it_is_the_same_every_time(page, adapters):
    assert looking.to_html(looking.report(adapters, [states(HOSTILE), states("two")])) == page


def test_of_many_those_that_change_most_are_shown_in_full(adapters):
    many = {f"a{n}": drawn(seed=n, spread=0.1 * n) for n in range(1, 6)}
    report = looking.report(many, detailed=2)
    assert [section.title for section in report.sections if section.number is not None] == ["a4", "a5"]


def test_one_adapter_has_no_comparison_and_two_have_no_tree():
    assert [section.key for section in looking.report({"a": drawn()}).sections] == ["adapter-1"]
    two = looking.report({"a": drawn(), "b": drawn(seed=1)}, portraits=False)
    assert [section.key for section in two.sections] == ["sharing"]
    Outline(looking.to_html(two))


def test_states_alone_make_a_report():
    report = looking.report({}, [states(f"m{n}") for n in range(8)])
    assert [section.key for section in report.sections] == ["states"]
    assert report.pictures[0].paint.keywords["values"].shape == (6, 3)
    assert "The 6 of 8 that turn the last state most" in report.pictures[0].caption
    Outline(looking.to_html(report))


def test_an_adapter_of_one_layer_without_depth_and_of_mirrors_alone_is_drawn():
    from tests.inspect.made import one_layer

    mirrors = one_layer([0.0, torch.pi], [1.0, 1.0], "road_2", path="lm_head")
    page = looking.to_html(looking.report({"mirrors": mirrors, "zero": one_layer([0.0], [0.0], path="lm_head")}))
    assert "1 that mirror" in page


def test_nothing_to_look_at_is_an_error():
    with pytest.raises(ConfigError, match="got nothing to look at"):
        looking.report({})


def test_findings_are_json(report):
    mapping = json.loads(json.dumps(report.findings.to_mapping(), allow_nan=False))
    assert mapping.keys() == {"adapters", "comparison", "states", "warnings"}
    assert mapping["comparison"]["names"] == [HOSTILE, "two", "four"]
    assert mapping["states"][0]["places"][2]["direction"] == 0.96


def test_a_page_is_replaced_as_a_whole(tmp_path, monkeypatch):
    report = looking.report({"a": drawn()}, detailed=0)
    path = tmp_path / "new" / "report.html"
    looking.write_html(report, path)
    before = path.read_text()
    assert before == looking.to_html(report)
    other = looking.report({"b": drawn(seed=1)}, detailed=0)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("roadie.inspect.files.os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            looking.write_html(other, path)
    assert path.read_text() == before
    assert [each.name for each in path.parent.iterdir()] == ["report.html"]
    looking.write_html(other, path)
    assert path.read_text() == looking.to_html(other)


def test_a_page_may_be_a_link_which_stays_one(tmp_path):
    target, link = tmp_path / "target.html", tmp_path / "link.html"
    target.write_text("old")
    link.symlink_to(target)
    looking.write_html(looking.report({"a": drawn()}, detailed=0), link)
    assert link.is_symlink()
    assert target.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("name", ["adapter_config.json", "report"])
def test_only_pages_are_replaced(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=r"wanted one that ends in \.html"):
        looking.write_html(looking.report({"a": drawn()}, detailed=0), tmp_path / name)
    assert (tmp_path / name).read_text() == "mine"


def test_a_folder_cannot_become_a_page(tmp_path):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ConfigError, match="not a plain file"):
        looking.write_html(looking.report({"a": drawn()}, detailed=0), tmp_path / "folder.html")


def test_every_picture_is_a_png_in_both_themes():
    report = looking.report({"a": drawn(layers=1)})
    files = looking.to_pngs(report)
    assert files.keys() == {f"{picture.key}-{theme}.png" for picture in report.pictures for theme in ("light", "dark")}
    assert all(content.startswith(b"\x89PNG") for content in files.values())

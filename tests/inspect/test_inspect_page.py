"""The page: valid, self-contained, and its colours and hover texts are those of the numbers."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from evomerge.errors import ConfigError
from evomerge.inspect import heatmap
from evomerge.inspect.inspection import Inspection, inspect_models
from evomerge.inspect.page import page, write_page
from evomerge.recipe import Cell
from tests.tiny import tiny_model

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Reader(HTMLParser):
    """Keeps every tag with its attributes, the texts of `title`, and what is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.titles: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "title":
            self.titles.append(data)


@pytest.fixture(scope="module")
def inspection(tiny_sources: Path) -> Inspection:
    models = {"one": tiny_sources / "one", "two": tiny_sources / "two", "lora": tiny_sources / "adapter"}
    return inspect_models(tiny_sources / "base", models)


@pytest.fixture(scope="module")
def read(inspection: Inspection) -> Reader:
    return Reader(page(inspection))


def test_every_element_is_closed_in_its_place(read: Reader):
    assert (read.open, read.wrong) == ([], [])


def test_nothing_is_loaded_from_anywhere(inspection: Inspection, read: Reader):
    text = page(inspection)
    assert not re.search(r"https?://|//cdn|@import|fetch\(|XMLHttpRequest|import\(", text)
    assert {tag for tag, _ in read.tags} & {"link", "img", "iframe", "object", "embed"} == set()
    assert not any({"src", "href", "xlink:href"} & set(attributes) for _, attributes in read.tags)
    assert set(re.findall(r"url\((.*?)\)", text)) == {"#hatch"}


def test_there_is_a_map_per_model_and_two_per_pair(read: Reader):
    labels = [str(a.get("aria-label")) for tag, a in read.tags if tag == "svg" and a.get("role") == "img"]
    maps = [label for label in labels if not label.startswith("colours from")]
    assert maps == [
        *(f"Relative norm of {name}" for name in ("one", "two", "lora")),
        *(f"{what} of {pair}" for what in ("Cosine", "Sign conflict") for pair in PAIRS),
    ]
    assert len(labels) - len(maps) == 3, "one legend per number"


PAIRS = ("one / two", "one / lora", "two / lora")


def test_every_square_says_its_numbers(inspection: Inspection, read: Reader):
    squares = [a for tag, a in read.tags if tag == "rect" and "cell" in str(a.get("class"))]
    assert len(squares) == (3 + 2 * 3) * len(inspection.cells)
    cell = Cell(1, "mlp")
    norm = inspection.models[0].cells[cell].norm
    cosine = inspection.pairs["one", "two"][cell].cosine
    assert any(t.startswith("layer 1, mlp\n") and f"norm {norm:.4g}," in t for t in read.titles)
    assert any(t.startswith("layer 1, mlp\n") and f"cosine {cosine:+.4f}," in t for t in read.titles)


def test_every_colour_used_is_defined_in_both_modes(inspection: Inspection, read: Reader):
    used = {str(a["class"]).split()[-1] for tag, a in read.tags if tag == "rect" and "class" in a} - {"none"}
    for mode in ("light", "dark"):
        assert used <= set(heatmap.palette(mode))
    assert "prefers-color-scheme: dark" in page(inspection)


def test_modules_that_no_model_changes_are_named_and_not_drawn(tiny_sources: Path):
    text = page(inspect_models(tiny_sources / "base", {"lora": tiny_sources / "adapter"}))
    assert "Unchanged in every model and not drawn: norm, embedding." in text
    assert "layer 0, norm" not in text


def test_names_are_escaped(tiny_sources: Path, tmp_path: Path):
    text = page(inspect_models(tiny_sources / "base", {"<b>&": tiny_sources / "one"}))
    assert "&lt;b&gt;&amp;" in text
    assert "<b>" not in text


def test_models_that_change_nothing_give_a_page_without_maps(tiny_sources: Path):
    text = page(
        inspect_models(tiny_sources / "base", {"a": tiny_sources / "base", "b": tiny_sources / "base"})
    )
    reader = Reader(text)
    assert (reader.open, reader.wrong) == ([], [])
    assert "Relative norm of" not in text


def test_what_could_not_be_compared_is_said(tiny_sources: Path, tmp_path: Path):
    big = tiny_model(tmp_path / "big", seed=1, vocab=160, layers=3)
    text = page(inspect_models(tiny_sources / "base", {"big": big}))
    assert "big cannot be merged: its vocabulary has 160 entries" in text
    assert "embedding\nnot compared" in text


def test_a_file_that_cannot_be_written_is_an_error(inspection: Inspection, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot be written \(.*\); choose another --html"):
        write_page(inspection, tmp_path / "nowhere" / "page.html")


def test_the_page_is_written_without_torch():
    code = "import sys, evomerge.inspect.page; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_sequential_scale_goes_from_zero_to_about_the_largest():
    scale = heatmap.sequential([0.0, 0.011, 0.019, None], str)
    assert (scale.low, scale.high) == (0, pytest.approx(0.015))
    assert [scale.css(value) for value in (0.0, 0.0075, 0.5, None)] == ["s0", "s10", "s20", "none"]
    assert scale.ticks[2].startswith("≥ "), "0.019 lies above the end"


def test_a_diverging_scale_has_its_middle_at_no_relation():
    scale = heatmap.diverging([-0.3, 0.2], 0.0, str, least=0.1)
    assert [scale.css(value) for value in (-0.3, 0.0, 0.3)] == ["d0", "d10", "d20"]


def test_fewer_conflicts_have_the_colour_of_agreement():
    scale = heatmap.diverging([0.3, 0.6], 0.5, str, least=0.02, smaller_agrees=True)
    assert [scale.css(value) for value in (0.7, 0.5, 0.3)] == ["d0", "d10", "d20"]


def test_differences_that_say_nothing_stay_pale():
    scale = heatmap.diverging([0.001], 0.0, str, least=0.05)
    assert scale.css(0.001) == "d10"


@pytest.mark.parametrize(("value", "expected"), [(1.0, 1.0), (0.0651, 0.08), (0.011, 0.015), (730, 800)])
def test_scales_end_at_short_numbers(value: float, expected: float):
    assert heatmap.round_up(value) == pytest.approx(expected)


def test_a_deep_model_fits_into_the_width():
    cells = [Cell(layer, module) for layer in range(126) for module in ("attention", "mlp")]
    found = heatmap.grid("deep", cells, {}, heatmap.sequential([], str), str)
    assert found.width <= heatmap.GUTTER + 126 * (heatmap.NARROWEST_SQUARE + heatmap.GAP)
    assert [text for _, text in found.columns][:3] == ["0", "10", "20"]
    assert {square.css for square in found.squares} == {"none"}

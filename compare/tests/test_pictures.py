"""The pictures of the notes are those that the scripts draw."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from compare.pictures import quality, quantised
from compare.pictures.__main__ import FOLDER, PICTURES, draw
from compare.pictures.axes import Scale, log_scale
from compare.pictures.canvas import Canvas

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", PICTURES)
def test_committed_picture_is_what_the_script_draws(name):
    committed = (ROOT / FOLDER / f"{name}.svg").read_text(encoding="utf-8")
    assert committed == PICTURES[name]().svg(), "run: make pictures"


def test_no_picture_lies_about_that_nobody_draws():
    assert {path.stem for path in (ROOT / FOLDER).glob("*.svg")} == set(PICTURES)


def test_every_picture_is_shown_in_a_note():
    notes = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs/learn").rglob("*.md"))
    assert [name for name in PICTURES if f"pictures/{name}.svg)" not in notes] == []


@pytest.mark.parametrize("name", PICTURES)
def test_everything_lies_on_the_paper(name):
    """Boxes, lines and dots; and texts by a width that letters rarely exceed."""
    canvas = PICTURES[name]()
    for element in ElementTree.fromstring(canvas.svg()):
        for x, y in _corners(element):
            assert -0.5 <= x <= canvas.width + 0.5, ElementTree.tostring(element)
            assert -0.5 <= y <= canvas.height + 0.5, ElementTree.tostring(element)


def _corners(element):
    get = element.attrib
    match element.tag.rpartition("}")[2]:
        case "text":
            width = 0.5 * float(get["font-size"]) * len(element.text)
            start = {"start": 0, "middle": -width / 2, "end": -width}[get["text-anchor"]]
            x, y = float(get["x"]), float(get["y"])
            return [(x + start, y - float(get["font-size"])), (x + start + width, y)]
        case "rect" if "%" not in get["width"]:
            x, y = float(get["x"]), float(get["y"])
            return [(x, y), (x + float(get["width"]), y + float(get["height"]))]
        case "polyline" | "polygon":
            return [tuple(map(float, pair.split(","))) for pair in get["points"].split()]
        case "circle":
            return [(float(get["cx"]), float(get["cy"]))]
    return []


def test_texts_of_a_picture_are_escaped():
    canvas = Canvas(10, 10, "a < b")
    canvas.text(1, 9, "a & b")
    assert "a &amp; b" in canvas.svg() and "<title>a &lt; b</title>" in canvas.svg()


def test_logarithmic_scale_gives_every_factor_of_ten_the_same_room():
    scale = log_scale(1, 100, 0, 200)
    assert (scale(1), scale(10), scale(100)) == (0, 100, 200)


def test_pictures_are_written_where_they_are_asked_for(tmp_path):
    assert draw(tmp_path) == [tmp_path / f"{name}.svg" for name in PICTURES]
    assert all(path.stat().st_size > 500 for path in tmp_path.iterdir())


def test_steps_of_the_chart_are_medians_of_the_file_above_the_limits_of_the_note(monkeypatch):
    steps = {name: {"steps_ms": {"1": [9.0, 2.0, 3.0], "256": 20.0}} for name in quantised.STEPS}
    roofline = {"matmul_flops_per_s": 793e12, "copy_bytes_per_s": 4.26e12}
    files = {"m7_beside_vllm_h200.json": steps, "roofline_points_h200.json": roofline}
    monkeypatch.setattr(quantised, "read_data", files.__getitem__)
    drawn = ElementTree.fromstring(quantised.step_over_batch().svg())
    circles = [element.attrib for element in drawn if element.tag.endswith("circle")]
    y = log_scale(0.8, 24, 372, 40)
    places = {(float(circle["cx"]), float(circle["cy"])) for circle in circles}
    assert places == {(64, round(y(3.0), 2)), (696, round(y(20.0), 2))}
    assert len(circles) == 2 * len(quantised.STEPS)
    floor = quantised.floor_ms(793e12, 4.26e12)
    expected = {1: ("3.55", "1.15"), 64: ("3.55", "1.41"), 256: ("4.89", "4.89")}
    for rows, texts in expected.items():
        assert tuple(f"{floor(rows, bits):.2f}" for bits in (16, quantised.BITS)) == texts


def elements_of(canvas, kind):
    return [e for e in ElementTree.fromstring(canvas.svg()) if e.tag.endswith(kind)]


def made_up_trial(method, bits, group_size, perplexity, packed_bytes):
    errors = {"rtn_held_out": 0.02, "held_out": 0.001}
    layers = {kind: [dict.fromkeys(quality.MATRICES, e)] * 3 for kind, e in errors.items()}
    return {
        "name": f"{method}-{bits}-{group_size}", "method": method, "bits": bits,
        "group_size": group_size, "perplexity": perplexity, "packed_bytes": packed_bytes,
        "errors": layers,
    }  # fmt: skip


def made_up_trials(monkeypatch):
    trials = [
        made_up_trial("rtn", 4, 128, 50.0, 50e6), made_up_trial("gptq", 4, 128, 40.0, 50e6),
        made_up_trial("rtn", 2, 128, 3.84e6, 30e6), made_up_trial("gptq", 4, -1, 60.0, 48e6),
    ]  # fmt: skip
    data = {
        "trials": trials, "source_perplexity": 30.0, "matrix_weights": 10e7,
        "embedding_weights": 30e6,
    }  # fmt: skip
    monkeypatch.setattr(quality, "read_data", {quality.TRIALS: data}.__getitem__)
    monkeypatch.setattr(quality, "ERRORS_OF", "gptq-4-128")


def test_perplexities_of_the_chart_stand_at_the_bytes_of_the_file(monkeypatch):
    made_up_trials(monkeypatch)
    canvas = quality.perplexity_over_bytes()
    places = {(float(e.get("cx")), float(e.get("cy"))) for e in elements_of(canvas, "circle")}
    scales = [
        (Scale(76, 174, 56, 366), log_scale(25, 1000, 306, 64), [(110, 50.0), (110, 40.0)]),
        (Scale(109, 120, 426, 696), log_scale(25, 100, 306, 64),
         [(110, 50.0), (110, 40.0), (108, 60.0)]),
    ]  # fmt: skip
    expected = {(round(x(mb), 2), round(y(value), 2)) for x, y, ps in scales for mb, value in ps}
    assert places == expected
    texts = [element.text for element in elements_of(canvas, "text")]
    assert "3.8 million" in texts, "what has no place has its number"
    assert "16 bits, 260 MB" in texts and {"110.0", "90.0", "row", "2 bits"} < set(texts)


def test_errors_of_the_chart_are_those_of_the_file(monkeypatch):
    made_up_trials(monkeypatch)
    curves = [e for e in elements_of(quality.error_by_layer(), "polyline")
              if len(e.get("points").split()) == 3 and e.get("stroke-width") == "2"]  # fmt: skip
    heights = [{pair.split(",")[1] for pair in e.get("points").split()} for e in curves]
    y = log_scale(4e-5, 4e-2, 202, 62)
    assert heights[:2] == [{f"{round(y(value), 2):g}"} for value in (0.02, 0.001)]
    assert len(curves) == 2 * len(quality.MATRICES)

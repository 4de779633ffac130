"""The saved view's encoding. That MLflow's page can read it is for test_browser.py."""

import base64
import json
import zlib

from diffusion_fast import view


def test_what_is_encoded_comes_back() -> None:
    state = view.view_state("tags.kind = 'rung'")
    value = json.loads(view.encode(state, name="mine", now_ms=7))
    assert (value["name"], value["createdAt"], value["updatedAt"]) == ("mine", 7, 7)
    scheme, packed = value["state"].split(";")
    assert scheme == "deflate"
    assert json.loads(zlib.decompress(base64.b64decode(packed))) == state


def test_it_fits_into_an_experiment_tag() -> None:
    assert len(view.encode(view.view_state("x" * 500), name="mine", now_ms=7)) < 5000


def test_every_card_has_its_section() -> None:
    state = view.view_state("")
    sections = {section["uuid"] for section in state["compareRunSections"]}
    assert {card["metricSectionId"] for card in state["compareRunCharts"]} <= sections

"""The saved view in a real browser: bars, samples and images of every rung, without a click."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffusion_fast import spool, tracking

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-quic --no-first-run "
    "--disable-component-update --disable-sync"
).split()

# Every drawn card by its title. Plotly keeps the figure on its element. An image's width is 0 until it has loaded.
CARDS = """() => Object.fromEntries(
  [...document.querySelectorAll('[data-testid=experiment-view-compare-runs-card]')].map(card => {
    const traces = card.querySelector('.js-plotly-plot')?.data ?? [], words = card.innerText.split('\\n');
    return [words[0], {
      words,
      bars: card.querySelectorAll('.barlayer .point').length,
      lines: traces.filter(trace => trace.type.startsWith('scatter')).map(trace => [trace.name, [...trace.y]]),
      widths: [...card.querySelectorAll('img')].map(image => image.complete ? image.naturalWidth : 0),
    }];
  }))"""
BARS = {"latency_median_s": 0, "speedup": 0, "peak_memory_gib": 0, "psnr_db": 1}  # rungs without this metric


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """`diffusion-fast ui` in the test's own folder, as a person starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = (sys.executable, "-m", "diffusion_fast", "ui", "--port", str(port))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    with (tmp_path / "ui.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env=environment)
        try:
            for _ in range(240):
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=1).close()
                    break
                except OSError:
                    time.sleep(0.25)
            yield url
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("through", ["the file", pytest.param("the server", marks=pytest.mark.full)])
@pytest.mark.usefixtures("nowhere_else")
def test_the_link_opens_on_bars_samples_and_images(server: str, climbed: Callable[..., Path], through: str) -> None:
    """Beside another ladder, which must not show."""
    uri = server if through == "the server" else None
    tracking.finish(climbed((1.0,), "other"), tracking_uri=uri)
    folder = climbed()
    recorded = tracking.finish(folder, tracking_uri=uri)
    rungs = [spec.rung for spec in spool.read_ladder(folder).rungs]
    assert recorded.served == (through == "the server")
    assert recorded.link.startswith(server if recorded.served else tracking.UI)
    recorded = replace(recorded, link=recorded.link.replace(tracking.UI, server))
    cards = _look(recorded.link, lambda cards: not _missing(cards, rungs))
    assert _missing(cards, rungs) == []


def _missing(cards: dict[str, dict[str, Any]], rungs: list[str]) -> list[str]:
    """What a person would miss on the page."""
    found = [f"no card {title}" for title in (*BARS, "latency_sample_s", "output", "prompts") if title not in cards]
    if found:
        return found
    for title, without in BARS.items():
        if cards[title]["bars"] != len(rungs) - without:
            found.append(f"{title}: {cards[title]['bars']} bars")
        found += [f"{title}: no {rung}" for rung in rungs[without:] if rung not in cards[title]["words"]]
    lines = cards["latency_sample_s"]["lines"]
    if {name for name, _ in lines} != set(rungs) or any(len(y) != 3 for _, y in lines):
        found.append(f"samples: {lines}")
    for title in ("output", "prompts"):
        loaded = sum(width > 0 for width in cards[title]["widths"])
        if loaded != len(rungs):
            found.append(f"{title}: {loaded} images")
    return found


def _look(url: str, enough: Callable[[dict[str, Any]], bool], seconds: float = 60) -> dict[str, dict[str, Any]]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            # Tall, because a card is drawn only when it comes into view.
            page = browser.new_page(viewport={"width": 1600, "height": 3600})
            page.goto(url)
            end = time.monotonic() + seconds
            cards: dict[str, dict[str, Any]] = {}
            while time.monotonic() < end:
                cards = page.evaluate(CARDS)
                if enough(cards):
                    break
                page.wait_for_timeout(500)
            return cards
        finally:
            browser.close()

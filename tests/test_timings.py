"""What was timed once is not timed again, as long as it is the same question on the same machine."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from diffusion_fast import timings


class Timed:
    def __init__(self, seconds: float) -> None:
        self.seconds, self.calls = seconds, 0

    def __call__(self) -> float:
        self.calls += 1
        return self.seconds


@pytest.mark.parametrize("seconds", (0.25, math.inf))
def test_a_question_is_measured_once(seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    measure = Timed(seconds)
    assert [timings.kept("one", measure) for _ in range(3)] == [seconds] * 3
    assert measure.calls == 1
    assert timings.kept("another", Timed(0.5)) == 0.5
    monkeypatch.setattr(timings, "_device", lambda: "another GPU")
    assert timings.kept("one", Timed(0.75)) == 0.75


def test_another_source_is_another_question() -> None:
    assert timings.version(timings) == timings.version(timings) != timings.version(pytest)


def test_without_a_folder_everything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    measure = Timed(0.25)
    assert [timings.kept("one", measure) for _ in range(2)] == [0.25] * 2
    assert measure.calls == 2


@pytest.mark.parametrize("content", ("", "{}", '{"question": "other", "seconds": 1}', "[]", '{"seconds": "x"}'))
def test_what_is_not_whole_is_measured_again(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    timings.kept("one", Timed(0.25))
    (file,) = (tmp_path / "timings").iterdir()
    file.write_text(content)
    assert timings.kept("one", Timed(0.5)) == 0.5
    assert timings.kept("one", Timed(1.0)) == 0.5

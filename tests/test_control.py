"""An approximation beside the plain recipe with fewer steps."""

from __future__ import annotations

from typing import Any

from diffusion_fast.control import verdicts


def row(rung: str, seconds: float, steps: int = 30, names: str = "bf16,sdpa", **more: Any) -> dict[str, Any]:
    return {
        "rung": rung,
        "status": "FINISHED",
        "latency_median_s": seconds,
        "steps": steps,
        "optimizations": names,
        "psnr_db": 30.0,
        **more,
    }


PLAIN = row("00-plain", 1.0, psnr_db=50.0)
CONTROLS = (
    row("01-plain-67", 0.7, 20, psnr_db=40.0, prompt_accuracy=0.95),
    row("02-plain-50", 0.5, 15, psnr_db=35.0, prompt_accuracy=0.94),
)
REUSE = "bf16,sdpa,feature_reuse"


def test_the_control_is_the_fastest_that_is_not_faster() -> None:
    found = verdicts([PLAIN, *CONTROLS, row("03-a", 0.6, names=REUSE), row("04-b", 0.5, names=REUSE)])
    assert [(each.rung, each.control) for each in found] == [("03-a", "01-plain-67"), ("04-b", "02-plain-50")]


def test_it_has_to_be_closer_and_to_have_more_prompts_right() -> None:
    def earned(**more: float) -> bool:
        (found,) = verdicts([PLAIN, *CONTROLS, row("03-a", 0.6, names=REUSE, **more)])
        return found.earned

    assert earned(psnr_db=40.1, prompt_accuracy=0.951)
    assert earned(psnr_db=40.1)  # where nothing judges pictures
    assert not earned(psnr_db=40.0, prompt_accuracy=0.99)
    assert not earned(psnr_db=45.0, prompt_accuracy=0.95)


def test_many_pictures_say_more_than_one() -> None:
    controls = [each | {"prompt_psnr_db": 30.0} for each in CONTROLS]
    (found,) = verdicts([PLAIN, *controls, row("03-a", 0.6, names=REUSE, psnr_db=90.0, prompt_psnr_db=29.0)])
    assert not found.earned
    assert found.sentence == (
        "03-a (0.6 s) doesn't earn its place beside 01-plain-67 (0.7 s): "
        "not closer to the picture of all steps (29.0 dB against 30.0 dB)"
    )


def test_what_is_no_faster_than_the_plain_recipe_earns_nothing() -> None:
    (found,) = verdicts([PLAIN, *CONTROLS, row("03-a", 1.1, names=REUSE, psnr_db=90.0)])
    assert (found.control, found.earned) == ("00-plain", False)
    assert found.sentence == "03-a (1.1 s) is no faster than 00-plain (1 s)"


def test_what_equals_the_reference_is_as_close_as_can_be() -> None:
    same = {key: value for key, value in row("03-a", 0.6, names=REUSE).items() if key != "psnr_db"}
    (found,) = verdicts([PLAIN, *CONTROLS, same])
    assert found.earned
    assert "(inf dB against 40.0 dB)" in found.sentence


def test_random_weights_and_a_failed_first_rung_say_nothing() -> None:
    rest = [*CONTROLS, row("03-a", 0.6, names=REUSE)]
    assert verdicts([PLAIN | {"weights": "random"}, *rest]) == []
    assert verdicts([PLAIN | {"status": "FAILED"}, *rest]) == []


def test_a_ladder_without_controls_or_without_approximations_says_nothing() -> None:
    assert verdicts([PLAIN, row("01-a", 0.6, names=REUSE)]) == []
    assert verdicts([PLAIN, *CONTROLS, row("03-int8", 0.6, names="bf16,sdpa,int8_dynamic")]) == []
    assert verdicts([]) == []
    failed = {"rung": "03-a", "status": "FAILED", "optimizations": REUSE, "steps": 30}
    assert verdicts([PLAIN, *CONTROLS, failed]) == []


def test_what_has_eight_bits_is_compared_with_fewer_steps_in_eight_bits() -> None:
    eight = "bf16,sdpa,int8_rows"
    rows = [
        *(PLAIN, *CONTROLS, row("03-8-bits", 0.8, names=eight)),
        row("04-8-bits-50", 0.45, 15, eight, psnr_db=36.0),
        row("05-a", 0.4, names=f"{eight},feature_reuse", psnr_db=35.5),
    ]
    (found,) = verdicts(rows)
    assert (found.rung, found.control, found.earned) == ("05-a", "04-8-bits-50", False)
    assert verdicts([each for each in rows if each["rung"] != "04-8-bits-50"]) == []  # nothing to compare it with

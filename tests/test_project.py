"""The files around the package agree with it and with each other."""

import re
import tomllib
from pathlib import Path

import click
import pytest
import yaml
from packaging.requirements import Requirement

import diffusion_fast
from diffusion_fast.cli import main

ROOT = Path(diffusion_fast.__file__).parent.parent


def entry_points() -> dict[str, dict[str, object]]:
    points: dict[str, dict[str, object]] = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
    return points


@pytest.mark.parametrize("name", entry_points())
def test_every_parameter_has_a_default_that_its_command_takes(name: str) -> None:
    point = entry_points()[name]
    parameters, text = point["parameters"], str(point["command"])
    assert isinstance(parameters, dict)
    assert set(re.findall(r"{(\w+)}", text)) == set(parameters)
    filled = re.sub(r"{(\w+)}", lambda match: f"'{parameters[match[1]]['default']}'", text)
    arguments = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", filled)]
    assert arguments[:4] == ["python", "-m", "diffusion_fast", name]
    command = main.commands[name]
    with command.make_context(name, arguments[4:]) as context:
        if "prompt" in parameters:
            default = next(each for each in command.params if each.name == "prompt")
            assert context.params["prompt"] == default.get_default(context)
            assert context.params["resume"] is False
            assert context.params["steps"] is None


def test_every_entry_point_is_a_command() -> None:
    assert isinstance(main, click.Group)
    assert set(entry_points()) <= set(main.commands)


def test_one_lock_is_used_by_all() -> None:
    conda = yaml.safe_load((ROOT / "conda.yaml").read_text())
    assert conda["dependencies"][-1] == {"pip": ["-r requirements.lock"]}
    for name in ("Makefile", "Dockerfile"):
        assert "requirements.lock" in (ROOT / name).read_text(), name


def test_the_lock_satisfies_what_the_package_asks_for() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    locked = {normal(name): version for name, version in (line.split("==") for line in lines)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        wanted = Requirement(text)
        assert locked[normal(wanted.name)] in wanted.specifier, text
    assert not [version for version in locked.values() if "+" in version]  # no build of one machine's own


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_bundled_model_is_small_and_safe() -> None:
    files = [path for path in (ROOT / "diffusion_fast" / "tiny").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 12 * 2**20
    assert {path.suffix for path in files} == {".json", ".safetensors"}


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_name_rungs_that_exist(path: Path) -> None:
    text = path.read_text()
    found = re.search(r"--ladder (\S+)", text)
    from diffusion_fast.recipes import LADDERS

    recipes = [recipe.name for recipe in LADDERS[found[1] if found else "progressive"]]
    assert re.findall(r"^bar (\S+)", text, re.MULTILINE) == recipes
    assert path.stat().st_mode & 0o111

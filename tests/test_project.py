"""The files around the package agree with it and with each other."""

import re
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner
from packaging.requirements import Requirement

import diffusion_fast
from diffusion_fast.cli import main
from diffusion_fast.models import CHECKSUMS, verify
from diffusion_fast.pipeline import build_pipeline
from tests.conftest import planned

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
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md", ""}
    listed = (ROOT / "diffusion_fast" / "tiny" / CHECKSUMS).read_text().splitlines()
    weights = {
        str(path.relative_to(ROOT / "diffusion_fast" / "tiny")) for path in files if path.suffix == ".safetensors"
    }
    assert {line.partition("  ")[2] for line in listed} == weights


def test_bundled_weights_without_checksums_are_refused(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "diffusion_fast" / "tiny", tmp_path / "tiny")
    (tmp_path / "tiny" / CHECKSUMS).write_text("")
    with pytest.raises(ValueError, match=r"text_encoder/model\.safetensors is not listed"):
        verify(tmp_path / "tiny")
    (tmp_path / "tiny" / CHECKSUMS).unlink()
    verify(tmp_path / "tiny")  # a person's own folder needs none
    with pytest.raises(ValueError, match="can't be verified"):
        verify(tmp_path / "tiny", required=True)


@pytest.mark.parametrize("harm", ["altered", "cut short", "gone"])
def test_a_harmed_weight_file_is_named_before_it_is_loaded(tmp_path: Path, harm: str) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(ROOT / "diffusion_fast" / "tiny", folder)
    verify(folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes(content if harm == "altered" else content[:-1])
    arguments = ["run", "--weights", str(folder), "--spool", str(tmp_path / "spool")]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert done.exit_code == 2
    assert f"{file} is " in done.output
    assert not (tmp_path / "spool").exists()
    spec = replace(planned().rungs[0], weights=str(folder))
    with pytest.raises(ValueError, match=str(file)):
        build_pipeline(spec, lambda stage: None)


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_name_rungs_that_exist(path: Path) -> None:
    text = path.read_text()
    found = re.search(r"--ladder (\S+)", text)
    from diffusion_fast.recipes import LADDERS

    recipes = [recipe.name for recipe in LADDERS[found[1] if found else "progressive"]]
    assert re.findall(r"^bar (\S+)", text, re.MULTILINE) == recipes
    assert path.stat().st_mode & 0o111

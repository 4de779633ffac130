"""Who imports what: the parent never torch, the worker never mlflow, and only tracking.py mlflow."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import diffusion_fast

PACKAGE = Path(diffusion_fast.__file__).parent
DATA = ("spec", "models", "recipes", "optimizations", "plan", "spool", "rows", "launch", "ladder", "view", "cli")


def imported_by(statement: str) -> set[str]:
    script = f"import sys; {statement}; import json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run((sys.executable, "-c", script), capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def test_the_command_line_starts_without_any_heavy_library() -> None:
    found = imported_by("import diffusion_fast.cli, diffusion_fast")
    assert not found & {"torch", "mlflow", "pandas", "numpy", "matplotlib", "diffusers", "rich", "pynvml"}


def test_the_parent_plans_records_and_reports_without_torch(climbed: Callable[..., Path], tmp_path: Path) -> None:
    statement = (
        "from pathlib import Path; from diffusion_fast import tracking as t, report as r, plan as p; p.find_device(); "
        f"t.finish(Path('{climbed()}'), tracking_uri='sqlite:///{tmp_path / 'mlflow.db'}'); "
        f"frame = r.one_ladder(t.load_runs(tracking_uri='sqlite:///{tmp_path / 'mlflow.db'}')); "
        "r.table(frame, r.tables(frame)[0]); "
        f"r.write(frame, Path('{tmp_path / 'report'}'))"
    )
    found = imported_by(statement)
    assert "mlflow" in found
    assert not found & {"torch", "diffusers", "transformers"}


def test_a_worker_lives_without_mlflow(tmp_path: Path) -> None:
    """A whole measurement, parent included, on a machine where mlflow can't be imported."""
    (tmp_path / "mlflow.py").write_text("raise ImportError('not on this machine')")
    command = ("run", "--no-track", "--steps", "1", "--accuracy-prompts", "0", "--spool", "spool")
    done = subprocess.run(
        (sys.executable, "-m", "diffusion_fast", *command),
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{PACKAGE.parent}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "spool").glob("*/00-baseline/r1-a1/result.json"))


def imports_in(path: Path) -> list[str]:
    """Modules that a file imports, by their whole names."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name if name in MODULES else node.module or "" for name in whole]
    return found


def named(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {named(path): path for path in PACKAGE.rglob("*.py")}


WITHOUT_TRITON = """
import importlib, sys
sys.modules["triton"] = None
for name in sys.argv[1:]:
    try:
        importlib.import_module(f"diffusion_fast.{name}")
    except ImportError as error:
        print(type(error).__name__, error)
"""


def test_without_triton_the_kernels_say_what_they_need() -> None:
    names = ("kernels", "norm_kernels", "attention_kernels")
    done = subprocess.run((sys.executable, "-c", WITHOUT_TRITON, *names), capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert len(said) == len(names)
    assert all(each.startswith("ImportError diffusion_fast.kernels needs Triton 3.6 or later") for each in said)


def test_only_tracking_imports_mlflow() -> None:
    importers = {
        name for name, path in MODULES.items() if any(each.partition(".")[0] == "mlflow" for each in imports_in(path))
    }
    assert importers == {"diffusion_fast.tracking"}


def test_imports_go_one_way() -> None:
    """Each module imports only modules that stand before it."""
    order = [
        f"diffusion_fast.{name}"
        for name in (
            "spec world models unlisted recipes inductor graphs timings ahead adapters modules operators "
            "kernels norm_kernels attention_kernels attention gated eight_bits norms projections chained sliced scores "
            "walks "
            "optimizations.registry optimizations.numbers optimizations.layers optimizations.quantization "
            "optimizations.compilation optimizations.parts optimizations.approximation optimizations plan script "
            "spool rows fidelity measure watch environment draw judge accuracy outliers pipeline own onestep "
            "roofline profile worker sensitivity launch saved_cache ladder stats check control sweep report view "
            "tracking console cli __main__"
        ).split()
    ]
    assert {*order, "diffusion_fast"} == set(MODULES)
    for importer in order:
        for imported in imports_in(MODULES[importer]):
            if imported in order:
                assert order.index(imported) < order.index(importer), f"{importer} imports {imported}"

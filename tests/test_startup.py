"""What loads when: help costs no library, and the package's names are there all the same."""

import subprocess
import sys
from typing import Any

import pytest

import tokenstep
from tokenstep.measure.settings import RUNTIME_PACKAGES
from tokenstep.runtimes.dense import RUNTIMES

HEAVY = ["torch", "numpy", "timm", "PIL", "gradio", "matplotlib", "lightning", "huggingface_hub"]

HELP = """
import sys
import typer
from tokenstep.cli.main import app

def walk(command, path):
    yield path
    for name, under in getattr(command, "commands", {}).items():
        yield from walk(under, [*path, name])

paths = list(walk(typer.main.get_command(app), []))
assert len(paths) > 9, paths
for path in paths:
    app([*path, "--help"], standalone_mode=False)
    print("LOADED", *path, [name for name in sys.argv[1:] if name in sys.modules])
"""


def fresh(code: str, *arguments: str) -> str:
    """What a Python that has imported nothing yet prints."""
    call = [sys.executable, "-c", code, *arguments]
    return subprocess.run(call, capture_output=True, text=True, check=True).stdout


def test_the_help_of_every_command_imports_no_heavy_library() -> None:
    loaded = [line for line in fresh(HELP, *HEAVY).splitlines() if line.startswith("LOADED")]
    assert loaded and all(line.endswith("[]") for line in loaded), loaded


def test_a_bare_import_knows_all_names_and_loads_none() -> None:
    code = (
        "import sys, tokenstep; print([n for n in sys.argv[1:] if n in sys.modules]);"
        "print(set(tokenstep.__all__) <= set(dir(tokenstep)))"
    )
    assert fresh(code, *HEAVY).split() == ["[]", "True"]


def test_modules_can_be_had_after_a_bare_import() -> None:
    for module in ("config", "errors", "hub"):
        code = f"import tokenstep; print(tokenstep.{module}.__name__)"
        assert fresh(code).strip() == f"tokenstep.{module}"


def test_only_what_is_public_is_listed() -> None:
    names = fresh("import tokenstep; tokenstep.load, tokenstep.config; print(*dir(tokenstep))")
    assert {n for n in names.split() if not n.startswith("__")} == {
        n for n in tokenstep.__all__ if not n.startswith("__")
    }


def test_every_public_name_can_be_had_and_no_other() -> None:
    names: dict[str, Any] = {}
    exec("from tokenstep import *", names)
    assert set(tokenstep.__all__) <= set(names)
    assert tokenstep.load.__module__ == "tokenstep.hub"
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = tokenstep.lode  # type: ignore[attr-defined]  # mypy sees it too


def test_every_rival_that_help_names_can_be_made() -> None:
    assert set(RUNTIME_PACKAGES) == set(RUNTIMES)

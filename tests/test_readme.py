"""Runs every command and every line of code of the README and the guides.

The everyday tier runs Python and shortened commands. The thorough tier runs the commands as written.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

import _wakesleep_command

pytestmark = pytest.mark.source_tree


GUIDES = sorted((ROOT / "docs/guides").glob("*.md"))
Blocks = list[tuple[str, str]]


def _blocks(page: Path) -> Blocks:
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.M | re.S)


def _lines(blocks: Blocks, language: str) -> list[str]:
    return [line for of, block in blocks if of == language for line in block.splitlines()]


BLOCKS = _blocks(ROOT / "README.md")
COMMANDS = _lines(BLOCKS, "sh")
BIN = Path(sys.executable).parent


# not those that an outer `make` gives to its children
VARIABLES = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
VARIABLES["PATH"] = f"{BIN}:{os.environ['PATH']}"


def _run(command: str, folder: Path) -> str:
    done = subprocess.run(
        shlex.split(command), cwd=folder, env=VARIABLES, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Options that shorten a command, in addition to one epoch and ten samples for a bound.
BRIEFLY = {
    "wakesleep train": "--bound-samples 10",
    "wakesleep resume": "",
    "wakesleep evaluate": "",
    "wakesleep sample": "",
    "wakesleep bench": "--candidates fused eager",
    "wakesleep selftest": "",
    "wakesleep info": "",
}
# Other tests run these commands: `make train` below and by .ci/run, `make test` below, `pip install .` from the source
# distribution in test_packaging.py, the check as it is in test_check.py
ELSEWHERE = {"make train", "make test", "pip install .", "wakesleep check --quick"}


def _name(command: str) -> str:
    return " ".join(command.split()[:2])


def _in_brief(commands: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the commands of `BRIEFLY` in this process, as the `wakesleep` script would."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("wakesleep_ext.benchmark.command.keep_freed_memory", lambda: None)  # it would outlast the test
    for command in commands:
        if command in ELSEWHERE:
            continue
        brief = re.sub(r"--epochs \d+", "--epochs 1", f"{command} {BRIEFLY[_name(command)]}")
        brief = re.sub(r"--bound-samples \d+", "--bound-samples 10", brief)
        monkeypatch.setattr(sys, "argv", shlex.split(brief))
        assert _wakesleep_command.main() == 0, brief


def test_every_block_is_run() -> None:
    assert {language for language, _ in BLOCKS} == {"sh", "python", "text"}
    assert {command for command in COMMANDS if _name(command) not in BRIEFLY} == ELSEWHERE


def test_commands_in_brief(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _in_brief(COMMANDS, tmp_path, monkeypatch)
    for picture in ("dreams.png", "speed.png"):
        assert (tmp_path / picture).stat().st_size > 10_000


def test_python() -> None:
    """The blocks are read on, one after the other, as a reader would."""
    code = "\n".join(block for language, block in BLOCKS if language == "python")
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["elbo"].shape == (128,)  # type: ignore[attr-defined]
    assert names["encoder"].weight.grad.abs().sum() > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_guides(guide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = _blocks(guide)
    assert {language for language, _ in blocks} <= {"sh", "python"}
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(_lines(blocks, "python")), str(guide), "exec"), {})
    _in_brief(_lines(blocks, "sh"), tmp_path, monkeypatch)


@pytest.mark.thorough
@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_command_lines_of_guides(guide: Path, tmp_path: Path) -> None:
    for command in _lines(_blocks(guide), "sh"):
        if command != "pip install .":
            _run(command, tmp_path)


@pytest.mark.thorough
def test_command_line(tmp_path: Path) -> None:
    for command in COMMANDS:
        if command.startswith("wakesleep"):
            _run(command, tmp_path)
    for picture in ("dreams.png", "speed.png"):
        assert (tmp_path / picture).stat().st_size > 10_000


def _make(arguments: str) -> str:
    # Other tests are using this environment, so `make` must have made it and have nothing to add.
    environment = Path(sys.prefix)
    stamps = [str(environment / name) for name in (".installed", ".test")]
    question = ["make", "--question", f"VENV={environment}", *stamps]
    if subprocess.run(question, cwd=ROOT, env=VARIABLES, check=False).returncode != 0:
        pytest.skip("`make` did not make this environment, or would change it")
    return _run(f"make VENV={environment} {arguments}", ROOT)


@pytest.mark.thorough
def test_make_train(tmp_path: Path) -> None:
    output = _make(f"train RUN={tmp_path / 'digits'}")
    stated = next(block for language, block in BLOCKS if language == "text")
    number = r"\d+(\.\d+)?"
    assert re.sub(number, "#", stated) in re.sub(number, "#", output)
    nats = {line[:28]: float(line.split()[-1]) for line in output.splitlines() if line.startswith(("indep", "Helm"))}
    assert nats["Helmholtz machine, NLL bound"] < nats["independent Bernoulli pixels"] - 4
    assert (tmp_path / "digits" / "samples.png").exists()


@pytest.mark.thorough
def test_make_test() -> None:
    """`make test` itself, on one file; the suite is running it already."""
    assert "passed" in _make("test TESTS=tests/test_models.py")

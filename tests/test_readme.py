"""Every command and every line of code of the README and of the guides, run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT

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


def _run(command: str, folder: Path) -> str:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    variables["PATH"] = f"{BIN}:{os.environ['PATH']}"
    done = subprocess.run(
        shlex.split(command), cwd=folder, env=variables, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_block_is_run() -> None:
    assert {language for language, _ in BLOCKS} == {"sh", "python", "text"}
    first_words = {tuple(command.split()[:2]) for command in COMMANDS}
    assert first_words == {
        *(("make", target) for target in ("train", "test")),
        *(
            ("wakesleep", name)
            for name in ("train", "resume", "evaluate", "sample", "bench", "check", "selftest", "info")
        ),
        ("pip", "install"),
    }


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
    for command in _lines(blocks, "sh"):
        if command != "pip install .":
            _run(command, tmp_path)


def test_the_example_has_ten_lines() -> None:
    example = next(block for language, block in BLOCKS if language == "python")
    assert len(example.splitlines()) <= 10


def test_command_line(tmp_path: Path) -> None:
    for command in COMMANDS:
        if command.startswith("wakesleep"):
            _run(command, tmp_path)
    for picture in ("dreams.png", "speed.png"):
        assert (tmp_path / picture).stat().st_size > 10_000


def _make(arguments: str) -> str:
    # the environment that runs this test, if `make` made one; it then has nothing to install
    environment = Path(sys.prefix)
    if not (environment / ".installed").exists():
        pytest.skip("this environment was not made by `make`")
    return _run(f"make VENV={environment} {arguments}", ROOT)


def test_make_train(tmp_path: Path) -> None:
    assert "make train" in COMMANDS
    output = _make(f"train RUN={tmp_path / 'digits'}")
    stated = next(block for language, block in BLOCKS if language == "text")
    number = r"\d+(\.\d+)?"
    assert re.sub(number, "#", stated) in re.sub(number, "#", output)
    nats = {line[:28]: float(line.split()[-1]) for line in output.splitlines() if line.startswith(("indep", "Helm"))}
    assert nats["Helmholtz machine, NLL bound"] < nats["independent Bernoulli pixels"] - 4
    assert (tmp_path / "digits" / "samples.png").exists()


def test_make_test() -> None:
    """`make test` itself, on one file; the suite is running it already."""
    assert "make test" in COMMANDS
    assert "passed" in _make("test TESTS=tests/test_models.py")


def test_pip_install_is_tested() -> None:
    """`pip install` is run by test_packaging.py, from the source distribution."""
    assert "pip install ." in COMMANDS
    assert "'pip', 'install'" in (ROOT / "tests/test_packaging.py").read_text().replace('"', "'")

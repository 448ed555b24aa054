"""Run every command and code block of the README and the guides, and check their figures, links and sizes.

The everyday tier runs Python and shortened commands. The thorough tier runs the commands as written.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkout
import pytest
from checkout import ROOT

import _wakesleep_command
from wakesleep_ext import ops
from wakesleep_ext.benchmark.result import ratio, read, rows, title

pytestmark = pytest.mark.source_tree


GUIDES = sorted((ROOT / "docs/guides").glob("*.md"))
NEEDS = {"diagnostics": ["arviz_stats"], "npe": ["sbi", "zuko"]}
"""Packages that a guide needs, and that the everyday tests may lack."""
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


# Options that shorten a command, in addition to one epoch and 25 samples for a bound.
BRIEFLY = {
    "wakesleep train": "--bound-samples 10",
    "wakesleep resume": "",
    "wakesleep evaluate": "",
    "wakesleep sample": "",
    "wakesleep encode": "",
    "wakesleep report": "--images 9 --weights 25 --dreams 9",
    "wakesleep bench": "--candidates fused eager",
    "wakesleep selftest": "",
    "wakesleep info": "",
}
# Other tests run these commands: `make train` below and by .ci/run, `pip install .` from the source distribution in
# test_packaging.py, the check as it is in test_check.py, and several processes below
TORCHRUN = "torchrun --nproc-per-node 2 -m wakesleep_ext train --device cpu --epochs 5 --out runs/two"
ELSEWHERE = {"make train", "pip install .", "wakesleep check --quick", TORCHRUN}


def _name(command: str) -> str:
    return " ".join(command.split()[:2])


def _in_brief(commands: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the commands of `BRIEFLY` in this process, as the `wakesleep` script would."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("wakesleep_ext.benchmark.run.keep_freed_memory", lambda: None)  # it would outlast the test
    for command in commands:
        if command in ELSEWHERE:
            continue
        brief = re.sub(r"--epochs \d+", "--epochs 1", f"{command} {BRIEFLY[_name(command)]}")
        brief = re.sub(r"--(bound-samples|diagnostics) \d+", r"--\1 25", brief)
        monkeypatch.setattr(sys, "argv", shlex.split(brief))
        assert _wakesleep_command.main() == 0, brief
    _check_pictures(commands, folder)


def _check_pictures(commands: list[str], folder: Path) -> None:
    for picture in re.findall(r"--(?:out|plot) (\S+\.png)", " ".join(commands)):
        assert (folder / picture).stat().st_size > 10_000


def test_every_block_is_run() -> None:
    assert {language for language, _ in BLOCKS} == {"sh", "python"}
    assert {command for command in COMMANDS if _name(command) not in BRIEFLY} <= ELSEWHERE


def test_commands_in_brief(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _in_brief(COMMANDS, tmp_path, monkeypatch)


def test_python() -> None:
    """Run the blocks in order, as a reader would."""
    code = "\n".join(block for language, block in BLOCKS if language == "python")
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["elbo"].shape == (128,)  # type: ignore[attr-defined]
    assert names["encoder"].weight.grad.abs().sum() > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_guides(guide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDS.get(guide.stem, []):
        pytest.importorskip(package)
    blocks = _blocks(guide)
    assert {language for language, _ in blocks} <= {"sh", "python", "text"}
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(_lines(blocks, "python")), str(guide), "exec"), {})
    _in_brief(_lines(blocks, "sh"), tmp_path, monkeypatch)


@pytest.mark.thorough
@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_command_lines_of_guides(guide: Path, tmp_path: Path) -> None:
    commands = _lines(_blocks(guide), "sh")
    for command in commands:
        if command != "pip install .":
            _run(command, tmp_path)
    _check_pictures(commands, tmp_path)


@pytest.mark.thorough
def test_command_line(tmp_path: Path) -> None:
    for command in COMMANDS:
        if command.startswith("wakesleep"):
            _run(command, tmp_path)
    _check_pictures(COMMANDS, tmp_path)


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
    stated = next(block for language, block in _blocks(ROOT / "docs/guides/training.md") if language == "text")
    number = r"\d+(\.\d+)?"
    assert re.sub(number, "#", stated) in re.sub(number, "#", output)
    nats = {line[:28]: float(line.split()[-1]) for line in output.splitlines() if line.startswith(("indep", "Helm"))}
    assert nats["Helmholtz machine, NLL bound"] < nats["independent Bernoulli pixels"] - 4
    assert (tmp_path / "digits" / "samples.png").exists()


@pytest.mark.thorough
def test_make_test() -> None:
    """Run the `make test` of CONTRIBUTING.md on one file, since the suite is already running."""
    assert "passed" in _make("test TESTS=tests/test_models.py")


# ---- figures ---------------------------------------------------------------------------------------------------------

# Prose states where a figure comes from, in a comment in the same paragraph or list item:
#   <!-- 22.8 times: RESULT OP PASS DTYPE SHAPE CANDIDATE -->   the candidate takes that many times as long as ours
#   <!-- 4.28 ms: RESULT OP PASS DTYPE SHAPE CANDIDATE -->      the median time; also in µs
#   <!-- 0.86 of copy speed: RESULT OP PASS DTYPE SHAPE CANDIDATE -->
#   <!-- 89.96 nats: RESULT OBJECTIVE, seed SEED -->
# RESULT is a file of benchmarks/results without its suffix.
COMMENT = re.compile(r"<!--.*?-->", re.S)
SOURCE = re.compile(r"<!-- ([\d.,]+) ([a-zµ ]+): (\S+) (.+) -->")
NUMBER = r"(\d[\d.,]*|\b(?:two|three|four|five|six|seven|eight|nine|ten|twenty|fifty|hundred))"
UNIT = r"(times\b|×(?! ?\d)|x\b|fold\b|µs\b|ms\b|nats\b|of copy speed\b)"  # noqa: RUF001
FIGURE = re.compile(rf"(?:{NUMBER} (?:to|and|or) )?{NUMBER}[ -]?{UNIT}")
PAGES_WITH_FIGURES = ("README.md", "CONTRIBUTING.md", "docs/benchmarks.md")


def _measured(unit: str, result: str, label: str) -> float | None:
    path = ROOT / "benchmarks/results" / f"{result}.json"
    if unit == "nats":
        runs = json.loads(path.read_text())
        return next((run["nll"] for run in runs if f"{run['objective']}, seed {run['seed']}" == label), None)
    case, bracket, candidate = label.partition("] ")
    row = next((row for row in rows(read(path)["records"]) if title(row["fused"]) == case + bracket.strip()), {})
    if candidate not in row:
        return None
    if unit == "times":
        return ratio(row, candidate)
    if unit == "of copy speed":
        return row[candidate]["bandwidth_fraction"]
    return row[candidate]["median_us"] / {"ms": 1000, "µs": 1}[unit]


def _wrong_figures(text: str) -> list[str]:
    """Describe the wrong figures of a text."""
    found = []
    for paragraph in re.split(r"\n\s*\n|\n(?=- )", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)):
        sources = SOURCE.findall(" ".join(" ".join(COMMENT.findall(paragraph)).split()).replace("-->", "-->\n"))
        for number, unit, result, label in sources:
            value, decimals = _measured(unit, result, label), len(number.partition(".")[2])
            if value is None:
                found.append(f"{number} {unit}: {result}.json has no {label}")
            elif f"{value:.{decimals}f}" != number:
                found.append(f"{number} {unit}: {result}.json has {value:.{decimals}f}")
        sourced = {(number, unit) for number, unit, *_ in sources}
        for *numbers, unit in FIGURE.findall(" ".join(COMMENT.sub("", paragraph).split())):
            name = "times" if unit in ("×", "x", "fold") else unit  # noqa: RUF001
            found += [f"{n} {name}: no comment says where from" for n in numbers if n and (n, name) not in sourced]
    return found


@pytest.mark.parametrize("page", PAGES_WITH_FIGURES)
def test_every_figure_comes_from_a_committed_result(page: str) -> None:
    text = checkout.load("update_readme", "scripts").prose((ROOT / page).read_text())
    assert _wrong_figures(text) == []


STEP = "0.1.0-nvidia-h200-step 784-200-200-50 wake+sleep float32 [1, 20, 784]"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("The step is 37.4 times as fast.", ["37.4 times"]),
        ("It is 37.4× as fast and 3x as long.", ["37.4 times", "3 times"]),  # noqa: RUF001
        (
            "It is 2 to 3 times as fast, 10-fold, and ten times as long.",
            ["2 times", "3 times", "10 times", "ten times"],
        ),
        ("It takes 114 µs\nand reaches 89.96\nnats.", ["114 µs", "89.96 nats"]),
        ("Images of 8 × 8 pixels, K = 1000, and `784x200`, sometimes.", []),  # noqa: RUF001
        (f"It is 37.4 times as fast.\n<!-- 37.4 times: {STEP} eager -->", []),
        (f"It is 37.4× as fast.\n<!-- 37.4 times:\n  {STEP} eager --> <!-- other -->", []),  # noqa: RUF001
        (f"It is 37 times as fast.\n\n<!-- 37 times: {STEP} eager -->", ["37 times: no comment"]),
        (f"It is 38 times as fast.\n<!-- 38 times: {STEP} eager -->", ["38 times: 0.1.0-nvidia-h200-step.json has 37"]),
        (f"It takes 114 µs.\n<!-- 114 µs: {STEP} fused -->", []),
        (f"It takes 4.2 ms.\n<!-- 4.2 ms: {STEP} eager -->", ["4.2 ms: 0.1.0-nvidia-h200-step.json has 4.3"]),
        (f"It is 3.0 times as fast.\n<!-- 3.0 times: {STEP} abacus -->", ["has no 784-200-200-50"]),
        ("It ends at 90.64 nats.\n<!-- 90.64 nats: mnist/results VAE, L = 1, seed 0 -->", []),
        ("It ends at 90.64 nats.\n<!-- 90.64 nats: mnist/results VAE, L = 1, seed 1 -->", ["has 90.70"]),
    ],
)
def test_a_wrong_figure_is_found(text: str, wrong: list[str]) -> None:
    found = _wrong_figures(text)
    assert len(found) == len(wrong), found
    assert all(part in line for part, line in zip(wrong, found, strict=True)), found


# ---- links and sizes -------------------------------------------------------------------------------------------------


@pytest.fixture
def update_readme() -> Any:
    return checkout.load("update_readme", "scripts")


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_links_to_files_of_the_checkout(page: str, update_readme: Any) -> None:
    text = (ROOT / page).read_text()
    if page == "README.md":
        address = update_readme.repository((ROOT / "pyproject.toml").read_text())
        assert update_readme.relink(text, address) == text, "run `make readme`"
        text = update_readme.relink(text, None)
    links = re.findall(r"\]\(([^)]+)\)", text)
    paths = [link for link in links if not link.startswith(("https://", "#"))]
    assert paths
    assert [path for path in paths if not ((ROOT / page).parent / path.partition("#")[0]).exists()] == []


def test_links_are_absolute_if_the_project_has_a_repository(update_readme: Any) -> None:
    address = "https://github.com/someone/a.project"
    pyproject = f'[project]\nname = "a"\n\n[project.urls]\nDocumentation = "https://a.org"\nSource = "{address}"\n'
    assert update_readme.repository(pyproject) == address
    assert update_readme.repository(pyproject.replace("github.com", "example.org")) is None
    assert update_readme.repository(f'[project]\nname = "a"\n[tool.b]\nsource = "{address}"\n') is None
    text = "![A plot](docs/a.png), [a page](docs/a.md) and [a site](https://a.org/x)."
    absolute = update_readme.relink(text, address)
    assert f"![A plot]({address}/raw/HEAD/docs/a.png)" in absolute
    assert f"[a page]({address}/blob/HEAD/docs/a.md)" in absolute
    assert "[a site](https://a.org/x)" in absolute
    assert update_readme.relink(absolute, address) == absolute
    assert update_readme.relink(absolute, None) == text


@pytest.mark.parametrize(("page", "most"), [("README.md", 9000), ("CONTRIBUTING.md", 6000)])
def test_front_pages_are_short(page: str, most: int) -> None:
    assert (ROOT / page).stat().st_size <= most


def test_the_readme_lists_every_op() -> None:
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.M)
    assert sorted(listed) == sorted(ops.__all__)


def test_tables_fit_the_page() -> None:
    for page in ("README.md", "docs/benchmarks.md"):
        assert [line for line in (ROOT / page).read_text().splitlines() if len(line) > 100] == []

"""Makes the tables and pictures of the README anew from the results that it names: `make readme`.

Speed stands between `<!-- speed: FILE.json -->` and `<!-- end of speed -->`, its picture beside the file; likelihoods
of the objectives between `<!-- mnist: FILE.json -->` and `<!-- end of mnist -->`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import mnist_objectives

from wakesleep_ext._files import write_atomically
from wakesleep_ext.benchmark import read, report, suite_of
from wakesleep_ext.benchmark.result import Result

ROOT = Path(__file__).resolve().parent.parent

_SECTION = re.compile(r"(<!-- (speed|mnist): (\S+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)


def results(text: str) -> list[Path]:
    """The results of benchmarks that a Markdown text names, relative to its folder."""
    return [Path(name) for _, kind, name, _ in _SECTION.findall(text) if kind == "speed"]


def refresh(text: str, folder: Path) -> str:
    """The text with its sections made anew; they are up to date if nothing changes."""

    def section(found: re.Match[str]) -> str:
        begin, kind, name, end = found.groups()
        made = _speed(Path(name), read(folder / name)) if kind == "speed" else _likelihoods(folder / name)
        return f"{begin}\n{made}\n\n{end}"

    return _SECTION.sub(section, text)


def _likelihoods(path: Path) -> str:
    return mnist_objectives.summary(json.loads(path.read_text()))


def _speed(path: Path, result: Result) -> str:
    suite = suite_of(result)
    picture = f"![Bars: how many times as fast as eager PyTorch each {suite.noun} is]({path.with_suffix('.png')})"
    return f"{picture}\n\n{report.text({**result, 'records': suite.headline(result['records'])}, suite)}"


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    for path in results(text):
        result = read(ROOT / path)
        report.plot(ROOT / path.with_suffix(".png"), result, suite_of(result))
    write_atomically(readme, refresh(text, ROOT).encode())


if __name__ == "__main__":
    main()

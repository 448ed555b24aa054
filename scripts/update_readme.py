"""Makes the speed tables and pictures of the README anew from the results that it names: `make readme`.

They stand between `<!-- speed: FILE.json -->` and `<!-- end of speed -->`; the picture is written beside the file.
"""

from __future__ import annotations

import re
from pathlib import Path

from wakesleep_ext.benchmark import read, report, suite_of
from wakesleep_ext.benchmark.result import Result
from wakesleep_ext.checkpoint import write_atomically

ROOT = Path(__file__).resolve().parent.parent

_SECTION = re.compile(r"(<!-- speed: (\S+) -->\n).*?(<!-- end of speed -->)", re.DOTALL)


def results(text: str) -> list[Path]:
    """The results that a Markdown text names, relative to its folder."""
    return [Path(name) for _, name, _ in _SECTION.findall(text)]


def refresh(text: str, folder: Path) -> str:
    """The text with its sections made anew; they are up to date if nothing changes."""

    def section(found: re.Match[str]) -> str:
        return f"{found[1]}\n{_section(Path(found[2]), read(folder / found[2]))}\n\n{found[3]}"

    return _SECTION.sub(section, text)


def _section(path: Path, result: Result) -> str:
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

"""Draw random sentences from the documentation and the code, to review their style.

The sources are the README, the guides, docstrings, comments and messages. The same seed draws the same sentences.
"""

from __future__ import annotations

import argparse
import ast
import io
import random
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_END = re.compile(r"(?<=[.!?:])\s+(?=[A-Z`\"*])|\n\s*\n|\n\s*[-*] ")
_NOT_PROSE = re.compile(
    r"```.*?```|<!--.*?-->|^\|.*?$|^#.*?$|^:.*?$|!\[.*?\]\(.*?\)|\$\$.*?\$\$", re.DOTALL | re.MULTILINE
)
_CPP_COMMENT = re.compile(r"(?:^[ \t]*//[^\n]*\n)+|//[^\n]*", re.MULTILINE)
_CPP_STRING = re.compile(r'"((?:[^"\\\n]|\\.)*)"')
_ARGUMENT = re.compile(
    r"^\s*(Args|Returns|Raises|Yields|Attributes|Gradients|Shape):\s*$|^\s*[\w, ]+:\s+", re.MULTILINE
)


def prose(path: Path) -> Iterator[str]:
    """Yield the prose of a file."""
    content = path.read_text()
    if path.suffix == ".md":
        yield _NOT_PROSE.sub("\n\n", content)
    elif path.suffix == ".py":
        yield from _of_python(content)
    else:
        for comment in _CPP_COMMENT.findall(content):
            yield re.sub(r"^\s*//+ ?", "", comment, flags=re.MULTILINE)
        yield from (text for text in _CPP_STRING.findall(content) if "expected" in text)


def _of_python(content: str) -> Iterator[str]:
    tree = ast.parse(content)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield _ARGUMENT.sub("\n\n", node.value.value)
        elif isinstance(node, ast.Raise):
            yield from (
                "".join(part.value if isinstance(part, ast.Constant) else "…" for part in text.values)
                for text in ast.walk(node)
                if isinstance(text, ast.JoinedStr)
            )
    for token in tokenize.generate_tokens(io.StringIO(content).readline):
        if token.type == tokenize.COMMENT:
            yield token.string.lstrip("# ")


def sentences() -> list[str]:
    """Return all distinct sentences of at least five words."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = ("README.md", "CONTRIBUTING.md", "docs/", "wakesleep_ext/", "csrc/", "_wakesleep_command.py", "setup.py")
    kinds = (".md", ".py", ".h", ".cpp", ".cu", ".cuh")
    found = {}
    for name in listed.splitlines():
        if name.startswith(folders) and name.endswith(kinds) and name != "docs/benchmarks.md":
            for text in prose(ROOT / name):
                for sentence in _END.split(text):
                    words = " ".join(sentence.split()).strip("*- ")
                    if len(re.findall(r"[A-Za-z]{2,}", words)) >= 5:
                        found.setdefault(words, name)
    return [f"{sentence}  ({name})" for sentence, name in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    every = sentences()
    drawn = random.Random(options.seed).sample(every, min(options.count, len(every)))
    for number, sentence in enumerate(drawn, 1):
        print(f"{number:3}. {sentence}")


if __name__ == "__main__":
    main()

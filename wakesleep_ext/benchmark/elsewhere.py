"""Time an implementation that runs in a process of its own, in blocks that alternate with ours."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from tempfile import TemporaryFile
from typing import Any

from wakesleep_ext.benchmark.measure import Implementation


class Elsewhere(Implementation):
    """An implementation in another process, which times its own calls.

    The standard input of the process begins with a line that holds the length of its inputs in bytes, and the inputs.
    The process makes a call and writes a line of JSON, `{"result": ..., "peak_bytes": ...}`. It answers each further
    line, which holds a number of calls, with a line that holds the seconds that they took.

    Args:
        command: the program and its arguments.
        environment: changes to the environment variables.
        inputs: the inputs of a call.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], inputs: bytes) -> None:
        self._errors = TemporaryFile("w+")  # noqa: SIM115  closed with the process
        self._process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        self._program, self._inputs = command[0], inputs
        self._first: dict[str, Any] = {}

    def first(self) -> object:
        self._first = self._ask(b"%d\n" % len(self._inputs) + self._inputs)
        return self._first["result"]

    def seconds(self, count: int) -> float:
        return float(self._ask(b"%d\n" % count))

    def peak_bytes(self) -> int:
        return int(self._first["peak_bytes"])

    def launches(self) -> None:
        return None

    def close(self) -> None:
        self._process.terminate()
        self._process.communicate()
        self._errors.close()

    def _ask(self, question: bytes) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # the process has failed, and says why
            self._process.stdin.write(question)
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            status = self._process.wait()
            self._errors.seek(0)
            said = [line.strip() for line in self._errors if line.strip()]
            raise RuntimeError(said[-1] if said else f"{self._program} ended with status {status}")
        return json.loads(answer)

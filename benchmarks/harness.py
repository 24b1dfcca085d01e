"""What the benchmarks share: contenders' interpreters, what a result says of machine and versions, pages of results."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
THREADS = 2


def environment(**more: str) -> dict[str, str]:
    """Returns the variables of a contender's process: this checkout serves if it is not installed."""
    paths = [str(ROOT), str(ROOT / "backends"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in paths if p), **more}


def installed(python: str, module: str) -> bool:
    """Returns whether that interpreter has the module."""
    command = [python, "-c", f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"]
    return subprocess.run(command, env=environment(), check=False).returncode == 0


class Contender:
    """A process of a benchmark that answers when it is asked, and sleeps otherwise.

    It runs `script --worker name`, says READY, and answers every line of JSON with a line `ANSWER` and JSON.
    """

    def __init__(self, script: str, name: str, python: str) -> None:
        self.command, self.name = [python, str(Path(script).resolve()), "--worker", name], name
        self.died_of: list[Any] = []
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if self._line("READY") is None:
            raise SystemExit(f"{self.name} did not start: status {self.process.wait()}")

    def ask(self, question: Any) -> Any:
        """Returns the answer; None if the process died of this question, now or before. It then starts anew."""
        if question in self.died_of:
            return None
        assert self.process.stdin
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self._line("ANSWER ")
        if answer is None:
            print(f"{self.name} died of {question} with status {self.process.wait()}", flush=True)
            self.died_of.append(question)
            self.start()
        return json.loads(answer or "null")

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def _line(self, word: str) -> str | None:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word)
        return None


def answering(reply: Callable[[Any], Any]) -> None:
    """What a contender's process does: `reply` to every question."""
    print("READY", flush=True)
    for line in sys.stdin:
        print("ANSWER " + json.dumps(reply(json.loads(line))), flush=True)


def versions(python: str, names: list[str]) -> dict[str, str]:
    """Returns the versions of those packages that an interpreter has, and its own."""
    source = (
        "import importlib.metadata as m, json, sys\n"
        "found = {}\n"
        "for n in sys.argv[1:]:\n"
        "    try: found[n] = m.version(n)\n"
        "    except m.PackageNotFoundError: pass\n"
        "found['python'] = '.'.join(map(str, sys.version_info[:3]))\n"
        "print(json.dumps(found))"
    )
    return json.loads(subprocess.run([python, "-c", source, *names], capture_output=True, text=True, check=True).stdout)


def machine() -> dict[str, Any]:
    """Returns the processor, the cores this process may use, and the features that matter here."""
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
        flags = next(line.partition(":")[2].split() for line in lines if line.startswith("flags"))
    except (OSError, StopIteration):
        flags = []
    kept = [f for f in ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16") if f in flags]
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "features": kept, "system": platform.system()}


def origin(contenders: dict[str, str]) -> dict[str, Any]:
    """Returns what a result says of the day, the machine and the contenders (name to interpreter)."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "threads": THREADS,
        "versions": {
            "trustcore": versions(sys.executable, ["jax", "jaxlib", "flax", "numpy"]),
            **{
                n: versions(p, ["llama-cpp-python", "gguf", "transformers", "torch"])
                for n, p in contenders.items()
                if n != "trustcore"
            },
        },
    }


def write_result(result: dict[str, Any], out: str | Path | None, kind: str) -> None:
    """Writes a result where it was asked for, or under benchmarks/results with its date."""
    path = Path(out or ROOT / "benchmarks" / "results" / f"{kind}-{result['date']}.json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written: {path}", flush=True)


def described(result: dict[str, Any]) -> str:
    """Returns machine, date and versions in a sentence or two."""
    m = result["machine"]
    versions = "; ".join(
        f"{n}: " + ", ".join(f"{k} {v}" for k, v in vs.items()) for n, vs in result["versions"].items()
    )
    return (
        f"Median (lowest to highest) of the rounds. {m['cpu']}, {m['cores']} cores ({', '.join(m['features'])}), "
        f"{result['threads']} threads, {result['date']}. {versions}."
    )


def fill(page: str, section: str, text: str) -> None:
    """Puts text between the marks of a section of a page, `<!-- section -->` and `<!-- /section -->`."""
    begin, end = f"<!-- {section} -->", f"<!-- /{section} -->"
    head, rest = (ROOT / page).read_text().split(begin)
    _, tail = rest.split(end)
    (ROOT / page).write_text(f"{head}{begin}\n{text}{end}{tail}")
    print(f"written: {page}")

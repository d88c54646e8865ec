"""A benchmark that is killed at random points and resumed ends with the card of one that was not, but for its times.

    python benchmarks/kill_and_resume.py                     # ten kills, zoo:mnist-robust, 200 images, quick
    python benchmarks/kill_and_resume.py --kills 1 --n 20    # does it run?

Each kill is a SIGKILL after a random part of the time that the whole took, its cache of adversarial images its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from unperturb.runs import environment, write_json

HERE = Path(__file__).resolve().parent


def command(options: argparse.Namespace, out: Path, *more: str) -> list[str]:
    verb = [sys.executable, "-m", "unperturb", "benchmark", options.model, "--data", options.data]
    return [*verb, "--eps", options.eps, "--budget", "quick", "--n", str(options.n), "--out", str(out), *more]


def run(words: list[str], cache: Path, seconds: float | None = None) -> bool:
    """Run a command to its end, or kill it after so many seconds; whether it ended by itself."""
    process = subprocess.Popen(words, env={**os.environ, "UNPERTURB_CACHE": str(cache)}, stdout=subprocess.DEVNULL)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return False
    if code:
        raise SystemExit(f"{' '.join(words)} ended with {code}")
    return True


def card(out: Path) -> dict[str, Any]:
    """What the card says, without its times."""
    found: dict[str, Any] = json.loads((out / "card" / "card.json").read_text())
    found.pop("times")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo:mnist-robust")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--eps", default="0.3")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "kill_and_resume" / "kills.json")
    options = parser.parse_args()
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        start = time.monotonic()
        run(command(options, work / "whole"), work / "cache-whole")
        whole, seconds = card(work / "whole"), time.monotonic() - start
        kills = []
        for number in range(options.kills):
            out, cache, at = work / f"cut-{number}", work / f"cache-{number}", draw.uniform(0.1, 0.95) * seconds
            while run(command(options, out), cache, at):  # it had ended: kill another, sooner
                shutil.rmtree(out)
                shutil.rmtree(cache, ignore_errors=True)
                at *= 0.8
            shards = len(list(out.glob("rows/*/*.parquet")))
            run(command(options, out, *(["--resume"] if (out / "recipe.json").exists() else [])), cache)
            differ = [key for key, value in card(out).items() if value != whole[key]]
            kills.append({"seconds": round(at, 1), "rows_there": shards, "differ": differ})
            print(kills[-1], flush=True)
            shutil.rmtree(out)
    same = sum(not kill["differ"] for kill in kills)
    print(f"{same} of {len(kills)} cards are the same; the whole took {seconds:.0f} s")
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    write_json(options.out, {"what": __doc__, **settings, "kills": kills, "environment": environment()})


if __name__ == "__main__":
    main()

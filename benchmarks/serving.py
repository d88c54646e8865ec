"""What serving costs: requests a second and latency of a protected model beside the bare one, and twice the load it can
bear.

    python benchmarks/serving.py             # zoo:finetune-cifar10 before zoo:cifar10-airbench; some two minutes
    python benchmarks/serving.py --quick     # does it run? Digits, and nets of MNIST

Both are `unperturb serve` in processes of their own, asked over loopback by httpx from this one; the bare model stands
behind `identity`, a purifier that changes nothing, so that its classifier is asked once. They are asked by turns. Each
answer is compared with the model's own: `wrong` counts those of another picture. CPU time is the service's. Then
requests come at twice the protected model's rate, whether earlier ones are answered or not: all of them are answered or
sent away by 503.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
from PIL import Image
from torch import Tensor

import unperturb as up
from unperturb.runs import environment, write_json
from unperturb.serving import load_protected

HERE = Path(__file__).resolve().parent
COUNTERS = ("unperturb_batch_images_sum", "unperturb_batch_images_count", "process_cpu_seconds_total")
Known = list[tuple[bytes, float, float]]  # of a picture: PNG, confidence before, confidence after


@contextlib.contextmanager
def served(purifier: str, classifier: str, *options: str) -> Iterator[str]:
    """The URL of a service in a process of its own; after, it has ended by SIGTERM."""
    words = [sys.executable, "-m", "unperturb", "serve", purifier, "--classifier", classifier, "--port", "0", *options]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        found = next((re.search(r"at (http://\S+);", line) for line in process.stdout), None)
        if found is None:
            raise RuntimeError(f"{' '.join(words)} did not start")
        try:
            yield found[1]
        finally:
            process.terminate()
            process.wait(60)


@torch.no_grad()
def known(purifier: str, classifier: str, images: Tensor) -> Known:
    model = load_protected(purifier, classifier)
    eight = (255 * images).round().to(torch.uint8)
    before = model.classifier(eight.float() / 255).softmax(1).amax(1)
    after = model(eight.float() / 255).softmax(1).amax(1)
    files = []
    for image in eight:
        file = io.BytesIO()
        Image.fromarray((image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy()).save(file, "PNG")
        files.append(file.getvalue())
    return list(zip(files, before.tolist(), after.tolist()))


@contextlib.asynccontextmanager
async def clients_of(url: str, count: int) -> AsyncIterator[list[httpx.AsyncClient]]:
    """Each with connections of its own: one that has hundreds of them is slower than the service."""
    async with contextlib.AsyncExitStack() as stack:
        made = [httpx.AsyncClient(base_url=url, timeout=60, verify=False) for _ in range(count)]
        yield [await stack.enter_async_context(client) for client in made]


def right(answer: dict[str, Any], before: float, after: float) -> bool:
    parts = ((answer["before"], before), (answer["after"], after))
    return all(abs(part["confidence"] - confidence) < 1e-3 for part, confidence in parts)


async def closed_loop(url: str, pictures: Known, at_once: int, seconds: float) -> tuple[list[float], float, int]:
    """(seconds of each answer, seconds in all, wrong answers): `at_once` clients, each with one question at a time."""
    took: list[float] = []
    wrong = 0
    async with clients_of(url, at_once) as clients:
        until = time.perf_counter() + seconds

        async def ask(client: httpx.AsyncClient, k: int) -> None:
            nonlocal wrong
            while time.perf_counter() < until:
                data, before, after = pictures[k % len(pictures)]
                start = time.perf_counter()
                answer = await client.post("/classify", content=data)
                took.append(time.perf_counter() - start)
                wrong += not right(answer.raise_for_status().json(), before, after)
                k += at_once

        start = time.perf_counter()
        await asyncio.gather(*(ask(client, k) for k, client in enumerate(clients)))
        return took, time.perf_counter() - start, wrong


async def open_loop(url: str, pictures: Known, rate: float, seconds: float) -> dict[str, Any]:
    """What becomes of requests that come at `rate` a second, whether those before are answered or not."""
    became: Counter[str] = Counter()
    took: list[float] = []
    async with clients_of(url, 64) as clients:

        async def ask(k: int) -> None:
            data, before, after = pictures[k % len(pictures)]
            start = time.perf_counter()
            try:
                answer = await clients[k % len(clients)].post("/classify", content=data)
            except httpx.HTTPError:
                became["other"] += 1
                return
            if answer.status_code == 200:
                took.append(time.perf_counter() - start)
                became["wrong"] += not right(answer.json(), before, after)
            named = {200: "answered", 503: "sent_away"}.get(answer.status_code, "other")
            became[named] += 1
            became["without_retry_after"] += answer.status_code == 503 and "retry-after" not in answer.headers

        start, asked = time.perf_counter(), []
        for k in range(int(rate * seconds)):
            await asyncio.sleep(max(0.0, start + k / rate - time.perf_counter()))
            asked.append(asyncio.create_task(ask(k)))
        sending = time.perf_counter() - start
        await asyncio.gather(*asked)
        spent = time.perf_counter() - start
    names = ("answered", "sent_away", "other", "wrong", "without_retry_after")
    return {
        "sent": len(asked),
        **{name: became[name] for name in names},
        "rate_asked": rate,
        "rate_sent": len(asked) / sending,
        "answered_per_second": became["answered"] / spent,
        "latency_ms": percentiles(took),
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles([1000 * s for s in seconds], n=100, method="inclusive")
    return {f"p{p}": round(cuts[p - 1], 2) for p in (50, 95, 99)}


def metric(url: str, start: str) -> float:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(start))


def table(rows: list[dict[str, Any]]) -> str:
    head = [
        "system",
        "clients",
        "requests/s",
        "p50, ms",
        "p95, ms",
        "p99, ms",
        "CPU ms a request",
        "images a batch",
        "wrong",
    ]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        spread = row["per_second"]
        low, high = spread["low"], spread["high"]
        lines.append(
            [row["system"], str(row["clients"]), f"{spread['median']:.0f} ({low:.0f} to {high:.0f})"]
            + [f"{row['latency_ms'][p]:.1f}" for p in ("p50", "p95", "p99")]
            + [f"{row['cpu_ms_per_request']:.1f}", f"{row['images_per_batch']:.1f}", str(row["wrong"])]
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifier", default="zoo:cifar10-airbench")
    parser.add_argument("--purifier", default="zoo:finetune-cifar10")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--n", type=int, default=64, help="different pictures")
    parser.add_argument("--clients", default="1,32")
    parser.add_argument("--seconds", type=float, default=6.0, help="of one measurement")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each service")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "serving" / "serving.json")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.repeat, options.n, options.clients = 1.0, 1, 8, "4"
        options.classifier, options.purifier, options.data = "zoo:mnist-resnet8", "zoo:finetune-mnist", "digits"
    torch.set_num_threads(1)
    test = up.load_dataset(options.data).test.subset(options.n)
    images, _ = test.batch(torch.arange(len(test)))
    systems = {"bare": "identity", "protected": options.purifier}
    pictures = {name: known(purifier, options.classifier, images) for name, purifier in systems.items()}
    rows: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        urls = {
            name: stack.enter_context(served(purifier, options.classifier, "--threads", str(options.threads)))
            for name, purifier in systems.items()
        }
        for name, url in urls.items():
            asyncio.run(closed_loop(url, pictures[name], 4, 1.0))  # thrown away
        for clients in map(int, options.clients.split(",")):
            found: dict[str, list[tuple[list[float], float, int]]] = {name: [] for name in systems}
            seen = {name: [0.0] * len(COUNTERS) for name in systems}
            for _ in range(options.repeat):
                for name, url in urls.items():
                    before = [metric(url, start) for start in COUNTERS]
                    found[name].append(asyncio.run(closed_loop(url, pictures[name], clients, options.seconds)))
                    after = [metric(url, start) for start in COUNTERS]
                    seen[name] = [s + b - a for s, a, b in zip(seen[name], before, after)]
            for name, runs in found.items():
                rates = [len(took) / spent for took, spent, _ in runs]
                row = {
                    "system": name,
                    "clients": clients,
                    "requests": sum(len(took) for took, _, _ in runs),
                    "per_second": {"median": statistics.median(rates), "low": min(rates), "high": max(rates)},
                    "latency_ms": percentiles([s for took, _, _ in runs for s in took]),
                    "images_per_batch": seen[name][0] / seen[name][1],
                    "cpu_ms_per_request": 1000 * seen[name][2] / seen[name][0],
                    "wrong": sum(wrong for _, _, wrong in runs),
                }
                rows.append(row)
                print(row, flush=True)
        url = urls["protected"]
        capacity = max(row["per_second"]["median"] for row in rows if row["system"] == "protected")
        counters = [f'unperturb_requests_total{{path="/classify",status="{code}"}}' for code in (200, 503)]
        before = [metric(url, start) for start in counters]
        overload = asyncio.run(open_loop(url, pictures["protected"], 2 * capacity, options.seconds))
        overload["counted_by_service"] = [metric(url, start) - b for start, b in zip(counters, before)]
        print(overload, flush=True)
        limits = httpx.get(f"{url}/info").json()["limits"]
    settings = {key: str(value) for key, value in vars(options).items() if key != "out"}
    record = {
        "settings": settings,
        "limits": limits,
        "fingerprint": test.fingerprint,
        "rows": rows,
        "overload": overload,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, {**record, "environment": environment()})
    print(table(rows))
    lost = overload["sent"] - overload["answered"] - overload["sent_away"]
    print(
        f"at twice the rate: {overload['sent']} sent, {overload['answered']} answered, {overload['sent_away']} sent "
        f"away, {lost} lost"
    )


if __name__ == "__main__":
    main()

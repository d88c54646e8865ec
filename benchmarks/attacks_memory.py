"""How much memory each attack takes, beside one forward+backward pass of the model it attacks.

    python benchmarks/attacks_memory.py                 # 28x28, 32x32 and 128x128, nets as they begin
    python benchmarks/attacks_memory.py --sizes 28 --n 16

The peak is exact: what torch's allocator holds, from its own events (CPU). Memory does not depend on the weights, so
no net is trained. The mark: at most twice one pass, plus a constant number of copies of the images, whatever the number
of steps; so every attack runs twice, the second time with twice the steps, and may not take more.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks_cases import NETS
from unperturb.attacks import Attack, create_attack
from unperturb.classifiers import create_classifier
from unperturb.runs import environment, write_json

HERE = Path(__file__).resolve().parent
COPIES = 16  # of the images, that an attack may hold beside two passes

# Settings with few steps, and what to change for twice as many.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fgsm": ({"eps": 0.1}, {}),
    "pgd": ({"eps": 0.1, "steps": 4, "restarts": 2}, {"steps": 8}),
    "mim": ({"eps": 0.1, "steps": 4}, {"steps": 8}),
    "ni_fgsm": ({"eps": 0.1, "steps": 4}, {"steps": 8}),
    "di_fgsm": ({"eps": 0.1, "steps": 4}, {"steps": 8}),
    "si_ni_fgsm": ({"eps": 0.1, "steps": 4, "copies": 2}, {"steps": 8}),
    "vmi_fgsm": ({"eps": 0.1, "steps": 4, "samples": 2}, {"steps": 8}),
    "deepfool": ({"steps": 3}, {"steps": 6}),
    "cw": ({"steps": 4, "search_steps": 2}, {"steps": 8}),
    "ddn": ({"steps": 4}, {"steps": 8}),
    "fmn": ({"steps": 4}, {"steps": 8}),
    "ead": ({"steps": 4, "search_steps": 2}, {"steps": 8}),
    "jsma": ({"gamma": 0.01}, {"gamma": 0.02}),
    "apgd": ({"eps": 0.1, "steps": 4}, {"steps": 8}),
    "apgd-t": ({"eps": 0.1, "steps": 4, "target_classes": 2}, {"steps": 8}),
    "fab-t": ({"steps": 3, "target_classes": 2}, {"steps": 6}),
    "square": ({"eps": 0.01, "queries": 6}, {"queries": 12}),
    "autoattack": ({"eps": 0.01, "steps": 3, "target_classes": 2, "queries": 6}, {"steps": 6, "queries": 12}),
    "sparse_rs": ({"queries": 6}, {"queries": 12}),
    "rays": ({"queries": 6}, {"queries": 12}),
    "hop_skip_jump": ({"queries": 100, "evaluations": 10}, {"queries": 200}),
    "patch": ({"steps": 3}, {"steps": 6}),
    "noise": ({"eps": 0.1, "num_trials": 2}, {"num_trials": 4}),
    "occlusion": ({"num_trials": 2}, {"num_trials": 4}),
}


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that torch held at once during `call`, over what it held before; CPU tensors."""
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        answer = call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    del answer
    return most


def one_pass(net: nn.Module, images: Tensor, labels: Tensor) -> None:
    x = images.clone().requires_grad_()
    torch.autograd.grad(F.cross_entropy(net(x), labels, reduction="sum"), x)


def measure(attack: Attack, longer: Attack, net: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Peaks in bytes: one pass, the attack, the same with twice the steps; and what is over twice a pass in copies."""
    single = peak_bytes(lambda: one_pass(net, images, labels))
    short, long = (peak_bytes(lambda a=a: a(net, images, labels)) for a in (attack, longer))  # type: ignore[misc]
    copies = max(0.0, (long - 2 * single) / (images.numel() * images.element_size()))
    return {
        "pass_bytes": single,
        "bytes": short,
        "bytes_with_twice_the_steps": long,
        "times_a_pass": long / single,
        "copies_over_two_passes": copies,
        "met": copies <= COPIES and long <= 1.02 * short,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sizes", type=lambda t: [int(s) for s in t.split(",")], default=list(NETS), help="of 28,32,128"
    )
    parser.add_argument("--n", type=int, default=32, help="images")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results/attacks/memory.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size in options.sizes:
        name, more, *_ = NETS[size]
        channels = 1 if size == 28 else 3
        torch.manual_seed(0)
        net = create_classifier(
            name, channels=channels, size=size, classes=10, mean=[0.5] * channels, std=[0.5] * channels, **more
        )
        net = net.eval().requires_grad_(False)
        images = torch.rand(options.n, channels, size, size)
        labels = net(images).argmax(1)
        one_pass(net, images, labels)  # what is allocated once and kept
        for attack, (settings, twice) in CASES.items():
            made, longer = create_attack(attack, **settings), create_attack(attack, **{**settings, **twice})
            row = {"net": f"{name}, {size}x{size}", "attack": attack, "settings": repr(made)}
            row |= measure(made, longer, net, images, labels)
            rows.append(row)
            said = "met   " if row["met"] else "MISSED"
            print(
                f"{said} {row['net']:18} {attack:10} {row['times_a_pass']:5.2f} passes, "
                f"{row['copies_over_two_passes']:4.1f} copies over two; twice the steps: "
                f"x {row['bytes_with_twice_the_steps'] / row['bytes']:.2f}",
                flush=True,
            )
    record = {"what": "peak memory of the attacks", "n": options.n, "copies_allowed": COPIES, "rows": rows}
    write_json(options.out, record | {"environment": environment()})
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()

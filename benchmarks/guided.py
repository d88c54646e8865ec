"""Where a guided purifier loses its images: in what its encoder decides, or in what is written into the image.

    python benchmarks/guided.py zoo:harden-mnist --classifier zoo:mnist-lenet5 --data mnist --eps 0.3

On validation images. First the encoder alone and the whole under APGD-30 on the margin and Square-200, each attacked
for itself; then who of the two is wrong under the attack on the whole; then the whole under attacks of rising strength.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import unperturb as up
from unperturb import metrics
from unperturb.defenses.guided import GuidedUNet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("defense", help="run folder or zoo:NAME")
    parser.add_argument("--classifier", required=True, help="run folder or zoo:NAME")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--eps", default="0.3", help="in Linf, a number or a fraction such as 8/255")
    parser.add_argument("--n", type=int, default=500, help="validation images, a fixed random subset")
    options = parser.parse_args()
    held_out = up.load_dataset(options.data).val.subset(options.n)
    images, labels = held_out.batch(torch.arange(len(held_out)))
    defense = up.load_defense(options.defense)
    if not isinstance(generator := getattr(defense, "generator", None), GuidedUNet):
        raise SystemExit(f"{options.defense} has no encoder: its generator is not `guided`")
    whole, encoder = up.Protected(up.load_classifier(options.classifier), defense).eval(), generator.encoder
    eps = up.budget(options.eps)

    def attacked(model: nn.Module, name: str, **settings: object) -> Tensor:
        return up.create_attack(name, eps=eps, **settings)(model, images, labels, index=held_out.index)

    @torch.no_grad()
    def right(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).argmax(1) == labels

    def said(what: str, values: Tensor) -> None:
        print(f"{what}: {100 * float(values.float().mean()):.1f} %", flush=True)

    margin = {"steps": 30, "loss": "margin"}
    for name, model in (("encoder", encoder), ("whole", whole)):
        said(f"{name}, clean", right(model, images))
        said(f"{name}, APGD-30", right(model, x := attacked(model, "apgd", **margin)))
        if model is encoder:
            said("whole, on the images of that", right(whole, x))
        said(f"{name}, Square-200", right(model, attacked(model, "square", queries=200)))
    x = attacked(whole, "apgd", **margin)
    decided, lost = right(encoder, x), ~right(whole, x)
    said("encoder right and whole wrong, APGD-30 on the whole", decided & lost)
    said("encoder wrong", ~decided)
    with torch.no_grad():
        sure = encoder(x).softmax(1).gather(1, labels[:, None])[:, 0][decided & lost]
        print(f"there the encoder gives the true class {float(sure.median()):.2f} in the median")
        print(f"clean images come back at {float(metrics.psnr(defense(images), images).mean()):.1f} dB")
    for alpha, steps in ((eps / 2, 3), (eps / 3, 7), (eps / 4, 20)):
        x = attacked(whole, "pgd", alpha=alpha, steps=steps, loss="margin", random_start=True)
        said(f"whole, PGD-{steps} on the margin", right(whole, x))
    said("whole, APGD-100", right(whole, attacked(whole, "apgd", steps=100, loss="margin")))


if __name__ == "__main__":
    main()

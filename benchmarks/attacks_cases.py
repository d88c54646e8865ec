"""What `attacks.py` compares: the attacks with their settings, the models, and the images they get right."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks_peers import PEERS, Makers
from unperturb.attacks.apgd import APGD, APGDT
from unperturb.attacks.autoattack import AutoAttack
from unperturb.attacks.base import Attack
from unperturb.attacks.cw import CW
from unperturb.attacks.ddn import DDN
from unperturb.attacks.deepfool import DeepFool
from unperturb.attacks.difgsm import DIFGSM
from unperturb.attacks.ead import EAD
from unperturb.attacks.fab import FAB
from unperturb.attacks.fgsm import FGSM
from unperturb.attacks.fmn import FMN
from unperturb.attacks.hopskipjump import HopSkipJump
from unperturb.attacks.jsma import JSMA
from unperturb.attacks.mim import MIM
from unperturb.attacks.nifgsm import NIFGSM
from unperturb.attacks.noise import Noise
from unperturb.attacks.patch import PatchAttack
from unperturb.attacks.pgd import PGD
from unperturb.attacks.rays import RayS
from unperturb.attacks.sinifgsm import SINIFGSM
from unperturb.attacks.sparse_rs import SparseRS
from unperturb.attacks.square import Square
from unperturb.attacks.vmifgsm import VMIFGSM
from unperturb.classifiers import Classifier, create_classifier, fused_copy, load_classifier
from unperturb.classifiers.fused_copy import FusedCopy
from unperturb.data import ImageSet, Splits, load_dataset
from unperturb.runs import read_json

NETS: dict[int, tuple[str, dict[str, int], int, float]] = {  # by size: family, options, epochs, learning rate
    28: ("lenet5", {}, 6, 3e-3),
    32: ("resnet8", {"width": 8}, 4, 1e-2),
    128: ("resnet18", {"width": 8}, 2, 1e-2),
}


@dataclass(frozen=True)
class Case:
    """One line-up: an attack of ours whose settings everybody gets, and the norm of its distances.

    aimed: at the class after the true one. passes: forward and backward, that every image needs, where that is fixed.
    few: how many of the images a library gets that takes them one by one, seconds each: its figures are per image.
    """

    attack: Attack
    norm: str = "linf"
    aimed: bool = False
    passes: int | None = None
    few: dict[str, int] = field(default_factory=dict)


def cases(eps: float) -> dict[str, Case]:
    search = CW(steps=100, search_steps=9, initial_const=0.1, abort_early=False)
    return {
        "fgsm": Case(FGSM(eps=eps), passes=1),
        "pgd": Case(PGD(eps=eps, steps=40), passes=40),
        "mim": Case(MIM(eps=eps, steps=10), passes=10),
        "ni_fgsm": Case(NIFGSM(eps=eps, steps=10), passes=10),
        "di_fgsm": Case(DIFGSM(eps=eps, steps=10), passes=10),
        "si_ni_fgsm": Case(SINIFGSM(eps=eps, steps=10), passes=50),
        "vmi_fgsm": Case(VMIFGSM(eps=eps, steps=10), passes=55),
        "deepfool": Case(DeepFool(steps=50), "l2"),
        "cw-1x100": Case(CW(steps=100, search_steps=1, initial_const=1.0, abort_early=False), "l2", passes=100),
        "cw-9x100": Case(search, "l2", passes=900),
        "cw-9x100-abort": Case(CW(steps=100, search_steps=9, initial_const=0.1), "l2"),
        "ddn": Case(DDN(steps=100), "l2", passes=100),
        "fmn": Case(FMN(steps=50), "l2", passes=50),
        "fmn-linf": Case(FMN(norm="linf", steps=50), passes=50),
        "fmn-l1": Case(FMN(norm="l1", steps=50), "l1", passes=50),
        "fmn-l0": Case(FMN(norm="l0", steps=50), "l0", passes=50),
        "ead": Case(EAD(steps=50, search_steps=5, lr=0.02, decision="l1"), "l1"),
        "jsma": Case(JSMA(theta=1.0, gamma=0.145), "l0", aimed=True, few={"torchattacks": 4}),
        "apgd-ce": Case(APGD(eps=eps, steps=100), passes=100),
        "apgd-dlr": Case(APGD(eps=eps, steps=100, loss="dlr"), passes=100),
        "apgd-t": Case(APGDT(eps=eps, steps=20)),
        "apgd-t-first": Case(APGDT(eps=eps, steps=20, first_success=True)),
        "fab-t": Case(FAB(eps=0.3, steps=20)),
        "fab-t-first": Case(FAB(eps=0.3, steps=20, first_success=True)),
        "square": Case(Square(eps=eps, queries=1000)),
        "autoattack": Case(AutoAttack(eps=eps, steps=20, queries=500)),
        "rays": Case(RayS(queries=1000)),
        "hop_skip_jump": Case(HopSkipJump(queries=1000), "l2"),
        "sparse_rs": Case(SparseRS(pixels=10, queries=500), "l0"),
        "patch": Case(PatchAttack(steps=100), "l0", passes=100),
        "noise": Case(Noise(eps=eps), passes=0),
    }


BIG = 64  # above this side ours run alone
SPENT = (
    *("cw-9x100-abort", "ead", "apgd-t", "apgd-t-first", "fab-t", "fab-t-first", "square", "autoattack", "rays"),
    *("hop_skip_jump", "sparse_rs"),
)


@dataclass(frozen=True)
class Field:
    """A model, its fused copy, the images to attack, and the peers set up for it."""

    name: str
    net: Classifier
    fast: FusedCopy
    images: Tensor
    labels: Tensor
    classes: int
    peers: dict[str, Makers]


# Models and images --------------------------------------------------------------------------------------------------


def trained(size: int) -> tuple[Classifier, Splits]:
    """A net for this size, trained on scikit-learn's digits in seconds; in three channels above 28x28."""
    name, options, epochs, lr = NETS[size]
    data = load_dataset("digits", size=size)
    channels = 1 if size == 28 else 3
    images, labels = batch(data.train, channels)
    torch.manual_seed(0)
    shape = {"channels": channels, "size": size, "classes": data.test.classes}
    net = create_classifier(name, mean=[0.2] * channels, std=[0.35] * channels, **shape, **options)
    adam = torch.optim.Adam(net.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, lr, total_steps=epochs * -(-len(images) // 32))
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(32):
            loss = F.cross_entropy(net(images[rows]), labels[rows])
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
    return net, data


def batch(part: ImageSet, channels: int) -> tuple[Tensor, Tensor]:
    """All of `part`; gray images repeated where a model takes more channels."""
    images, labels = part.batch(torch.arange(len(part)))
    return (images.expand(-1, channels, -1, -1).contiguous() if images.shape[1] == 1 else images), labels


@torch.no_grad()
def correct(net: nn.Module, images: Tensor, labels: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The first `n` images that the net gets right."""
    right = torch.cat([net(x).argmax(1) for x in images.split(256)]) == labels
    return images[right][:n], labels[right][:n]


def line_up(options: argparse.Namespace) -> list[tuple[str, Callable[[], tuple[Classifier, Splits]]]]:
    """The models to attack by name, each with what makes it and its data."""

    def load(folder: str) -> tuple[Classifier, Splits]:
        of = read_json(Path(folder) / "classifier.json")
        return load_classifier(folder), load_dataset(of["extra"]["dataset"], size=of["size"])

    if options.model:
        return [(Path(m).name, functools.partial(load, m)) for m in options.model]
    return [(f"{NETS[s][0]} on digits, {s}x{s}", functools.partial(trained, s)) for s in options.sizes]


def prepare(name: str, make: Callable[[], tuple[Classifier, Splits]], options: argparse.Namespace) -> Field:
    """The model, its images, its fused copy, and the peers that take part; those that cannot are named with their
    error."""
    net, data = make()
    assert net.spec is not None
    net = net.eval().requires_grad_(not options.freeze)
    test = data.test.subset(4 * options.n)  # fixed; enough that `n` of them are classified correctly
    images, labels = correct(net, *batch(test, net.spec["channels"]), options.n)
    peers: dict[str, Makers] = {}
    for library in options.peers if images.shape[-1] <= BIG else []:
        try:
            peers[library] = PEERS[library](net, images, data.test.classes)
        except Exception as error:
            options.absent[library] = f"{type(error).__name__}: {error}"[:300]
    return Field(name, net, fused_copy(net, images), images, labels, data.test.classes, peers)

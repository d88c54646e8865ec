"""The other attack libraries with the settings of ours: `PEERS[library](net, example, classes)[kind](ours)`.

In Linf, but for the minimal-norm attacks that know L2 or L0 alone. What comes out takes images, labels and targets (of
which an untargeted attack reads only the labels) and returns adversarial images. Everything that a library can do once
per model is done before the clock starts, and its own re-checks are left out where it has a way to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
Makers = dict[str, Callable[[Any], Run]]  # by the class name of our attack

MODULES = {"torchattacks": "torchattacks", "foolbox": "foolbox", "ART": "art", "adv-lib": "adv_lib"}


def pgd_alpha(ours: Any) -> float:
    return 2.5 * ours.eps / ours.steps if ours.alpha is None else ours.alpha


def mim_alpha(ours: Any) -> float:
    return ours.eps / ours.steps if ours.alpha is None else ours.alpha


def of_torchattacks(net: nn.Module, example: Tensor, classes: int) -> Makers:
    import torchattacks as ta

    def plain(attack: Any) -> Run:
        return lambda x, y, _: attack(x, y).detach()

    def aimed(attack: Any) -> Run:
        attack.set_mode_targeted_by_label(quiet=True)
        return lambda x, _, t: attack(x, t).detach()

    def cw(a: Any) -> Run:
        if a.search_steps > 1:
            raise LookupError("it has no search for the constant")
        return plain(ta.CW(net, c=a.initial_const, kappa=a.confidence, steps=a.steps, lr=a.lr))

    def apgd(a: Any) -> Run:
        loss = {"cross_entropy": "ce", "dlr": "dlr"}[a.loss]
        return plain(ta.APGD(net, norm="Linf", eps=a.eps, steps=a.steps, n_restarts=a.restarts, loss=loss))

    def apgd_t(a: Any) -> Run:
        attack = ta.APGDT(net, eps=a.eps, steps=a.steps, n_restarts=a.restarts, n_classes=classes)
        attack.n_target_classes = min(a.target_classes, classes - 1)
        return plain(attack)

    def fab(a: Any) -> Run:
        attack = ta.FAB(net, eps=a.eps, steps=a.steps, n_restarts=a.restarts, multi_targeted=True, n_classes=classes)
        attack.n_target_classes = min(a.target_classes, classes - 1)
        return plain(attack)

    return {
        "FGSM": lambda a: plain(ta.FGSM(net, eps=a.eps)),
        "PGD": lambda a: plain(ta.PGD(net, eps=a.eps, alpha=pgd_alpha(a), steps=a.steps, random_start=a.random_start)),
        "MIM": lambda a: plain(ta.MIFGSM(net, eps=a.eps, alpha=mim_alpha(a), steps=a.steps, decay=a.decay)),
        "NIFGSM": lambda a: plain(ta.NIFGSM(net, eps=a.eps, alpha=mim_alpha(a), steps=a.steps, decay=a.decay)),
        "DIFGSM": lambda a: plain(
            ta.DIFGSM(
                net,
                eps=a.eps,
                alpha=mim_alpha(a),
                steps=a.steps,
                decay=a.decay,
                resize_rate=a.resize_rate,
                diversity_prob=a.diversity_prob,
            )
        ),
        "SINIFGSM": lambda a: plain(
            ta.SINIFGSM(net, eps=a.eps, alpha=mim_alpha(a), steps=a.steps, decay=a.decay, m=a.copies)
        ),
        "VMIFGSM": lambda a: plain(
            ta.VMIFGSM(net, eps=a.eps, alpha=mim_alpha(a), steps=a.steps, decay=a.decay, N=a.samples, beta=a.beta)
        ),
        "DeepFool": lambda a: plain(ta.DeepFool(net, steps=a.steps, overshoot=a.overshoot)),
        "CW": cw,
        "JSMA": lambda a: aimed(ta.JSMA(net, theta=a.theta, gamma=a.gamma)),
        "APGD": apgd,
        "APGDT": apgd_t,
        "FAB": fab,
        "Square": lambda a: plain(ta.Square(net, eps=a.eps, n_queries=a.queries, p_init=a.p_init, loss=a.loss)),
    }


def of_foolbox(net: nn.Module, example: Tensor, classes: int) -> Makers:
    import foolbox
    from foolbox import attacks as fa

    wrapped = foolbox.PyTorchModel(net, bounds=(0, 1), device=example.device)

    def run(attack: Any, **ball: float) -> Run:  # `run`, not a call: without the library's own re-checks
        return lambda x, y, _: attack.run(wrapped, x, foolbox.criteria.Misclassification(y), **ball)

    def pgd(a: Any) -> Run:
        attack = fa.LinfProjectedGradientDescentAttack(
            abs_stepsize=pgd_alpha(a), steps=a.steps, random_start=a.random_start
        )
        return run(attack, epsilon=a.eps)

    def mim(a: Any) -> Run:  # not the paper's: it takes the sign before the momentum sum
        attack = fa.LinfMomentumIterativeFastGradientMethod(
            momentum=a.decay, abs_stepsize=mim_alpha(a), steps=a.steps, random_start=False
        )
        return run(attack, epsilon=a.eps)

    def cw(a: Any) -> Run:
        attack = fa.L2CarliniWagnerAttack(
            binary_search_steps=a.search_steps,
            steps=a.steps,
            stepsize=a.lr,
            confidence=a.confidence,
            initial_const=a.initial_const,
            abort_early=a.abort_early,
        )
        return run(attack)

    def fmn(a: Any) -> Run:  # its L2 never projects: it divides the norm by itself
        kinds = {"l2": fa.L2FMNAttack, "linf": fa.LInfFMNAttack, "l1": fa.L1FMNAttack, "l0": fa.L0FMNAttack}
        return run(kinds[a.norm](steps=a.steps, max_stepsize=a.alpha, gamma=a.gamma))

    def ead(a: Any) -> Run:
        attack = fa.EADAttack(
            binary_search_steps=a.search_steps,
            steps=a.steps,
            initial_stepsize=a.lr,
            confidence=a.confidence,
            initial_const=a.initial_const,
            regularization=a.beta,
            decision_rule={"elastic_net": "EN", "l1": "L1"}[a.decision],
            abort_early=False,
        )
        return run(attack)

    def hop_skip_jump(a: Any) -> Run:  # it has no limit of queries: four iterations take about 800 with their start
        return run(fa.HopSkipJumpAttack(steps=4, initial_gradient_eval_steps=a.evaluations, gamma=a.gamma))

    return {
        "FGSM": lambda a: run(fa.LinfFastGradientAttack(), epsilon=a.eps),
        "PGD": pgd,
        "MIM": mim,
        "DeepFool": lambda a: run(
            fa.L2DeepFoolAttack(steps=a.steps, candidates=min(a.top_k, classes), overshoot=a.overshoot)
        ),
        "CW": cw,
        "FMN": fmn,
        "EAD": ead,
        "HopSkipJump": hop_skip_jump,
        "DDN": lambda a: run(fa.DDNAttack(init_epsilon=a.init_norm, steps=a.steps, gamma=a.gamma)),
        # Scaled by the largest signed value, so that the negative ones may leave the ball.
        "Noise": lambda a: run(fa.LinfAdditiveUniformNoiseAttack(), epsilon=a.eps),
    }


def of_art(net: nn.Module, example: Tensor, classes: int) -> Makers:
    from art.attacks import evasion
    from art.estimators.classification import PyTorchClassifier

    model = PyTorchClassifier(
        model=net,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(example.shape[1:]),
        nb_classes=classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if example.is_cuda else "cpu",
    )
    size = len(example)

    def run(attack: Any, *, aimed: bool = False) -> Run:
        def call(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
            found = attack.generate(x=x.cpu().numpy(), y=(t if aimed else y).cpu().numpy())
            return torch.from_numpy(np.asarray(found, dtype=np.float32)).to(x)

        return call

    def pgd(a: Any) -> Run:
        attack = evasion.ProjectedGradientDescentPyTorch(
            model,
            eps=a.eps,
            eps_step=pgd_alpha(a),
            max_iter=a.steps,
            num_random_init=int(a.random_start),
            batch_size=size,
            verbose=False,
        )
        return run(attack)

    def mim(a: Any) -> Run:
        attack = evasion.MomentumIterativeMethod(
            model,
            eps=a.eps,
            eps_step=mim_alpha(a),
            decay=a.decay,
            max_iter=a.steps,
            batch_size=size,
            verbose=False,
        )
        return run(attack)

    def deepfool(a: Any) -> Run:
        attack = evasion.DeepFool(
            model,
            max_iter=a.steps,
            epsilon=a.overshoot,
            nb_grads=min(a.top_k, classes),
            batch_size=size,
            verbose=False,
        )
        return run(attack)

    def cw(a: Any) -> Run:
        attack = evasion.CarliniL2Method(
            model,
            confidence=a.confidence,
            learning_rate=a.lr,
            binary_search_steps=a.search_steps,
            max_iter=a.steps,
            initial_const=a.initial_const,
            batch_size=size,
            verbose=False,
        )
        return run(attack)

    return {
        "FGSM": lambda a: run(evasion.FastGradientMethod(model, eps=a.eps, batch_size=size)),
        "PGD": pgd,
        "MIM": mim,
        "DeepFool": deepfool,
        "CW": cw,
        # Not the paper's map: the two largest slopes of the target, whatever they do to the other classes.
        "JSMA": lambda a: run(
            evasion.SaliencyMapMethod(model, theta=a.theta, gamma=a.gamma, batch_size=size, verbose=False), aimed=True
        ),
        "Square": lambda a: run(
            evasion.SquareAttack(model, eps=a.eps, max_iter=a.queries, p_init=a.p_init, batch_size=size, verbose=False)
        ),
    }


def of_adv_lib(net: nn.Module, example: Tensor, classes: int) -> Makers:
    from adv_lib import attacks as al

    # Greek argument names are passed by position.
    def pgd(a: Any) -> Run:
        return lambda x, y, _: al.pgd_linf(
            net, x, y, a.eps, steps=a.steps, random_init=a.random_start, absolute_step_size=pgd_alpha(a)
        )

    def cw(a: Any) -> Run:
        return lambda x, y, _: al.carlini_wagner_l2(
            net,
            x,
            y,
            confidence=a.confidence,
            learning_rate=a.lr,
            initial_const=a.initial_const,
            binary_search_steps=a.search_steps,
            max_iterations=a.steps,
            abort_early=a.abort_early,
        )

    def apgd(a: Any) -> Run:
        loss = {"cross_entropy": "ce", "dlr": "dlr"}[a.loss]
        return lambda x, y, _: al.apgd(
            net, x, y, a.eps, torch.inf, n_iter=a.steps, n_restarts=a.restarts, loss_function=loss
        )

    def apgd_t(a: Any) -> Run:
        count = min(a.target_classes, classes - 1)
        return lambda x, y, _: al.apgd_targeted(
            net, x, y, a.eps, torch.inf, n_iter=a.steps, n_restarts=a.restarts, num_targets=count
        )

    def fab(a: Any) -> Run:
        runs = a.restarts * min(a.target_classes, classes - 1)
        return lambda x, y, _: al.fab(net, x, y, torch.inf, a.steps, a.eps, restarts=runs, targeted_restarts=True)

    return {
        "PGD": pgd,
        "DeepFool": lambda a: lambda x, y, _: al.df(net, x, y, steps=a.steps, overshoot=a.overshoot, norm=2),
        "CW": cw,
        "DDN": lambda a: lambda x, y, _: al.ddn(net, x, y, False, a.steps, a.gamma, a.init_norm, None),
        "APGD": apgd,
        "APGDT": apgd_t,
        "FAB": fab,
    }


PEERS: dict[str, Callable[[nn.Module, Tensor, int], Makers]] = {
    "torchattacks": of_torchattacks,
    "foolbox": of_foolbox,
    "ART": of_art,
    "adv-lib": of_adv_lib,
}

"""Carlini and Wagner's L2 attack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from unperturb.attacks.base import Attack, Best, Problem, attacks, margin


@attacks.register("cw")
@dataclass(frozen=True, kw_only=True)
class CW(Attack):
    confidence: float = 0.0
    lr: float = 0.05
    steps: int = 100
    search_steps: int = 9
    initial_const: float = 1e-3
    smoothing: float = 0.99
    abort_early: bool = True
    factor: float = 10
    warm: str = "last"
    clampgrad: bool = False
    exact: bool = True
    b1: float = 0.9
    b2: float = 0.999

    def perturb(self, problem: Problem) -> Tensor:
        best = Best(problem.images)
        N = len(problem.images)
        images = problem.images
        w = torch.atanh((2 * images - 1) * self.smoothing)
        w0 = w.clone()
        bw = w.clone()
        const = torch.full((N,), self.initial_const)
        low = torch.zeros(N)
        high = torch.full((N,), torch.inf)
        sc = self.smoothing if self.exact else 1.0
        allw = w
        for search in range(self.search_steps):
            if search:
                if self.warm == "none":
                    allw = w0.clone()
                elif self.warm == "best":
                    allw = torch.where((best.value > -torch.inf)[:, None, None, None], bw, allw)
                elif self.warm == "fail":
                    allw = torch.where(hit[:, None, None, None], bw, allw)
            w = allw.clone()
            rows = torch.arange(N)
            here = problem
            c = const
            x0 = images
            m = torch.zeros_like(w)
            v = torch.zeros_like(w)
            hit = torch.zeros(N, dtype=torch.bool)
            previous = torch.full((N,), torch.inf)
            for step in range(self.steps):
                th = torch.tanh(w)
                raw = (th / sc + 1) / 2
                x = raw.clamp(0, 1)
                point, logits = here.forward(x)
                z = logits.detach()
                others = z.scatter(1, here.labels[:, None], -torch.inf)
                other = others.argmax(1, keepdim=True)
                lead = here.value(z, margin) - self.confidence
                delta = x - x0
                dist = delta.flatten(1).square().sum(1)
                active = (lead < 0).float()
                s = (-1.0 if here.targeted else 1.0) * active * c
                weights = (
                    torch.zeros_like(z).scatter_(1, here.labels[:, None], s[:, None]).scatter_(1, other, -s[:, None])
                )
                ok = lead > 1e-5 * z.abs().amax(1)
                val = torch.where(ok, -dist, -torch.inf)
                better = val > best.value[rows]
                best.update(x, val, rows)
                bw[rows] = torch.where(better[:, None, None, None], w, bw[rows])
                hit[rows] |= ok
                g = here.backward(point, logits, weights)
                g = g + 2 * delta
                if self.clampgrad:
                    g = g * ((raw >= 0) & (raw <= 1))
                g = g * (1 - th * th)
                m = m.mul(self.b1).add(g, alpha=1 - self.b1)
                v = v.mul(self.b2).addcmul(g, g, value=1 - self.b2)
                w = w - self.lr * (m / (1 - self.b1 ** (step + 1))) / ((v / (1 - self.b2 ** (step + 1))).sqrt() + 1e-8)
                if self.abort_early and step % max(self.steps // 10, 1) == 0:
                    loss = dist + c * (-lead).clamp(min=0)
                    stay = loss <= 0.9999 * previous
                    previous = loss
                    if not stay.all():
                        allw[rows] = w
                        k = stay.nonzero().squeeze(1)
                        if not len(k):
                            break
                        here = here.take(k)
                        w = w[k]
                        m = m[k]
                        v = v[k]
                        c = c[k]
                        x0 = x0[k]
                        rows = rows[k]
                        previous = previous[k]
            else:
                allw[rows] = w
            high = torch.where(hit, torch.minimum(high, const), high)
            low = torch.where(hit, low, torch.maximum(low, const))
            const = torch.where(high < torch.inf, (low + high) / 2, const * self.factor)
        return best.images

"""LESS's feature maps and low-rank state: what stands for tokens that are held no longer.

    phi(q) = |gelu(gelu(q W1) W2)|
    psi(k) = |t + (t U3) * s2|,  t = |s1| * gelu(gelu(k U1) U2)

are non-negative. A state is the sums hs = sum_j psi(k_j) v_j^T and z = sum_j psi(k_j) over the
tokens j that are gone; phi(q) . psi(k_j) stands for exp(scale q . k_j), so that attention over held
tokens, of output o and log-sum l, becomes

    (phi(q) hs + e^l o) / (phi(q) z + e^l).

phi has weights a query head, psi a kv head; the query heads of a group read one state.

Invariants: a state is fp32 and sums in any order; a mass phi(q) z of zero leaves o as it is.

Shape letters: H query heads, G kv heads, D head dim, M hidden width, r rank, n tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import dropout, gelu


class Maps(NamedTuple):
    """The weights of one layer's feature maps, fp32."""

    q1: Tensor  # [H, D, M]
    q2: Tensor  # [H, M, r]
    k1: Tensor  # [G, D, M]
    k2: Tensor  # [G, M, r]
    k3: Tensor  # [G, r, r]
    inner: Tensor  # [G, 1, r]: s1
    outer: Tensor  # [G, 1, r]: s2

    def phi(self, q: Tensor, drop: float = 0.0) -> Tensor:
        """q [..., H, n, D] -> [..., H, n, r]; a share `drop` of the hidden units is left out."""
        return gelu(_thinned(gelu(q.float() @ self.q1), drop) @ self.q2).abs()

    def psi(self, k: Tensor, drop: float = 0.0) -> Tensor:
        """k [..., G, n, D] -> [..., G, n, r]."""
        hidden = _thinned(gelu(k.float() @ self.k1), drop)
        t = self.inner.abs() * gelu(hidden @ self.k2)
        return (t + (t @ self.k3) * self.outer).abs()


def _thinned(hidden: Tensor, drop: float) -> Tensor:
    """Hidden numbers [..., n, M] without a share of their units, the same for all n tokens."""
    if drop == 0:
        return hidden
    return hidden * dropout(torch.ones_like(hidden[..., :1, :]), drop)


class State(NamedTuple):
    """One row's sums: hs [G, r, D] and z [G, r]."""

    hs: Tensor
    z: Tensor

    @classmethod
    def of(cls, maps: Maps, k: Tensor, v: Tensor) -> State:
        """The state of tokens k, v [G, n, D]."""
        features = maps.psi(k)
        return cls(features.mT @ v.float(), features.sum(1))

    def plus(self, other: State) -> State:
        """The state of the tokens of both."""
        return State(self.hs + other.hs, self.z + other.z)

    def joined(self, features: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        """Attention over held tokens, out [H, D] and lse [H], with the state's: fp32 [H, D];
        `features` [H, r] are phi(q)."""
        by_group = features.view(self.z.shape[0], -1, features.shape[-1])  # [G, g, r]
        weighted = (by_group @ self.hs).view(out.shape)
        mass = (by_group @ self.z[..., None]).view(lse.shape)
        return joined(weighted, mass, out, lse)


def joined(weighted: Tensor, mass: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """(weighted + e^lse out) / (mass + e^lse), by logarithms: weighted and out [..., D]."""
    there = mass > 0
    some = torch.where(there, mass, torch.ones_like(mass))
    log_mass = some.log().masked_fill(~there, -torch.inf)
    total = torch.logaddexp(log_mass, lse)
    shares = (lse - total).exp(), (log_mass - total).exp()
    return shares[0][..., None] * out.float() + (shares[1] / some)[..., None] * weighted

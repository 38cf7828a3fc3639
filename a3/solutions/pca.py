"""Principal components of weights, with or without the metric of their input (PCA surgery).

After edwinhere/surgery, which names no paper. Convention y = x W, W (d, n), the transpose of a
torch weight: the samples of the PCA are the n columns of W (the rows of a torch weight), each a
vector over the d inputs, and their mean is one vector (d,). Matrices with the same input share
components if they are concatenated. A single matrix with more outputs than inputs is treated the
other way: its samples are the d rows of W, and its mean is one vector over the n outputs.

With the metric R = E[xᵀx], variance is that of the outputs: tr(W̃ᵀ R W̃) of the centred W̃ in place
of tr(W̃ᵀ W̃).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from a3.numerics.linalg import gram_factor, relative


@dataclass(frozen=True)
class PrincipalComponents:
    """Principal components of some matrices, and the matrices rebuilt from them.

    energy (c,) is the variance that each component explains. `parameters_each` counts the stored
    numbers of one component in all matrices, `parameters_mean` those of the mean.
    """

    energy: Tensor
    mean: Tensor
    parameters_each: int

    @property
    def parameters_mean(self) -> int:
        """Numbers in the mean."""
        return self.mean.numel()

    def rebuild(self, count: int) -> list[Tensor]:
        """The matrices (d, n) that the first `count` components and the mean make."""
        raise NotImplementedError

    @property
    def left(self) -> Tensor:
        """The share of the variance that 0, 1, 2 … components leave, (c + 1,).

        Summed from the smallest, so that very small remainders are exact too.
        """
        tail = self.energy.flip(0).cumsum(0).flip(0)
        return relative(torch.cat((tail, tail.new_zeros(1))), self.energy.sum())

    def count(self, left: float) -> int:
        """The fewest components that leave at most this share of the variance."""
        return int((self.left > left).sum())

    def parameters(self, count: int, mean: bool) -> int:
        """Numbers that are stored with so many components."""
        return count * self.parameters_each + self.parameters_mean * mean


@dataclass(frozen=True)
class OneInput(PrincipalComponents):
    """Of matrices that read one input: widths n of each, centred (d, Σn), basis (Σn, Σn)."""

    widths: list[int]
    centred: Tensor
    basis: Tensor

    def rebuild(self, count: int) -> list[Tensor]:
        """As a projection of the outputs: mean + W̃ V Vᵀ."""
        V = self.basis[:, :count]
        whole = self.mean + (self.centred @ V) @ V.mT
        return list(whole.split(self.widths, dim=1))


@dataclass(frozen=True)
class ManyInputs(PrincipalComponents):
    """Of matrices that read inputs of their own, by one encoder E (d, c).

    The decoder of matrix l is a least-squares fit in its own metric: with S_l E = Q_l U_l it is
    U_l⁻¹ P_l for the first components alike, P_l = Q_lᵀ S_l W̃_l (c, n). Pairs of U_l and P_l.
    """

    encoder: Tensor
    fits: list[tuple[Tensor, Tensor]]

    def rebuild(self, count: int) -> list[Tensor]:
        """mean + E U_l⁻¹ P_l of each matrix."""
        E = self.encoder[:, :count]
        return [
            self.mean + E @ torch.linalg.solve_triangular(U[:count, :count], P[:count], upper=True)
            for U, P in self.fits
        ]


def one_input(matrices: Sequence[Tensor], R: Tensor | None = None) -> OneInput:
    """Principal components of matrices W (d, n) that read one input, side by side; metric R (d, d).

    R^½ W̃ = U Σ Vᵀ gives the components, and W̃ V_r V_rᵀ is what they make: V is had from
    W̃ᵀ R W̃ (n, n), so that no root or inverse of R is needed, and R may be singular.
    """
    W = torch.cat(list(matrices), 1)
    d, n = W.shape
    rows = len(matrices) == 1 and n > d
    mean = W.mean(0 if rows else 1, keepdim=True)
    centred = W - mean
    M = centred.mT @ (centred if R is None else R @ centred)
    values, V = torch.linalg.eigh((M + M.mT) / 2)
    return OneInput(
        energy=values.flip(0).clamp(min=0),
        mean=mean,
        parameters_each=d + n,
        widths=[each.shape[1] for each in matrices],
        centred=centred,
        basis=V.flip(1),
    )


def many_inputs(matrices: Sequence[Tensor], R: Sequence[Tensor] | None = None) -> ManyInputs:
    """Principal components shared by W_l (d, n) that read inputs of their own, of metrics R_l.

    Without metrics it is the PCA of all columns together. With them no closed form is known that is
    best for all inputs at once: the components are those in the mean metric, E = F⁻¹ U of
    F W̃ = U Σ Vᵀ with FᵀF the mean of R, and each matrix has its best decoder in its own metric,
    which also says what the components explain of it.
    """
    together = torch.cat(list(matrices), 1)
    d, n = together.shape
    mean = together.mean(1, keepdim=True)
    one = torch.eye(d, dtype=together.dtype)
    roots = [one] * len(matrices) if R is None else [gram_factor(each)[0] for each in R]
    F, inverse = (one, one) if R is None else gram_factor(torch.stack(list(R)).mean(0))
    seen = F @ (together - mean)
    M = seen @ seen.mT
    encoder = inverse @ torch.linalg.eigh((M + M.mT) / 2).eigenvectors.flip(1)
    fits = []
    for W, S in zip(matrices, roots, strict=True):
        Q, U = torch.linalg.qr(S @ encoder)
        fits.append((U, Q.mT @ (S @ (W - mean))))
    energy = torch.stack([P.square().sum(1) for _, P in fits]).sum(0)
    return ManyInputs(energy, mean, d + n, encoder, fits)


def affordable(found: Sequence[PrincipalComponents], budget: float, mean: bool) -> float | None:
    """The smallest share of variance that all sets can leave if `budget` numbers are stored.

    None if one component of each does not fit beside the means.
    """
    shares = sorted({left for each in found for left in each.left[1:].tolist()}, reverse=True)
    low, high = 0, len(shares)
    while low < high:
        middle = (low + high) // 2
        stored = sum(each.parameters(each.count(shares[middle]), mean) for each in found)
        low, high = (middle + 1, high) if stored <= budget else (low, middle)
    return shares[low - 1] if low else None

"""Likelihoods of a network's outputs, whose Fisher information takes the Hessian's place in z.

Where a loss is a weighted sum of negative log-likelihoods of independent terms, each of its own
part z_n of the outputs,

    L(θ) = Σ_n c_n ℓ_n,      ℓ_n = −log p(y_n | z_n),      u_n(y) = ∂ℓ_n/∂z_n at the label y,

its Fisher information matrix is, with J_n = ∂z_n/∂θ,

    exact           F = Σ_n c_n J_nᵀ E_{y~p(·|z_n)}[u_n(y) u_n(y)ᵀ] J_n
    monte_carlo     the expectation as a mean over labels sampled from p(·|z_n)
    empirical       u_n(y_n) u_n(y_n)ᵀ at the given labels, without an expectation

For the likelihoods here the expectation has a closed form that no label enters, and it is the
Hessian ∇²ℓ_n, so that the exact Fisher is the generalised Gauss-Newton matrix (Martens, New
insights and perspectives on the natural gradient method, JMLR 2020, section 9). It costs no more
than the other two. The empirical Fisher is no approximation of it in general (Kunstner, Balles and
Hennig, Limitations of the empirical Fisher approximation, NeurIPS 2019).

**What a term is.** Categorical: a row of logits along the class dimension, which is the second
one as in ``F.cross_entropy``, so that each position of a sequence or image is a term. The others:
an example, all entries along the first dimension's index together, which are independent given z.
The convention matters to the empirical and the sampled Fisher only. curvlinops has the same, except
that outputs of three dimensions and more have a term for each index but the last.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

FisherKind = Literal["exact", "monte_carlo", "empirical"]
SlopeKind = Literal["monte_carlo", "empirical"]


class NoLikelihoodError(ValueError):
    """Raised where a loss is not the negative log-likelihood that a Fisher matrix needs."""


@dataclass(frozen=True)
class MonteCarlo:
    """How labels are sampled for a Fisher matrix: how many a term, and from which seed.

    The same seed gives the same labels, for all products at one point and in every process; no
    other random numbers are touched. Ranks of a process group draw different labels.

    Raises:
        ValueError: If ``num_samples`` is no positive integer.

    Examples:
        >>> MonteCarlo(num_samples=4)
        MonteCarlo(num_samples=4, seed=0)
    """

    num_samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_num_samples(self.num_samples)

    def generator(self) -> torch.Generator:
        """A new generator on the CPU, so that labels are the same whatever the device."""
        has_ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank = torch.distributed.get_rank() if has_ranks else 0
        return torch.Generator().manual_seed(self.seed + 1_000_003 * rank)


def check_num_samples(num_samples: object) -> None:
    """Lets positive integers pass; raises ValueError for anything else."""
    if not isinstance(num_samples, int) or isinstance(num_samples, bool) or num_samples < 1:
        raise ValueError(f"num_samples={num_samples!r}; expected a positive integer.")


class Likelihood(ABC):
    """p(y | z) of labels y, given a network's outputs z in float32 or wider."""

    @abstractmethod
    def information(self, z: Tensor, u: Tensor) -> Tensor:
        """E_{y~p(·|z)}[∇ℓ ∇ℓᵀ] u = ∇²ℓ u, block by block of the terms; of the shape of ``z``."""

    @abstractmethod
    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        """∇_z (−log p(y | z)), of the shape of ``z``."""

    @abstractmethod
    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Labels from p(· | z); drawn on the generator's device, by default on the CPU."""

    def dims(self, z: Tensor) -> tuple[int, ...]:
        """The dimensions of one term, counted from the last: all but the first one."""
        return tuple(range(1 - z.dim(), 0))


class Categorical(Likelihood):
    """Logits of classes along the second dimension (the only one, where there is one).

    Labels are class indices, of z's shape without the class dimension, or probabilities of z's
    shape.
    """

    def information(self, z: Tensor, u: Tensor) -> Tensor:
        """(diag(p) − p pᵀ) u."""
        (dim,) = self.dims(z)
        p = z.softmax(dim)
        pu = p * u
        return pu - p * pu.sum(dim, keepdim=True)

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        """p − y, y one-hot where given as class indices."""
        (dim,) = self.dims(z)
        p = z.softmax(dim)
        if y.is_floating_point():
            return p - y
        y = y.unsqueeze(dim)
        return p.scatter_add(dim, y, p.new_full((), -1.0).expand(y.shape))

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Class indices, by the inverse of the distribution function."""
        (dim,) = self.dims(z)
        below = z.softmax(dim).movedim(dim, -1).cumsum(-1)
        shares = _uniform(below[..., :1], generator) * below[..., -1:]
        index = torch.searchsorted(below.contiguous(), shares, right=True)
        return index.squeeze(-1).clamp(max=z.shape[dim] - 1)

    def dims(self, z: Tensor) -> tuple[int, ...]:
        """The class dimension; raises ValueError where there is none."""
        if z.dim() == 0:
            raise ValueError("The output has no dimensions; expected logits of several classes.")
        return (1 - z.dim() if z.dim() > 1 else -1,)


class Bernoulli(Likelihood):
    """Logits of independent binary labels; labels lie in [0, 1]."""

    def information(self, z: Tensor, u: Tensor) -> Tensor:
        """σ(z) (1 − σ(z)) u."""
        return z.sigmoid() * (-z).sigmoid() * u

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        """σ(z) − y."""
        return z.sigmoid() - y

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Zeros and ones."""
        return (_uniform(z, generator) < z.sigmoid()).to(z.dtype)


@dataclass(frozen=True)
class Gaussian(Likelihood):
    """Means of independent normal labels; with variance ½, −log p is (z − y)² and a constant.

    Raises:
        ValueError: If ``variance`` is not positive.
    """

    variance: float = 0.5

    def __post_init__(self) -> None:
        if not self.variance > 0:
            raise ValueError(f"variance={self.variance!r}; expected a positive number.")

    def information(self, z: Tensor, u: Tensor) -> Tensor:
        """u / variance."""
        return u / self.variance

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        """(z − y) / variance."""
        return (z - y) / self.variance

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """z and normal noise."""
        device = _device(generator)
        noise = torch.randn(z.shape, generator=generator, device=device, dtype=z.dtype)
        return z + self.variance**0.5 * noise.to(z.device)


class Poisson(Likelihood):
    """Logarithms of the rates of independent counts."""

    def information(self, z: Tensor, u: Tensor) -> Tensor:
        """exp(z) u."""
        return z.exp() * u

    def gradient(self, z: Tensor, y: Tensor) -> Tensor:
        """exp(z) − y."""
        return z.exp() - y

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Counts."""
        return torch.poisson(z.exp().to(_device(generator)), generator=generator).to(z.device)


@dataclass(frozen=True)
class Terms:
    """The terms of a loss Σ_n c_n (−log p(y_n | z_n)).

    Attributes:
        likelihood: p(y | z).
        outputs: z.
        targets: y, as the likelihood takes them; None where they are not needed.
        weights: c, broadcast to z: of the whole loss as it stands, 1/N for a mean over N terms.
            Where it differs within a term, each entry of u enters by its √c, so that the sampled
            Fisher keeps the exact one as its expectation.
    """

    likelihood: Likelihood
    outputs: Tensor
    targets: Tensor | None
    weights: Tensor

    def fisher(
        self,
        kind: FisherKind,
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Callable[[Tensor], Tensor]:
        """u ↦ the Fisher in z times u, of the shape of z; labels are sampled here, once."""
        likelihood, z, weights = self.likelihood, wide(self.outputs), wide(self.weights)
        if kind == "exact":
            return lambda u: (weights * likelihood.information(z, wide(u))).to(u.dtype)
        slopes = self.slopes(kind, num_samples=num_samples, generator=generator)
        dims = likelihood.dims(z)

        def product(u: Tensor) -> Tensor:
            along = slopes * wide(u)
            along = along.sum(dims, keepdim=True) if dims else along
            return (slopes * along).mean(0).to(u.dtype)

        return product

    def slopes(
        self,
        kind: SlopeKind,
        *,
        num_samples: int = 1,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """√c_n ∂ℓ_n/∂z_n, of shape (num_samples, *z.shape), in float32 or wider.

        The mean over the samples of their outer products, term by term, is the Fisher in z. At
        the given labels there is one sample.

        Raises:
            ValueError: for "empirical" without targets.
        """
        likelihood, z = self.likelihood, wide(self.outputs)
        if kind == "monte_carlo":
            labels = [likelihood.sample(z.detach(), generator) for _ in range(num_samples)]
        else:
            if self.targets is None:
                raise ValueError("The empirical Fisher needs the labels: pass targets=...")
            labels = [self.targets]
        slopes = torch.stack([likelihood.gradient(z, y) for y in labels])
        return slopes * wide(self.weights).sqrt()


def wide(x: Tensor) -> Tensor:
    """``x`` in float32 or wider."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = _device(generator)
    draws = torch.rand(like.shape, generator=generator, device=device, dtype=like.dtype)
    return draws.to(like.device)

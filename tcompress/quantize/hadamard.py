"""Hadamard matrices, and the orthogonal matrices made of them that spread outliers over all channels."""

from __future__ import annotations

import torch

from tcompress.errors import message


def hadamard(n: int) -> torch.Tensor | None:
    """A Hadamard matrix of order n, or None where no construction here gives one.

    Its elements are ±1 and H Hᵀ = n I. For n = 2^k m it is the Kronecker product of Sylvester's matrix of order 2^k
    with one of order m, by Paley (1933), where q is a prime::

        m = 1
        m = q + 1,      q ≡ 3 mod 4     H = I + S,  S = [[0, 1ᵀ], [-1, Q]]                  12, 20, 44, 60, …
        m = 2 (q + 1),  q ≡ 1 mod 4     S ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]]     28, 36, 76, …
                                        with S = [[0, 1ᵀ], [1, Q]]

    and Q [q, q] the Jacobsthal matrix, Q_ij = (i - j | q). The smallest m that fits is taken.

    Returns:
        float32 [n, n].
    """
    power = 1
    found = None
    while n >= 1 and n % power == 0:
        base = _paley(n // power)
        if base is not None:
            found = (power, base)  # the last is the smallest m
        power *= 2
    if found is None:
        return None
    power, matrix = found
    while power > 1:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        power //= 2
    return matrix


def randomized_hadamard(n: int, seed: int = 0) -> tuple[torch.Tensor, str]:
    """An orthogonal matrix that makes all channels about equally large: D H / √n, with random signs D; Ashkboos et al.,
    "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", arXiv 2404.00456, section 3 and 4, stage 1a.

    Where no Hadamard matrix of order n is known here, a random orthogonal one (the Q of a Gaussian matrix's QR), as in
    SpinQuant, arXiv 2405.16406, section 3.1, which spreads a little less evenly.

    Returns:
        float64 [n, n], and what it is, in words.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(message("randomized_hadamard", "n", n, "at least 1"))
    generator = torch.Generator().manual_seed(seed)
    matrix = hadamard(n)
    if matrix is None:
        return _random_orthogonal(n, generator), "random orthogonal matrix"
    signs = torch.randint(0, 2, (n, 1), generator=generator) * 2.0 - 1
    return (matrix.double() * signs) / n**0.5, "randomized Hadamard matrix"


def mean_preserving(n: int, seed: int = 0) -> torch.Tensor:
    """A random orthogonal matrix Q with Q 1 = 1 and 1ᵀ Q = 1ᵀ, so that x Q has the mean and the variance of x.

    Fᵀ [[1, 0], [0, O]] F, where the first row of the orthogonal F is 1ᵀ / √n and O [n - 1, n - 1] is random orthogonal.

    Returns:
        float64 [n, n].

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(message("mean_preserving", "n", n, "at least 1"))
    # Householder's reflection of the first unit vector to 1 / √n.
    v = torch.full((n,), n**-0.5, dtype=torch.float64)
    v[0] -= 1
    frame = torch.eye(n, dtype=torch.float64)
    if n > 1:
        frame -= 2 * torch.outer(v, v) / v.dot(v)
    inner = torch.eye(n, dtype=torch.float64)
    inner[1:, 1:] = _random_orthogonal(n - 1, torch.Generator().manual_seed(seed))
    return frame.T @ inner @ frame


def _random_orthogonal(n: int, generator: torch.Generator) -> torch.Tensor:
    """Uniformly distributed: the Q of a Gaussian matrix's QR with a positive diagonal of R."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def _paley(m: int) -> torch.Tensor | None:
    if m == 1:
        return torch.ones(1, 1)
    if m % 4 == 0 and _is_prime(m - 1):
        s = _bordered(m - 1, -1.0)
        return s + torch.eye(m)
    if m % 4 == 0 and _is_prime(m // 2 - 1) and (m // 2 - 1) % 4 == 1:
        s = _bordered(m // 2 - 1, 1.0)
        two, diagonal = torch.tensor([[1.0, 1], [1, -1]]), torch.tensor([[1.0, -1], [-1, -1]])
        return torch.kron(s, two) + torch.kron(torch.eye(m // 2), diagonal)
    return None


def _bordered(q: int, sign: float) -> torch.Tensor:
    """[[0, 1ᵀ], [sign 1, Q]] with the Jacobsthal matrix Q of a prime q."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)])
    indices = torch.arange(q)
    s = torch.zeros(q + 1, q + 1)
    s[0, 1:], s[1:, 0] = 1, sign
    s[1:, 1:] = character[(indices[:, None] - indices) % q]
    return s


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % i for i in range(2, int(n**0.5) + 1))

"""A language model in small, whose entropy at every layer and position is known: the truth for section 3.2.

Tokens of a Markov process are embedded, and a layer holds, at each position, the sum of the last tokens' embeddings,
each turned by a random rotation once for every token since. So the entropy of a layer rises with the position and
saturates where its window is full, as the paper has it of language models; a deeper layer has a longer window.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bae_lens.functional.losses import marginal_entropy


@dataclass(frozen=True)
class SyntheticModel:
    """State at position t: `sum over lags l < min(t, window) of R^l embedding[token(t - l)]`, positions from 1.

    Sums of different tokens differ, for embeddings and rotation in general position, so a state has the entropy of the
    tokens in its window.
    """

    words: Float[Tensor, "n_tokens n_bits"]
    """0 or 1: the binary code of the tokens, of which the embeddings are a linear function."""
    embeddings: Float[Tensor, "n_tokens d"]
    """What a token adds to the states."""
    rotation: Float[Tensor, "d d"]
    """Orthogonal: turns what a state holds of a token at each further token."""
    transition: Float[Tensor, "n_tokens n_tokens"]
    """Probabilities of the next token, by rows; columns add up to 1 too, so that every token is as frequent."""
    windows: tuple[int, ...]
    """Tokens that a layer sees, itself included, one number a layer."""

    def tokens(self, n: int, length: int, generator: torch.Generator) -> Int[Tensor, "n length"]:
        """N sequences, each begun at a token drawn from all."""
        drawn = [torch.randint(len(self.words), (n,), generator=generator)]
        for _ in range(length - 1):
            drawn.append(torch.multinomial(self.transition[drawn[-1]], 1, generator=generator)[:, 0])
        return torch.stack(drawn, 1)

    def states(self, tokens: Int[Tensor, "n length"], layer: int, position: int) -> Float[Tensor, "n d"]:
        """Of one layer, after `position` tokens.

        Raises ValueError for a layer that there is not, a position below 1 and one beyond the tokens.
        """
        seen = self._seen(layer, position)
        if position > tokens.shape[1]:
            raise ValueError(f"position must be at most the {tokens.shape[1]} tokens, got {position}")
        state = torch.zeros(len(tokens), self.embeddings.shape[1], dtype=self.embeddings.dtype)
        for column in range(position - seen, position):
            state = state @ self.rotation.T + self.embeddings[tokens[:, column]]
        return state

    def joint_bits(self, layer: int, position: int) -> float:
        """Entropy of a state: that of a token, and for each further one in the window what it adds, given the last.

        Raises ValueError for a layer that there is not and a position below 1.
        """
        rows = self.transition.double()
        rate = -torch.special.xlogy(rows, rows).sum(1).mean().item() / torch.log(torch.tensor(2.0)).item()
        first = torch.tensor(float(len(self.words)), dtype=torch.float64).log2().item()
        return first + (self._seen(layer, position) - 1) * rate

    def marginal_bits(self, layer: int, position: int) -> float:
        """What the bits of the tokens' words take one by one: a code that finds them exactly counts so many.

        Raises ValueError for a layer that there is not and a position below 1.
        """
        return self._seen(layer, position) * marginal_entropy(self.words.double().mean(0)).item()

    def _seen(self, layer: int, position: int) -> int:
        if not (0 <= layer < len(self.windows) and position >= 1):
            raise ValueError(
                f"layers are 0 to {len(self.windows) - 1} and positions start at 1, got {layer} and {position}"
            )
        return min(position, self.windows[layer])


def bit_model(
    n_bits: int, d: int, windows: Sequence[int], generator: torch.Generator, flip: float = 0.5
) -> SyntheticModel:
    """Tokens are words of bits, a random direction each; a bit is that of the token before, but for a share of `flip`.

    At flip 1/2 tokens are independent, and a window of w tokens has `w n_bits` bits, marginal and joint; else it has
    `n_bits (1 + (w - 1) h(flip))` jointly.

    Raises ValueError for a flip outside [0, 1], fewer than 1 bit, no windows and a window below 1 token.
    """
    if not 0 <= flip <= 1:
        raise ValueError(f"flip must lie in [0, 1], got {flip}")
    _check(n_bits, "n_bits", 1, windows)
    numbers = torch.arange(2**n_bits)
    words = (numbers[:, None] >> torch.arange(n_bits)) & 1
    turned = (words[:, None] != words[None]).sum(-1)
    transition = flip**turned * (1 - flip) ** (n_bits - turned)
    return SyntheticModel(
        words.float(),
        words.float() @ _unit_rows(n_bits, d, generator),
        _rotation(d, generator),
        transition.double(),
        tuple(windows),
    )


def random_embedding_model(
    n_tokens: int, d: int, windows: Sequence[int], generator: torch.Generator, repeat: float = 0.0
) -> SyntheticModel:
    """Tokens have random embeddings; with probability `repeat` a token is the one before, else drawn from all.

    No code of few bits is linear in such embeddings, so each token takes a bit of its own: `n_tokens h(1 / n_tokens)`
    marginal bits for the `log2 n_tokens` that it has. For many tokens that is `log2 e = 1.44` bits too many for each in
    the window, and pairs of features share next to nothing of it.

    Raises ValueError for a `repeat` outside [0, 1], fewer than 2 tokens, no windows and a window below 1 token.
    """
    if not 0 <= repeat <= 1:
        raise ValueError(f"repeat must lie in [0, 1], got {repeat}")
    _check(n_tokens, "n_tokens", 2, windows)
    transition = (1 - repeat) / n_tokens + repeat * torch.eye(n_tokens, dtype=torch.float64)
    return SyntheticModel(
        torch.eye(n_tokens),
        _unit_rows(n_tokens, d, generator),
        _rotation(d, generator),
        transition,
        tuple(windows),
    )


def _check(size: int, name: str, least: int, windows: Sequence[int]) -> None:
    if size < least:
        raise ValueError(f"{name} must be at least {least}, got {size}")
    if not windows or min(windows) < 1:
        raise ValueError(f"each layer's window must be at least 1 token, got {list(windows)}")


def _unit_rows(n: int, d: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
    return torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1)


def _rotation(d: int, generator: torch.Generator) -> Float[Tensor, "d d"]:
    return torch.linalg.qr(torch.randn(d, d, generator=generator))[0]

"""Document lengths as somebody describes them, and rows packed with such documents.

For planning: no tokens are read. Rows are packed as `megakda.data.packing` packs a corpus.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megakda.data.packing import pack_epochs
from megakda.errors import ConfigError

FORMS = "whole, fixed:N, lognormal:mean=N,sigma=S or file:PATH"

WINDOW_ROWS = 256
"""Documents for at least so many rows are packed together where lengths are drawn at random, as in
a corpus: best fit needs a choice."""

MOST_DOCUMENTS = 1 << 20
"""Drawn at random; where they do not fill all rows they come again in another order."""


@dataclass(frozen=True)
class DocumentLengths:
    """What `--lengths` says.

    Attributes:
        kind: "whole", "fixed", "lognormal" or "file".
        mean: tokens of a document in the mean; 0 for "whole".
        sigma: of the logarithm of "lognormal".
        values: tokens of each document in "file".
    """

    kind: str
    mean: float = 0.0
    sigma: float = 0.0
    values: tuple[int, ...] = ()

    def __str__(self) -> str:
        return {
            "whole": "one document in every row",
            "fixed": f"documents of {self.mean:,.0f} tokens",
            "lognormal": f"documents of {self.mean:,.0f} tokens in the mean, log-normal with sigma "
            f"{self.sigma:g}",
            "file": f"{len(self.values):,} documents of {self.mean:,.0f} tokens in the mean",
        }[self.kind]

    def draw(self, count: int, random: np.random.RandomState) -> np.ndarray:
        """`count` lengths, int64, each at least 2; of "file" all its lengths."""
        if self.kind == "file":
            return np.array(self.values, np.int64)
        if self.kind == "fixed":
            return np.full(count, self.mean, np.int64)
        # The mean of a log-normal distribution is exp(mu + sigma^2 / 2).
        mu = np.log(self.mean) - self.sigma**2 / 2
        return np.maximum(np.rint(random.lognormal(mu, self.sigma, count)), 2).astype(np.int64)


def parse_lengths(text: str) -> DocumentLengths:
    """Reads `whole`, `fixed:N`, `lognormal:mean=N,sigma=S` or `file:PATH`, one length per line.

    Raises:
        ConfigError: something else, a length below 2 tokens, or a file that cannot be read.
    """
    kind, _, rest = text.partition(":")
    try:
        if kind == "whole" and not rest:
            return DocumentLengths("whole")
        if kind == "fixed":
            return _checked(DocumentLengths("fixed", mean=int(rest)), text)
        if kind == "lognormal":
            named = dict(part.split("=") for part in rest.split(","))
            if named.keys() == {"mean", "sigma"}:
                mean, sigma = float(named["mean"]), float(named["sigma"])
                return _checked(DocumentLengths("lognormal", mean, sigma), text)
        if kind == "file":
            values = tuple(int(line) for line in Path(rest).read_text().split())
            mean = sum(values) / max(len(values), 1)
            return _checked(DocumentLengths("file", mean=mean, values=values), text)
    except OSError as error:
        raise ConfigError(
            f"lengths={text}: {rest} cannot be read ({error.strerror}): name a file with one "
            "length in tokens per line"
        ) from None
    except ConfigError:
        raise
    except ValueError:
        pass
    raise ConfigError(f"lengths={text}: must be {FORMS}, with lengths in tokens")


def _checked(lengths: DocumentLengths, text: str) -> DocumentLengths:
    shortest = min(lengths.values, default=0) if lengths.kind == "file" else lengths.mean
    if not 2 <= shortest < 2**31 or not 0 <= lengths.sigma < 10:
        raise ConfigError(
            f"lengths={text}: a document needs 2 tokens or more to predict one, and a sigma is 0 "
            f"to 10: use {FORMS} with such numbers"
        )
    return lengths


def sample_rows(
    lengths: DocumentLengths, rows: int, context: int, packing: str, overlong: str, seed: int
) -> list[tuple[int, ...]]:
    """Rows packed with documents of such lengths, as the data loader packs them.

    A document of n tokens takes n - 1 positions, and what is left of a row is one document more:
    padding.

    Args:
        rows: how many.
        context: positions of a row.
        packing, overlong: as in `data.packing` ("documents" or "best_fit") and `data.overlong`.
        seed: of lengths and order.

    Returns:
        For each row the bounds of its documents, rising from 0 to `context`.
    """
    if lengths.kind == "whole":
        return [(0, context)] * rows
    random = np.random.RandomState([seed, rows])
    wanted = int(max(rows, WINDOW_ROWS) * context / lengths.mean) + 1
    tokens = lengths.draw(min(wanted, MOST_DOCUMENTS), random)
    packed = pack_epochs(
        tokens, np.arange(len(tokens)), context, packing, overlong, seed % 2**32, rows
    )
    found = []
    for first, last in zip(packed.starts[:-1], packed.starts[1:], strict=True):
        ends = np.cumsum(packed.pieces[first:last, 2]).tolist()
        found.append((0, *ends) if ends[-1] == context else (0, *ends, context))
    return found

"""How benchmarks show what they found: a median with its spread, a ratio by rounds, and tables in Markdown."""

import math
import statistics
from collections.abc import Sequence

from lilpipe.metrics.pass_at_k import Estimate, mean_estimate


def spread(values: Sequence[float], *, digits: int = 0) -> str:
    """The median, the least and the most."""
    middle, least, most = (f"{value:,.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least}–{most})"


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> str:
    """The median, least and most of the ratios round by round: those of a round met the same load."""
    values = [above / below for above, below in zip(numerators, denominators, strict=True)]
    return f"{statistics.median(values):.2f} × ({min(values):.2f}–{max(values):.2f})"


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up in a terminal too; all but the first are set to the right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    rules = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [f"| {' | '.join(_cells(row, widths))} |" for row in (titles, rules, *rows)]
    return "\n".join(lines)


def _cells(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [
        text.rjust(width) if number else text.ljust(width)
        for number, (text, width) in enumerate(zip(row, widths, strict=True))
    ]


def over_seeds(differences: Sequence[Estimate]) -> Estimate:
    """Mean of the differences of several seeds; ``n`` counts seeds.

    Its error is the larger of that over seeds and that over prompts: few seeds may agree by chance. Between seeds the
    prompts' errors are taken to be independent.
    """
    seeds = mean_estimate([difference.value for difference in differences])
    prompts = math.sqrt(math.fsum(difference.stderr**2 for difference in differences)) / len(differences)
    return Estimate(seeds.value, max(seeds.stderr, prompts), seeds.n)

"""Command line: `python -m paper_figures` draws every figure from results/verification.json."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from paper_figures import data, overview, recorded, style, synthetic, table_one

FIGURES: dict[str, Callable[[data.Results], Figure]] = {
    "overview": overview.overview,
    "spread_synthetic": synthetic.spread_and_drift,
    "spread_recorded": recorded.spread_and_drift,
    "bias_variance": table_one.bias_and_variance,
    "exact_sampled": synthetic.exact_against_sampled,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw what the result file has the numbers for.

    Returns:
        0 if at least one figure was drawn and no part of the file is malformed, 1 if not, 2 if there is no such file
        or it cannot be read.
    """
    parser = argparse.ArgumentParser(prog="python -m paper_figures", description="Draw figures from result files.")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder with verification.json")
    parser.add_argument("--output", type=Path, help="folder for the figures (default: figures in the results)")
    options = parser.parse_args(arguments)
    folder = options.output or options.results / "figures"
    try:
        results = data.load(options.results)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    drawn = malformed = 0
    with style.styled():
        for name, draw in FIGURES.items():
            try:
                figure = draw(results)
            except data.MissingError as error:
                print(f"{name}: not drawn, {error}", file=sys.stderr)
                continue
            except ValueError as error:
                print(f"{name}: not drawn, {data.FILE} is malformed: {error}", file=sys.stderr)
                malformed += 1
                continue
            print(*style.save(figure, folder, name), sep="\n")
            drawn += 1
    if not drawn:
        print(f"{parser.prog}: no figure drawn; `{data.VERIFY}` writes all that is needed", file=sys.stderr)
    return 0 if drawn and not malformed else 1


if __name__ == "__main__":
    sys.exit(main())

"""Command line: `python -m paper_figures` draws every figure from results/verification.json and the studies."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from paper_figures import data, overview, phase, recorded, style, synthetic, table_one, training, which_ratio

FIGURES: dict[str, Callable[[data.Results], Figure]] = {
    "overview": overview.overview,
    "spread_synthetic": synthetic.spread_and_drift,
    "spread_recorded": recorded.spread_and_drift,
    "bias_variance": table_one.bias_and_variance,
    "exact_sampled": synthetic.exact_against_sampled,
}
#: Figures of the longer studies, each from results/<name>.json if it is there.
STUDIES: dict[str, Callable[[data.Results], Figure]] = {
    "phase": phase.phase,
    "training": training.training,
    "grid": which_ratio.which_ratio,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw what the result file has the numbers for.

    Returns:
        0 if at least one figure was drawn and no part of a file is malformed, 1 if not, 2 if there is no result file
        or none can be read.
    """
    parser = argparse.ArgumentParser(prog="python -m paper_figures", description="Draw figures from result files.")
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder with verification.json")
    parser.add_argument("--output", type=Path, help="folder for the figures (default: figures in the results)")
    options = parser.parse_args(arguments)
    folder = options.output or options.results / "figures"
    files = {data.FILE: (data.VERIFY, FIGURES)}
    for name, draw in STUDIES.items():
        if (options.results / f"{name}.json").is_file():
            files[f"{name}.json"] = (f"python -m simulations run {name}", {name: draw})
    loaded: dict[str, data.Results] = {}
    drawn = malformed = 0
    for file, (command, _) in files.items():
        try:
            loaded[file] = data.load(options.results, file, command)
        except (OSError, ValueError) as error:
            print(f"{parser.prog}: {error}", file=sys.stderr)
            malformed += not isinstance(error, FileNotFoundError)
    if not loaded:
        return 2
    with style.styled():
        wanted = [(file, *named) for file, (_, figures) in files.items() if file in loaded for named in figures.items()]
        for source, name, draw in wanted:
            try:
                figure = draw(loaded[source])
            except data.MissingError as error:
                print(f"{name}: not drawn, {error}", file=sys.stderr)
                continue
            except ValueError as error:
                print(f"{name}: not drawn, {source} is malformed: {error}", file=sys.stderr)
                malformed += 1
                continue
            print(*style.save(figure, folder, name), sep="\n")
            drawn += 1
    if not drawn:
        print(f"{parser.prog}: no figure drawn; `{data.VERIFY}` writes all that is needed", file=sys.stderr)
    return 0 if drawn and not malformed else 1


if __name__ == "__main__":
    sys.exit(main())

"""Carry out the derivations, check every step, print them: `python -m proofs.symbolic [NAME ...]`."""

from __future__ import annotations

import argparse
import sys

from proofs.symbolic import CLAIMS, DERIVATIONS


def main(arguments: list[str] | None = None) -> int:
    """Print the named derivations, or all; 0 if SymPy confirms every step, else 1."""
    parser = argparse.ArgumentParser(prog="python -m proofs.symbolic", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="derivations to print; all if none is given")
    parser.add_argument("--list", action="store_true", help="only list the names and the claims that they are about")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in DERIVATIONS]
    if unknown:
        parser.error(f"no derivation named {', '.join(unknown)}; there are {', '.join(DERIVATIONS)}")
    names = options.names or list(DERIVATIONS)
    if options.list:
        for name in names:
            print(f"{name:32}{', '.join(CLAIMS[name])}")
        return 0
    failures = []
    for name in names:
        derivation = DERIVATIONS[name]()
        print("\n".join(derivation.lines()) + "\n")
        failures += derivation.failures()
    for failure in failures:
        print(failure, file=sys.stderr)
    confirmed = f"{len(failures)} steps not confirmed" if failures else "every step confirmed"
    print(f"{len(names)} derivations, {confirmed}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

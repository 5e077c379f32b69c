"""The launchers of torch and Accelerate, which end with one line rather than with a traceback of their own."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(launcher: str, words: Sequence[str]) -> int:
    """Launch processes and wait for them.

    Args:
        launcher: "torch" or "accelerate".
        words: What follows `torchrun` or `accelerate launch`.

    Returns:
        0, or 1 after a line about the process that failed first.
    """
    # They tell at length, and before the tracebacks of the processes, what the line says.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    try:
        if launcher == "torch":
            from torch.distributed.run import main as launch

            launch(list(words))
        else:
            from accelerate.commands.launch import launch_command, launch_command_parser

            launch_command(launch_command_parser().parse_args(list(words)))
    except ChildFailedError as error:
        print(_what_failed(error), file=sys.stderr, flush=True)
        return 1
    return 0


def _what_failed(error: ChildFailedError) -> str:
    # Who is killed takes the others along, whose errors are of the connection; torch itself ends those by SIGTERM.
    killed = [failure for failure in error.failures.values() if failure.exitcode < 0 and failure.exitcode != -15]
    rank, first = error.get_first_failure()
    if killed:
        first = killed[0]
        rank = next(number for number, failure in error.failures.items() if failure is first)
        how = f"was killed by {first.signal_name()}"
        after = "errors of a connection above are of the others; the same command goes on from the last checkpoint"
    else:
        how = f"ended with status {first.exitcode}"
        after = "see above"
    return f"ctpo train: process {rank} {how}; {after}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))

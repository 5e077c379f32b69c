"""`python -m benchmarks`: measure the speeds that the README states, print them beside the goals.

Times are the best of a few repeats in one process, which noise can only make larger; the growth with the horizon is
the slope of log time on log horizon. Nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import ctpo
from simulations import results, tables
from simulations.exact import gradient_moments, ratio_moments
from simulations.mdp import World, random_chain
from simulations.monte_carlo import RatioByPosition, estimate

HORIZONS = (1024, 2048, 4096, 8192)
STATES, ACTIONS = 64, 32


def best(function: Callable[[], Any], repeats: int = 3) -> float:
    """Shortest wall time of some repeats, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def large_world(horizon: int, *, deterministic: bool = True) -> World:
    """64 states and 32 actions; a small step, so that second moments stay in range at 8192 tokens."""
    rng = np.random.default_rng(0)
    return random_chain(
        rng, n_states=STATES, n_actions=ACTIONS, horizon=horizon, deterministic=deterministic, step=0.03
    )


def scaling(name: str, goal: str, run: Callable[[World], Any], world: Callable[[int], World]) -> dict[str, Any]:
    """Time at the largest horizon and growth with the horizon."""
    times = []
    for horizon in HORIZONS:
        here = world(horizon)
        times.append(best(lambda here=here: run(here), 2))  # type: ignore[misc]
    slope = float(np.polyfit(np.log(HORIZONS), np.log(times), 1)[0])
    return {"what": name, "goal": goal, "measured": f"{times[-1]:.2f} s", "growth in H": f"H^{slope:.2f}"}


def exact_engines() -> list[dict[str, Any]]:
    """Dynamic programming at H = 8192."""
    moments, gradient = "moments of rho_t and log rho_t, all t", "mean and total variance of the summed gradient"
    return [
        scaling(f"{moments}, H=8192 S=64 A=32", "< 1 s", ratio_moments, large_world),
        scaling(
            f"{moments}, stochastic transitions",
            "< 1 s",
            ratio_moments,
            lambda horizon: large_world(horizon, deterministic=False),
        ),
        scaling(
            f"{gradient}, one shared logit block",
            "< 10 s",
            lambda world: gradient_moments(world, "cumulative"),
            lambda horizon: large_world(horizon).with_parameters("shared"),
        ),
        scaling(
            f"{gradient}, logits per state (2048 parameters)",
            "< 10 s",
            lambda world: gradient_moments(world, "cumulative"),
            large_world,
        ),
        scaling(
            f"{gradient}, per state, stochastic transitions",
            "< 10 s",
            lambda world: gradient_moments(world, "cumulative"),
            lambda horizon: large_world(horizon, deterministic=False),
        ),
    ]


def monte_carlo() -> list[dict[str, Any]]:
    """Tokens per second of sampling plus rho_t and log rho_t with mean and variance at every t."""
    world, rows = large_world(512), []
    for jobs in (1, 2):
        n = 60_000 * jobs

        def run(jobs: int = jobs, n: int = n) -> None:
            estimate(world, RatioByPosition(), n=n, seed=0, jobs=jobs, fourth=False)

        run()  # starts the processes, which later runs keep
        rate = n * world.mdp.horizon / best(run) / 1e6
        goal = "10 million/s on 2 cores" if jobs == 2 else ""
        rows.append(
            {
                "what": f"Monte Carlo tokens, S=64 A=32 H=512, {jobs} process{'es' if jobs > 1 else ''}",
                "goal": goal,
                "measured": f"{rate:.1f} million/s",
                "growth in H": "",
            }
        )
    return rows


def import_time() -> list[dict[str, Any]]:
    """What `import ctpo` adds to `import numpy`, each in new interpreters, in turn."""
    code = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
    times: dict[str, list[float]] = {"numpy": [], "ctpo": []}
    for _ in range(11):
        for module, found in times.items():
            done = subprocess.run(
                [sys.executable, "-c", code.format(module)], capture_output=True, text=True, check=True
            )
            found.append(float(done.stdout))
    numpy, ours = (1000 * float(np.median(times[module])) for module in ("numpy", "ctpo"))
    return [
        {
            "what": "import ctpo beyond import numpy",
            "goal": "50 ms",
            "measured": f"{ours - numpy:.0f} ms (numpy {numpy:.0f} ms)",
            "growth in H": "",
        }
    ]


def coefficients() -> list[dict[str, Any]]:
    """Coefficients of a training batch."""
    rng = np.random.default_rng(0)
    behavior = rng.normal(-1.0, 0.3, (64, 4096)).astype(np.float32)
    logp = behavior + rng.normal(0.0, 0.03, behavior.shape).astype(np.float32)
    advantages = rng.standard_normal(64).astype(np.float32)
    mask = rng.random(behavior.shape) < 0.9
    estimator = ctpo.get_estimator("ctpo")
    seconds = best(lambda: estimator.coefficients(logp, behavior, advantages, mask), 10)
    rows = [("NumPy", seconds)]
    try:
        import torch
    except ImportError:
        pass
    else:
        tensors = [torch.from_numpy(x) for x in (logp, behavior, advantages, mask)]
        rows.append(("torch", best(lambda: estimator.coefficients(*tensors), 10)))
    return [
        {
            "what": f"ctpo coefficients of [64, 4096] float32, {name} on CPU",
            "goal": "",
            "measured": f"{1000 * seconds:.1f} ms",
            "growth in H": "",
        }
        for name, seconds in rows
    ]


PARTS = {"exact": exact_engines, "monte_carlo": monte_carlo, "import": import_time, "coefficients": coefficients}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen benchmarks."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure the speeds the README states.")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, help="also write the rows as JSON, with commit, versions and machine")
    options = parser.parse_args(arguments)
    rows = [row for part in options.only for row in PARTS[part]()]
    tables.console().print(tables.plain_table("Benchmarks", rows))
    if options.output is not None:
        results.write_json(options.output, {"provenance": results.provenance({"only": options.only}), "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())

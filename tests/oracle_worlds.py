"""Token worlds once more, by plain recursion over everything that can happen.

Written from the definitions, in lists and dicts of Fractions or floats; imports nothing from ctpo and nothing from
the exact engines. `Plain` copies the numbers of a world; the rest never looks at the world again.
"""

import math
from fractions import Fraction

POLICY, TOOL, END = 0, 1, 2


class Plain:
    """The numbers of a `simulations.mdp.World`, in lists."""

    def __init__(self, world):
        mdp = world.mdp
        self.horizon = mdp.horizon
        self.kind = [int(k) for k in mdp.kind]
        self.start = list(mdp.initial)
        self.next = {}
        for s, a, s2, p in zip(*mdp.edges, strict=True):
            self.next.setdefault((int(s), int(a)), []).append((int(s2), p))
        self.reward = [list(row) for row in mdp.reward]
        self.outcome = list(mdp.outcome)
        self.tool = [list(row) for row in mdp.tool]
        self.b = [list(row) for row in world.behavior]
        self.pi = [list(row) for row in world.target]
        self.parameters = world.parameters
        self.n_states, self.n_actions = len(self.kind), len(self.reward[0])
        self.n_blocks = {"shared": 1, "position": self.horizon, "prefix": self.n_states}[self.parameters]
        self.dimension = self.n_blocks * self.n_actions

    def written(self, s, policy):
        """Probability of every token in state s: the given policy's, or the environment's."""
        return self.tool[s] if self.kind[s] == TOOL else policy[s]

    def first_parameter(self, step, s):
        return {"shared": 0, "position": step, "prefix": s}[self.parameters] * self.n_actions

    def score(self, step, s, a):
        """Gradient of log pi(a|s) in all parameters."""
        result = [0] * self.dimension
        first = self.first_parameter(step, s)
        for other in range(self.n_actions):
            result[first + other] = (1 if other == a else 0) - self.pi[s][other]
        return result


def streams(world, step=0, states=None):
    """Every way a stream can go on: lists of (step, state, token, probability of the move given state and token,
    next state), from every state in `states` (all first states if None); (state in which it stops, moves)."""
    if states is None:
        for s, p in enumerate(world.start):
            if p != 0:
                for last, moves in streams(world, 0, [s]):
                    yield p, last, moves
        return
    (s,) = states
    if step == world.horizon or world.kind[s] == END:
        yield s, []
        return
    for a in range(world.n_actions):
        for s2, p in world.next.get((s, a), []):
            for last, moves in streams(world, step + 1, [s2]):
                yield last, [(step, s, a, p, s2), *moves]


def probability(world, moves, policy):
    result = 1
    for _, s, a, p, _ in moves:
        result = result * p * world.written(s, policy)[a]
    return result


def earned(world, last, moves):
    total = world.outcome[last]
    for _, s, a, _, _ in moves:
        total = total + world.reward[s][a]
    return total


def q_value(world, policy, step, s, a):
    """Expected return from writing token a in state s at a step, and the policy from then on."""
    total = 0
    for s2, p in world.next[s, a]:
        for last, moves in streams(world, step + 1, [s2]):
            total = total + p * probability(world, moves, policy) * earned(world, last, moves)
    return world.reward[s][a] + total


def advantages(world, kind):
    """A function (step, state, token) -> advantage, by name."""
    if kind == "one":
        return lambda step, s, a: 1
    letter, who = kind.split("_")
    policy = {"target": world.pi, "behavior": world.b}[who]
    known = {}

    def value(step, s, a):
        if (step, s) not in known:
            q = [q_value(world, policy, step, s, other) for other in range(world.n_actions)]
            mean = sum(p * x for p, x in zip(policy[s], q, strict=True))
            known[step, s] = [x - mean for x in q] if letter == "A" else q
        return known[step, s][a]

    return value


def product(values):
    result = Fraction(1)
    for value in values:
        result = result * value
    return result


def weight(level, ratios, t, window=None):
    """Weight of the t-th policy token, t from 0."""
    return {
        "none": lambda: 1,
        "token": lambda: ratios[t],
        "cumulative": lambda: product(ratios[: t + 1]),
        "sequence": lambda: product(ratios),
        "window": lambda: product(ratios[max(0, t + 1 - window) : t + 1]),
        "lookahead": lambda: product(ratios[: t + 1 + window]),
        "min_prefix": lambda: ratios[t] * min(ratios[:t], default=1),
    }[level]()


def policy_tokens(world, moves):
    """(step, state, token, ratio) of the tokens that the policy wrote; the ratio is None where b has no mass."""
    return [
        (step, s, a, None if world.b[s][a] == 0 else world.pi[s][a] / world.b[s][a])
        for step, s, a, _, _ in moves
        if world.kind[s] == POLICY
    ]


def summed_gradient(world, level, advantage, window=None, outcome=False):
    """Mean (D) and covariance (D x D) of sum_t W_t A_t g_t under b, term by term."""
    d = world.dimension
    mean = [0] * d
    second = [[0] * d for _ in range(d)]
    for p0, last, moves in streams(world):
        p = p0 * probability(world, moves, world.b)
        if p == 0:
            continue
        tokens = policy_tokens(world, moves)
        ratios = [r for _, _, _, r in tokens]
        total = [0] * d
        for t, (step, s, a, _) in enumerate(tokens):
            factor = weight(level, ratios, t, window) * advantage(step, s, a)
            if outcome:
                factor = factor * world.outcome[last]
            total = [x + factor * g for x, g in zip(total, world.score(step, s, a), strict=True)]
        for i in range(d):
            mean[i] = mean[i] + p * total[i]
            for j in range(d):
                second[i][j] = second[i][j] + p * total[i] * total[j]
    return mean, [[second[i][j] - mean[i] * mean[j] for j in range(d)] for i in range(d)]


def score_gradient(world):
    """Gradient of J(pi) as E_pi[return x sum of all scores]: no advantage, no causality, no ratio."""
    total = [0] * world.dimension
    for p0, last, moves in streams(world):
        p = p0 * probability(world, moves, world.pi) * earned(world, last, moves)
        for step, s, a, _ in policy_tokens(world, moves):
            total = [x + p * g for x, g in zip(total, world.score(step, s, a), strict=True)]
    return total


def objective(world, policy):
    """Expected return by summing over all streams."""
    return sum(
        p0 * probability(world, moves, policy) * earned(world, last, moves) for p0, last, moves in streams(world)
    )


def moved_objective(world, parameter, size):
    """J in floats after adding `size` to one logit."""

    def tokens(step, s):
        logits = [math.log(p) if p > 0 else -math.inf for p in map(float, world.pi[s])]
        index = parameter - world.first_parameter(step, s)
        if 0 <= index < world.n_actions:
            logits[index] += size
        largest = max(logits)
        powers = [math.exp(x - largest) for x in logits]
        return [x / sum(powers) for x in powers]

    def value(step, s):
        if step == world.horizon or world.kind[s] == END:
            return float(world.outcome[s])
        chosen = [float(p) for p in world.tool[s]] if world.kind[s] == TOOL else tokens(step, s)
        return sum(
            chosen[a] * (float(world.reward[s][a]) + sum(float(p) * value(step + 1, s2) for s2, p in world.next[s, a]))
            for a in range(world.n_actions)
            if chosen[a] > 0
        )

    return sum(float(p) * value(0, s) for s, p in enumerate(world.start) if p != 0)


def difference_gradient(world, size=1e-5):
    """Gradient of J by central differences in every logit."""
    return [
        (moved_objective(world, k, size) - moved_objective(world, k, -size)) / (2 * size)
        for k in range(world.dimension)
    ]


def ratio_moments(world):
    """Lists over t = 0..H of E rho_t, E rho_t^2, E log rho_t, Var log rho_t and over t = 1..H of the two mean chi2,
    under b; rho_t is a product over the first t tokens of the stream, those of the environment counting as 1."""
    found = {name: [] for name in ("mean", "second", "marginal", "tilted", "mean_log", "var_log")}
    everything = []
    for p0, _, moves in streams(world):
        p = p0 * probability(world, moves, world.b)
        if p != 0:
            everything.append((p, moves))
    for t in range(world.horizon + 1):
        rho = []
        for _, moves in everything:
            own = [r for step, _, _, r in policy_tokens(world, moves) if step < t]
            rho.append(product(own))
        masses = [p for p, _ in everything]
        found["mean"].append(sum(p * x for p, x in zip(masses, rho, strict=True)))
        found["second"].append(sum(p * x * x for p, x in zip(masses, rho, strict=True)))
        if all(x > 0 for x in rho):
            logs = [math.log(x) for x in rho]
            mean = math.fsum(float(p) * x for p, x in zip(masses, logs, strict=True))
            found["mean_log"].append(mean)
            found["var_log"].append(math.fsum(float(p) * (x - mean) ** 2 for p, x in zip(masses, logs, strict=True)))
        else:
            found["mean_log"].append(math.nan)
            found["var_log"].append(math.nan)
        if t == world.horizon:
            break
        chi2 = []
        for _, moves in everything:
            here = moves[t][1] if t < len(moves) else None
            if here is None or world.kind[here] != POLICY:
                chi2.append(0)
            else:
                chi2.append(sum(pi * pi / b for pi, b in zip(world.pi[here], world.b[here], strict=True) if b != 0) - 1)
        found["marginal"].append(sum(p * c for p, c in zip(masses, chi2, strict=True)))
        found["tilted"].append(
            sum(p * x * x * c for p, x, c in zip(masses, rho, chi2, strict=True)) / found["second"][t]
        )
    return found

"""The report: every claim of the paper and of ours, what was found, and what a practitioner should conclude.

One markdown text, made from result files alone; the page is the same text with its figures inside, in one file.
"""

from __future__ import annotations

import base64
import html
import json
import re
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simulations import tables

VERIFICATION = "verification.json"


@dataclass(frozen=True)
class Chapter:
    """Claims that belong together.

    Attributes:
        groups: Prefixes of their ids, before the point.
        title: Heading.
        paper: What the paper says, or what is usually assumed.
        found: What we find, no stronger than its claims.
        figures: Names of figures and their captions.
    """

    groups: tuple[str, ...]
    title: str
    paper: str
    found: str
    figures: Mapping[str, str]


CHAPTERS = (
    Chapter(
        ("1", "1s"),
        "1. The cumulative ratio is a martingale, and its variance grows",
        "Section 3.1 and Prop. 2(i): the ratio has mean 1, and Var(rho_t) < Var(rho_H) without any distributional "
        "assumption.",
        "Both hold with full-support sampling and a target fixed beforehand. Under top-p or top-k sampling the "
        "mean falls below 1 if the sampler is scored as it sampled, and among the sequences still running neither "
        "mean nor variance need behave. The strict inequality needs policies that differ on something the target "
        "can still reach. No weight that is right for every function of the first t tokens has less variance.",
        {"exact_sampled": "Exact moments of the ratio against samples."},
    ),
    Chapter(
        ("2", "2r"),
        "2. How fast the variance grows",
        "Prop. 2(ii): with independent token ratios Var(rho_t) is a product of the tokens' chi-square "
        "divergences, and the full sequence's variance exceeds it by a factor that grows as (1+d)^(H-t) and tends "
        "to H/t.",
        "An exact recursion holds under absolute continuity, with divergences averaged under a tilted policy. The "
        "product formula is true where the divergence is the same after every prefix; elsewhere it can err in "
        "either direction, exponentially in t. The printed factor tends to 1, not to H/t; the exact ratio lies "
        "between two bounds.",
        {},
    ),
    Chapter(
        ("3", "T1"),
        "3. Which ratio is unbiased",
        "Prop. 1 and Table 1: the cumulative ratio is unbiased for a token-level advantage, the token ratio and "
        "GSPO are biased, the full-sequence ratio is unbiased with more variance.",
        "With the exact advantage of the target policy the cumulative ratio is unbiased, exactly so on every "
        "world tried; a learned critic's error is a bias of its own. The token ratio, GSPO and the cumulative "
        "mean are biased even then, and can point the wrong way.",
        {"bias_variance": "Bias and variance of the ratios of Table 1."},
    ),
    Chapter(
        ("4",),
        "4. Outcome rewards",
        "The paper's objective multiplies the prefix ratio by a group-relative outcome advantage, which depends "
        "on tokens after t; Prop. 1 does not cover it.",
        "The case that is trained is a biased one: each token is credited for a future that the old policy "
        "writes. The sign can be wrong. Along the update direction, to first order, the cumulative ratio has "
        "exactly half of the token ratio's bias; in other directions it can have all of it or none. Four "
        "alternatives are unbiased.",
        {},
    ),
    Chapter(
        ("5",),
        "5. The gradient that is summed",
        "Prop. 2 orders the variance of one token's weight. What an optimizer sees is the sum over tokens.",
        "The order of single terms need not carry over to their sum: with shared parameters the full-sequence "
        "estimator can even have variance 0. It does carry over, in total, where scores at different positions "
        "are orthogonal and the advantage is known at its token. In the families tried the prefix weight was "
        "nearly always quieter far from on-policy, and about every other time close to it.",
        {},
    ),
    Chapter(
        ("6",),
        "6. Group baselines, standard deviations, lengths and clips",
        "The objective has a group-relative advantage, a factor 1/|o| and a clip; each is usually taken for harmless.",
        "The group's mean only rescales and leave-one-out changes nothing under unclipped token, cumulative or "
        "sequence ratios; under GSPO's ratio or a clip the baseline is part of the objective. Division by the "
        "standard deviation can turn one prompt's gradient around with three reward levels, division by the "
        "length with two. A clip's bias is what it cuts under the target policy, which the logged rate does not "
        "show.",
        {},
    ),
    Chapter(
        ("7",),
        "7. Spread, drift and the sqrt(t) window",
        "Section 3.3 and Fig. 1: Var(log rho_t) = t sigma^2, so clip bounds that grow as sqrt(t) give a clip rate "
        "that is flat in t, at 5 to 10 %.",
        "Genuine log-ratios fall by the divergence, token after token, so a window around 0 of any power below 1 "
        "is left downwards sooner or later (checked for Gaussian and binary tokens and three Markov worlds; proved "
        "where every history costs some least drift, of tokens with bounded variance). At the paper's spreads the "
        "released window leaves 28 to 33 % of the tokens with negative advantage below it at t = 100 and 77 to 87 % "
        "at 8000. A window that follows the drift is flat for Gaussian ratios of one speed; its bias need not be "
        "smaller.",
        {"spread_synthetic": "Spread and drift on synthetic worlds."},
    ),
    Chapter(
        ("8",),
        "8. Effective sample size",
        "How many samples' worth of information is left at position t.",
        "The population's effective sample size falls with t, at the paper's spread by half within some 450 to "
        "620 tokens. That of one batch need not, and over long sequences it flatters.",
        {},
    ),
    Chapter(
        ("9",),
        "9. Stop-gradient or the product itself",
        "The released code lets no gradient flow through earlier tokens; differentiating the printed formula does.",
        "Two estimators share one formula. With the current policy's advantage both are unbiased; with the "
        "sampler's only the literal derivative is; with an outcome reward neither, and the literal derivative not "
        "even on-policy.",
        {},
    ),
    Chapter(
        ("10",),
        "10. What the released loss does beside the formula",
        "A dual clip, two numerical limits and another aggregation, each measured on its own.",
        "The dual bound equals the upper bound, so tokens of negative advantage are clipped on both sides; the "
        "limit on log rho silences instead of saturating; the aggregation is another objective.",
        {},
    ),
    Chapter(
        ("11",),
        "11. A third policy: the sampler's own probabilities",
        "The inference engine that sampled the tokens is not the old policy; the released code corrects by a "
        "truncated weight of the whole sequence.",
        "With an advantage known at its token the prefix's correction is unbiased as the whole sequence's is, and "
        "never noisier per token: it is enough to give the sampler's log-probabilities as behavior policy. With "
        "an outcome reward it is not. The cap is not harmless.",
        {},
    ),
    Chapter(
        ("12",),
        "12. Numerical noise",
        "Spread of log rho that grows as sqrt(t) is usually read as the policy having changed.",
        "Spread alone does not show it: logits that are rounded and normalized again give an unchanged policy the "
        "same law, drift included. Measure the floor with unchanged weights.",
        {},
    ),
    Chapter(
        ("13",),
        "13. Ratios on the data that the policy was trained on",
        "Every identity above needs the target fixed before the data were drawn. A second epoch breaks that.",
        "On a sequence that was trained on, the ratio's mean is not 1 and its logarithm can spread like t. At the "
        "same number of updates disjoint mini-batches keep its mean at 1 where more epochs do not, if no group is "
        "split; they cost more samples.",
        {},
    ),
    Chapter(
        ("R",),
        "A real language model",
        "The same questions asked of recorded log-probabilities of SmolLM2-135M-Instruct.",
        "Where the target was fixed beforehand the theory's identities hold within error bars. The product "
        "formula's assumption does not, reused sequences behave as chapter 13 says, and bfloat16 alone spreads "
        "the log-ratio by more per token than the paper reports for training.",
        {"spread_recorded": "Spread and drift of recorded log-ratios."},
    ),
)

NOTATION = (
    ("b, pi", "behavior policy, which sampled the tokens; target policy, which is being trained"),
    ("s_t, a_t", "prefix of token t (the prompt and the tokens before it), and the token"),
    ("H, T, |o|", "length of a sequence in tokens that the policy chose"),
    (
        "r_t, rho_t, rho_H",
        "token ratio pi(a_t|s_t)/b(a_t|s_t); cumulative ratio r_1 ... r_t; that of the whole sequence",
    ),
    ("E_b, Var, Cov; E_pi, P_pi", "over what b samples; over what pi would sample"),
    (
        "chi2(s)",
        "sum_a pi(a|s)^2/b(a|s) - 1, the variance of the token ratio after prefix s; chi2_k its mean at token k",
    ),
    ("KL(b||pi), kappa", "divergence of the next-token distributions at a prefix, nats; its mean per token"),
    ("g_t, grad J", "score, grad log pi(a_t|s_t); policy gradient of pi"),
    ("A^pi, Q^pi; A^b, Q^b", "advantage and action value of pi; of b"),
    ("R, outcome reward", "the reward of a whole sequence, such as a right or wrong answer"),
    ("G", "responses to one prompt, a group"),
    ("sigma", "standard deviation of a token's log-ratio, nats"),
    ("ESS", "effective sample size, of a batch of two in samples, else as a share of the samples"),
    ("|z|, limit", "distance from the expected value in standard errors; its largest value that passes"),
)

OVERVIEW = {"overview": "The claims at a glance."}
#: Figures of the studies, and their captions.
STUDY_FIGURES: dict[str, dict[str, str]] = {
    "grid": {"grid": "Which ratio, when."},
    "phase": {"phase": "Which estimator has the least mean squared error."},
    "training": {"training": "Learning curves of the toy study."},
}

VERDICTS = ("true", "true if", "false")
_BEGIN, _END = "<!-- claims: begin -->", "<!-- claims: end -->"

_PAGE = string.Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --line: #d0d5dd; --soft: #f5f7fa; --link: #0b5cad; --ink: #1d2433; --page: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3a4252; --soft: #1f2530; --link: #7db7ff; --ink: #e4e8ef; --page: #141820; }
}
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem; }
h1, h2, h3 { line-height: 1.25; }
h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
h3 { margin-top: 2rem; }
a { color: var(--link); }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; margin: .8rem 0; }
th, td { border: 1px solid var(--line); padding: .3rem .55rem; text-align: left; vertical-align: top; }
th { background: var(--soft); }
blockquote { margin: .8rem 0; padding: .3rem 1rem; border-left: 4px solid var(--link); background: var(--soft); }
code { background: var(--soft); padding: .1rem .25rem; border-radius: 3px; }
summary { cursor: pointer; color: var(--link); }
.verdict { border-radius: 3px; padding: .05rem .4rem; color: #fff; white-space: nowrap; }
.true { background: #1b7a3d; } .true-if { background: #8a5a00; } .false { background: #b3261e; }
</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")


def load(folder: Path, studies: Sequence[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The verification of a folder and the studies that are there.

    Raises:
        ValueError: There is no verification, or a file cannot be read.
    """
    path = folder / VERIFICATION
    if not path.is_file():
        raise ValueError(f"{path}: no such file; `python -m simulations verify` writes it")
    found = {name: folder / f"{name}.json" for name in studies}
    return _read(path), {name: _read(file) for name, file in found.items() if file.is_file()}


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(data, dict) or "provenance" not in data:
        raise ValueError(f"{path}: not a result file of this project")
    return data


def markdown(
    verification: Mapping[str, Any],
    studies: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    questions: Mapping[str, str] | None = None,
    figures: Mapping[str, str] | None = None,
) -> str:
    """The report.

    Args:
        verification: Contents of verification.json.
        studies: Contents of the studies' result files, by name.
        questions: What each study asks, also those that were not run.
        figures: Where the figures are, relative to the report, by name.
    """
    outcomes = verification["claims"]
    studies, questions, figures = studies or {}, questions or {}, figures or {}
    good = sum(outcome["passed"] for outcome in outcomes)
    text = [
        "# Importance ratios for language-model policy gradients: what holds, and what does not\n",
        f"{good} of {len(outcomes)} claims verified as expected. The paper is arXiv:2605.07331. A claim that is **true "
        "if** is true under the assumption stated and can fail without it; one that is **false** passes when its "
        "counterexample is confirmed. Every claim also has a negative control, a formula or input for which the "
        "verdict is wrong, that at least one comparison of the same check must reject. What is checked on random "
        "worlds is verified on those worlds, exactly where the engine is enumeration or dynamic programming, and not "
        "proven in general.\n",
        *_figures(OVERVIEW, figures),
        *_contents(outcomes, questions),
        "\n## Notation\n",
        tables.markdown_rows([{"symbol": _escaped(name), "meaning": _escaped(text)} for name, text in NOTATION]),
        "\n## All claims\n",
        tables.markdown_rows(
            [
                {
                    "claim": f"[{outcome['id']}](#{anchor(outcome['id'])})",
                    "statement": _escaped(outcome["statement"]),
                    "verdict": f"**{outcome['verdict']}**",
                    "as expected": outcome["passed"],
                }
                for outcome in outcomes
            ]
        ),
    ]
    for chapter in _chapters(outcomes):
        text += [f'\n<a id="chapter-{chapter.groups[0].lower()}"></a>\n', f"## {chapter.title}\n"]
        if chapter.paper:
            text += [f"*The paper.* {_escaped(chapter.paper)}\n", f"*What we find.* {_escaped(chapter.found)}\n"]
        text += _figures(chapter.figures, figures)
        for outcome in outcomes:
            if outcome["id"].split(".")[0] in chapter.groups:
                text += _claim(outcome)
        for section in verification.get("findings", []):
            if section["group"] in chapter.groups:
                text += _section(section)
    for name, question in questions.items():
        text += [f'\n<a id="study-{name}"></a>\n', f"## Study: {_escaped(question)}\n"]
        if name not in studies:
            text.append(f"Not run here; `python -m simulations run {name}` does it.\n")
            continue
        text += _figures(STUDY_FIGURES.get(name, {}), figures)
        for section in studies[name]["tables"]:
            text += _section(section)
    text += ["\n## Where the numbers come from\n", *_provenance({"verification": verification, **studies})]
    return "\n".join(text) + "\n"


def _contents(outcomes: Sequence[Mapping[str, Any]], questions: Mapping[str, str]) -> list[str]:
    """Links to the chapters and the studies."""
    lines = [f"- [{chapter.title}](#chapter-{chapter.groups[0].lower()})" for chapter in _chapters(outcomes)]
    return lines + [f"- [Study: {_escaped(question)}](#study-{name})" for name, question in questions.items()]


def readme(text: str, verification: Mapping[str, Any]) -> str:
    """The README with its table of chapters, between two markers, as a complete verification has it.

    Raises:
        ValueError: The markers are not there, or a claim was not verified.
    """
    outcomes = verification["claims"]
    if missed := [outcome["id"] for outcome in outcomes if not outcome["passed"]]:
        raise ValueError(f"verification: the README states what is verified, {', '.join(missed)} is not")
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"readme: must have the markers {_BEGIN} and {_END}")
    counts = Counter(outcome["verdict"] for outcome in outcomes)
    made = verification["provenance"]
    rows = []
    for chapter in _chapters(outcomes):
        chosen = Counter(o["verdict"] for o in outcomes if o["id"].split(".")[0] in chapter.groups)
        rows.append(
            {
                "claims": ", ".join(f"`{group}`" for group in chapter.groups),
                "what we find": f"**{chapter.title.lstrip('0123456789. ')}.** {chapter.found}",
                "verdicts": ", ".join(
                    f"{chosen[name]} {name}" for name in ("true", "true if", "false") if chosen[name]
                ),
            }
        )
    head = (
        f"{len(outcomes)} claims: {counts['true']} true, {counts['true if']} true under a stated assumption, "
        f"{counts['false']} false. All as expected, in {made['seconds']:.0f} s on {made['machine']['cores']} cores:"
    )
    return f"{before}{_BEGIN}\n{head}\n\n{tables.markdown_rows(rows)}{_END}{after}"


def _chapters(outcomes: Sequence[Mapping[str, Any]]) -> Iterator[Chapter]:
    """The chapters that have claims, and one for claims that no chapter names."""
    present = {outcome["id"].split(".")[0] for outcome in outcomes}
    for chapter in CHAPTERS:
        if present & set(chapter.groups):
            yield chapter
    rest = present - {group for chapter in CHAPTERS for group in chapter.groups}
    if rest:
        yield Chapter(tuple(sorted(rest)), "Other claims", "", "", {})


def _claim(outcome: Mapping[str, Any]) -> list[str]:
    joint = " " if outcome["verdict"] == "true if" else ": "
    missed = "" if outcome["passed"] else "**NOT as expected in this run.** "
    rows = [
        {
            "what": _escaped(item["what"]),
            "by": item["engine"],
            "found": _escaped(item["found"]),
            "holds": item["holds"],
        }
        for item in outcome["evidence"]
    ]
    control = "rejected, as it must be" if outcome["control_rejected"] else "**not rejected**"
    return [
        f'\n<a id="{anchor(outcome["id"])}"></a>\n',
        f"### {outcome['id']} · {_escaped(outcome['statement'])}\n",
        f"{missed}**{outcome['verdict']}**{joint}{_escaped(outcome['assumptions'])}. "
        f"Source: {_escaped(outcome['source'])}.\n",
        f"> {_escaped(outcome['conclusion'])}\n",
        f"<details><summary>Evidence ({len(rows)}), {outcome['seconds']:.1f} s</summary>\n",
        tables.markdown_rows(rows),
        f"Negative control: {_escaped(outcome['control'])}: {control}.\n",
        "</details>\n",
    ]


def _section(section: Mapping[str, Any]) -> list[str]:
    rows = [
        {_escaped(name): _escaped(value) if isinstance(value, str) else value for name, value in row.items()}
        for row in section["rows"]
    ]
    return [
        f"\n### {_escaped(section['title'])}\n",
        _escaped(section["note"]) + "\n",
        tables.markdown_rows(rows),
    ]


def _figures(captions: Mapping[str, str], places: Mapping[str, str]) -> list[str]:
    return [f"![{caption}]({places[name]})\n" for name, caption in captions.items() if name in places]


def _provenance(files: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = []
    for name, data in files.items():
        made = data["provenance"]
        rows.append(
            {
                "result": name,
                "commit": (made["commit"] or "not a checkout")[:12] + (", changed" if made["dirty"] else ""),
                "settings": ", ".join(f"{key}={value}" for key, value in made["configuration"].items()),
                "machine": f"{made['machine']['processor']}, {made['machine']['cores']} cores",
                "finished": made["finished"],
            }
        )
    versions = next(iter(files.values()))["provenance"]["versions"]
    return [tables.markdown_rows(rows), "Versions: " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".\n"]


def anchor(identifier: str) -> str:
    """Name of a claim's place in the report."""
    return f"claim-{identifier.lower().replace('.', '-')}"


def _escaped(text: str) -> str:
    """Text that markdown shows as it is: rho_{t-1} is no emphasis and a < b no tag."""
    return re.sub(r"([\\*_`\[\]])", r"\\\1", html.escape(text, quote=False))


def page(report: str, folder: Path) -> str:
    """The report as one HTML file with its figures inside.

    Args:
        report: Markdown, as `markdown` makes it.
        folder: Where its figures are looked for.
    """
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(report)
    body = re.sub(r"<strong>(true if|true|false)</strong>", _badge, body)
    body = body.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
    body = re.sub(r'src="([^":]+\.png)"', lambda found: f'src="{_embedded(folder / found.group(1))}"', body)
    title = re.search(r"^# (.*)$", report, flags=re.MULTILINE)
    return _PAGE.substitute(title=html.escape(title.group(1) if title else "Report"), body=body)


def _badge(found: re.Match[str]) -> str:
    verdict = found.group(1)
    return f'<span class="verdict {verdict.replace(" ", "-")}">{verdict}</span>'


def _embedded(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")

"""The registry: every claim passes, every control is rejected, and a miss is reported as one."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest

from simulations import __main__ as cli
from simulations import results, traces
from simulations.claims import CLAIMS, Claim, Context, Evidence, verify
from simulations.exact import exact_log2

#: The claims of theory that this release verifies, and the verdict of each.
EXPECTED = {
    "1.martingale": "true if",
    "1.support": "false",
    "1.survivors": "false",
    "1.sample": "false",
    "1.variance": "true if",
    "1.optimal": "true",
    "1.log": "false",
    "1s.strict": "true if",
    "2.recursion": "true if",
    "2.product": "true if",
    "2.general": "false",
    "2.uncorrelated": "true if",
    "2r.bounds": "true if",
    "2r.limit": "false",
    "3.prop1": "true if",
    "3.token": "false",
    "3.surrogate": "true if",
    "3.gspo": "true if",
    "3.table": "true",
    "T1": "true if",
    "T1.grid": "true",
    "4.expectation": "true if",
    "4.unbiased": "false",
    "4.additive": "true if",
    "4.first_order": "true if",
    "4.variance": "false",
    "4.crossover": "true if",
    "4.per_decision": "true if",
    "4.doubly_robust": "true if",
    "4.performance_difference": "true if",
    "4.lookahead": "true if",
    "5.identity": "true if",
    "5.orthogonal": "true if",
    "5.direction": "false",
    "5.ordered": "false",
    "5.search": "false",
    "5.zero_variance": "true if",
    "5.slope": "true if",
    "5.frequency": "true if",
    "6.mean": "true if",
    "6.leave_one_out": "true if",
    "6.baseline_off_policy": "false",
    "6.std_binary": "true if",
    "6.std_sign": "false",
    "6.length": "false",
    "6.length_prop1": "false",
    "6.token_mean": "true if",
    "6.clip_identity": "true if",
    "6.clip_sign": "false",
    "6.pessimism": "true if",
    "7.drift": "true if",
    "7.variance": "true if",
    "7.superlinear": "false",
    "7.forced": "true if",
    "7.third_policy": "false",
    "7.window": "false",
    "7.power": "true if",
    "7.crossover": "true if",
    "7.rates": "true if",
    "7.pi_mass": "false",
    "7.reported": "false",
    "7.centered": "true if",
    "7.calibrated": "true if",
    "8.population": "true if",
    "8.batch": "false",
    "8.sample": "false",
    "8.scale": "true if",
    "9.forms": "true",
    "9.target_advantage": "true if",
    "9.behavior_advantage": "false",
    "9.outcome": "false",
    "9.action_value": "true if",
    "9.mean_form": "false",
    "10.printed": "false",
    "10.weight": "true",
    "10.dual": "false",
    "10.limits": "false",
    "10.aggregation": "false",
    "10.reported_rate": "false",
    "11.prefix": "true if",
    "11.none": "false",
    "11.sequence_cap": "false",
    "11.masked": "false",
    "11.levels": "true if",
    "12.spread": "false",
    "12.kind": "true if",
    "13.own": "false",
    "13.independent": "true if",
    "13.group": "false",
    "13.spread": "true if",
    "13.window": "false",
    "13.epochs": "false",
    "R.mean": "true if",
    "R.truncation": "false",
    "R.drift": "true if",
    "R.second_moments": "true if",
    "R.constant": "false",
    "R.growth": "false",
    "R.reused": "false",
    "R.noise": "true if",
}


def made_up(found: bool, control: bool) -> Claim:
    """A claim whose evidence holds for the subject and for the control as told."""

    def check(_context, subject):
        yield Evidence("nothing", "closed form", "made up", subject)

    return Claim("0.made-up", "Nothing.", "true", "none", "here", check, found, control, "the opposite", "none")


def test_registry_is_complete():
    assert {identifier: claim.verdict for identifier, claim in CLAIMS.items()} == EXPECTED


@pytest.mark.parametrize("identifier", EXPECTED)
def test_claim_holds_and_its_control_does_not(identifier):
    outcome = verify(CLAIMS[identifier], Context(seed=1, quick=True))
    assert [e.found for e in outcome.evidence if not e.holds] == []
    assert outcome.control_rejected
    assert outcome.passed
    json.dumps(results._plain(outcome.as_dict()), allow_nan=False)


def test_same_seed_same_evidence():
    found = [[e.found for e in verify(CLAIMS["1.martingale"], Context(3, True)).evidence] for _ in range(2)]
    assert found[0] == found[1]
    assert [e.found for e in verify(CLAIMS["1.martingale"], Context(4, True)).evidence] != found[0]


@pytest.mark.parametrize(
    ("found", "control", "passed"), [(True, False, True), (False, False, False), (True, True, False)]
)
def test_a_miss_is_a_miss(found, control, passed):
    outcome = verify(made_up(found, control), Context())
    assert outcome.passed is passed
    assert outcome.control_rejected is (not control)


def test_a_claim_without_evidence_does_not_pass():
    claim = Claim("0.empty", "Nothing.", "true", "none", "here", lambda *_: [], 0, 1, "the opposite", "none")
    assert not verify(claim, Context()).passed


def test_list_shows_statements_as_they_are(capsys):
    assert cli.main(["list", "--only", "1"]) == 0
    printed = "".join(capsys.readouterr().out.split())
    for part in ("E_b[rho_H|first", "E_b[rho_t^2chi2", "=rho_t."):
        assert part in printed


# --- the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def made_up_claims(monkeypatch):
    """A registry of two quick claims, checked in this process."""

    def install(second: bool):
        claims = {"0.good": made_up(True, False), "0.other": made_up(second, False)}
        claims = {name: Claim(**{**vars(claim), "id": name}) for name, claim in claims.items()}
        monkeypatch.setattr(cli, "CLAIMS", claims)
        monkeypatch.setattr("simulations.findings.tables", lambda _groups: [])
        monkeypatch.setattr("simulations.findings.series", lambda _context: {})

    return install


def test_verify_writes_results_and_succeeds(made_up_claims, tmp_path, capsys):
    made_up_claims(True)
    assert cli.main(["verify", "--jobs", "1", "--seed", "5", "--output", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "verification.json").read_text())
    assert [claim["id"] for claim in data["claims"]] == ["0.good", "0.other"]
    assert data["provenance"]["configuration"]["seed"] == 5
    assert data["provenance"]["versions"]["numpy"] == np.__version__
    report = (tmp_path / "verification.md").read_text()
    assert "2 of 2 claims verified as expected" in report
    assert "2 of 2 claims verified" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["verification.json", "verification.md"]


def test_verify_fails_on_a_miss(made_up_claims, tmp_path, capsys):
    made_up_claims(False)
    assert cli.main(["verify", "--jobs", "1", "--output", str(tmp_path)]) == 1
    assert "missed: 0.other" in capsys.readouterr().out
    assert json.loads((tmp_path / "verification.json").read_text())["claims"][1]["passed"] is False


def test_a_check_that_crashes_is_a_miss(made_up_claims, monkeypatch, tmp_path, capsys):
    made_up_claims(True)

    def crash(_context, _subject):
        raise ZeroDivisionError("planted")

    claims = {**cli.CLAIMS, "0.crash": Claim(**{**vars(made_up(True, False)), "id": "0.crash", "check": crash})}
    monkeypatch.setattr(cli, "CLAIMS", claims)
    assert cli.main(["verify", "--jobs", "1", "--output", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "verification.json").read_text())["claims"]
    assert [claim["passed"] for claim in found] == [True, True, False]
    assert "planted" in found[2]["assumptions"]


def test_interruption_leaves_the_last_results(made_up_claims, monkeypatch, tmp_path, capsys):
    made_up_claims(True)
    (tmp_path / "verification.json").write_text("the last results")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("simulations.findings.series", interrupted)
    assert cli.main(["verify", "--jobs", "1", "--output", str(tmp_path)]) == 130
    assert (tmp_path / "verification.json").read_text() == "the last results"
    assert len(list(tmp_path.iterdir())) == 1
    assert "no result file was changed" in capsys.readouterr().err


def test_only_selects_groups_and_single_claims():
    assert cli.selected(["1"]) == [i for i in EXPECTED if i.startswith("1.")]
    assert cli.selected(["T1", "8.batch"]) == ["T1", "T1.grid", "8.batch"]
    assert cli.selected(None) == list(EXPECTED)


def test_unknown_claim_is_refused(capsys):
    assert cli.main(["verify", "--only", "99"]) == 2
    message = capsys.readouterr().err
    assert "'99'" in message
    assert "1, 1s, 2" in message
    assert "simulations list" in message


def test_list_names_every_claim(capsys):
    assert cli.main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(identifier in printed for identifier in EXPECTED)


def test_run_measures_exactly_where_it_can(tmp_path, capsys):
    arguments = ["measure", "--world", "bigram", "--horizon", "4", "--estimators", "sequence", "grpo", "--jobs", "1"]
    assert cli.main([*arguments, "--output", str(tmp_path / "run.json")]) == 0
    rows = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert [row["engine"] for row in rows] == ["enumeration"] * 2
    assert rows[0]["relative_bias"] < 1e-12 < 0.01 < rows[1]["relative_bias"]
    assert rows[0]["relative_variance"] == pytest.approx(1.0)


def test_run_samples_where_it_must(tmp_path, capsys):
    arguments = ["measure", "--world", "chain", "--horizon", "32", "--step", "0.05", "--samples", "9000", "--jobs", "1"]
    assert cli.main([*arguments, "--estimators", "sequence", "ctpo", "--output", str(tmp_path / "run.json")]) == 0
    sequence, ctpo = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert [row["engine"] for row in (sequence, ctpo)] == ["dynamic programming", "Monte Carlo"]
    assert sequence["relative_bias"] < 1e-9
    assert ctpo["relative_bias"] > 10 * ctpo["relative_bias_error"] > 0
    assert ctpo["clip_rate"] > 10 * ctpo["clip_rate_error"] > 0
    assert "MSE n=1000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world", "tree", "--step", "1"], "--step: the world 'tree' takes none, got 1.0"),
        (["--world", "transformer", "--horizon", "3"], "--horizon: the world 'transformer' takes none, got 3"),
        (["--step", "inf"], "--step: must be a finite number, got inf"),
    ],
)
def test_run_refuses_what_it_cannot_use(arguments, message, capsys):
    assert cli.main(["measure", "--jobs", "1", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_variance_that_samples_cannot_tell_is_not_told(tmp_path, capsys):
    arguments = ["measure", "--world", "chain", "--horizon", "64", "--step", "1", "--samples", "9000", "--jobs", "1"]
    assert cli.main([*arguments, "--estimators", "ctpo_fixed", "grpo", "--output", str(tmp_path / "run.json")]) == 0
    heavy, grpo = json.loads((tmp_path / "run.json").read_text())["rows"]
    assert heavy["relative_bias"] is heavy["total_variance"] is heavy["relative_variance"] is None
    assert grpo["relative_bias"] > 10 * grpo["relative_bias_error"]
    assert grpo["total_variance"] > 0
    assert grpo["relative_variance"] > 0
    assert "sampling tells nothing" in capsys.readouterr().out


def test_a_part_of_the_claims_does_not_replace_the_results(made_up_claims, monkeypatch, tmp_path, capsys):
    made_up_claims(True)
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert cli.main(["verify", "--jobs", "1", "--only", "0.good"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert "nothing was written" in capsys.readouterr().out
    assert cli.main(["verify", "--jobs", "1"]) == 0
    assert len(list(tmp_path.iterdir())) == 2


def test_run_refuses_an_unknown_estimator(capsys):
    assert cli.main(["measure", "--estimators", "grop"]) == 2
    assert "did you mean 'grpo'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["measure", "--output", "."], "--output: must be a file, got the folder '.'"),
        (["verify", "--output", __file__], "--output: must be a folder, got the file"),
    ],
)
def test_an_output_of_the_wrong_kind_is_refused_at_once(arguments, message, capsys):
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert message in capsys.readouterr().err


def test_record_says_what_to_install(monkeypatch, tmp_path, capsys):
    def missing(*_args, **_keywords):
        raise ModuleNotFoundError("No module named 'transformers'")

    monkeypatch.setattr("simulations.traces.record", missing)
    assert cli.main(["record", "--output", str(tmp_path / "traces.npz")]) == 2
    assert "No module named 'transformers'; recording needs more packages: pip install" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "file", "seed", "tokens"),
    [
        ([], "smollm2_135m_instruct.npz", 0, 256),
        (["smollm2_more"], "smollm2_135m_instruct_seed_1.npz", 1, 160),
        (["smollm2_more", "--seed", "2", "--tokens", "8"], "smollm2_135m_instruct_seed_2.npz", 2, 8),
        (["smollm2_more", "--seed", "7", "--output", "seven.npz"], "seven.npz", 7, 160),
    ],
)
def test_record_repeats_a_recording(monkeypatch, capsys, arguments, file, seed, tokens):
    asked = []

    def fake(path, *, settings, prompts):
        asked.append((path.name, settings.seed, settings.tokens, prompts))
        return {}

    monkeypatch.setattr("simulations.traces.record", fake)
    assert cli.main(["record", *arguments]) == 0
    prompts = traces.MORE_PROMPTS if "smollm2_more" in arguments else traces.PROMPTS
    assert asked == [(file, seed, tokens, prompts)]


@pytest.mark.parametrize("arguments", [["smollm2", "--seed", "1"], ["smollm2_more", "--seed", "0"]])
def test_record_overwrites_no_other_recording(monkeypatch, capsys, arguments):
    monkeypatch.setattr("simulations.traces.record", lambda *_a, **_k: pytest.fail("recorded"))
    assert cli.main(["record", *arguments]) == 2
    assert "--output: needed" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--jobs", "0"], ["--seed", "-1"], ["--jobs", "many"]])
def test_bad_numbers_are_refused(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["verify", *option])
    assert stopped.value.code == 2
    assert f"{option[0]}: must be a whole number >= " in capsys.readouterr().err


# --- result files ---------------------------------------------------------------------------------------------------


def test_failed_write_leaves_nothing_behind(tmp_path):
    path = tmp_path / "out.json"
    path.write_text("before")
    with pytest.raises(UnicodeEncodeError):
        results.write_text(path, "\ud800")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_json_holds_no_nan(tmp_path):
    path = tmp_path / "out.json"
    results.write_json(path, {"a": [1.5, float("nan"), np.float64("inf")], "b": Fraction(1, 3), "c": np.arange(2)})
    assert json.loads(path.read_text()) == {"a": [1.5, None, None], "b": "1/3", "c": [0, 1]}


def test_exact_log2():
    assert [exact_log2(Fraction(x)) for x in (1, 8, Fraction(1, 4))] == [0, 3, -2]
    with pytest.raises(ValueError, match="power of two, got 3"):
        exact_log2(Fraction(3))

"""Is the instrument true? Simulated studies with planted forgetting, at the sizes of the studies that we ship.

    python benchmarks/calibration.py [--json] [--simulations 4000] [--parts matchings ...] [--seed 0]

50 edited and 100 intrinsic facts, 1, 6 and 8 runs, runs that differ as ours do. The functions of retention/statistics
are called as analysis/ calls them; what is simulated uses none of them. An interval of one run is asked for that run's
own share, one of several for the mean over all runs that there could be. Each figure with its range over the settings:

coverage: of 95 % intervals that hold the planted value, of shares and differences, matched and unmatched.
false_positive: how often a test of no difference has p <= 0.05 where none is planted.
half_life_coverage: of intervals of half-lives, censored at the last checkpoint.
matched_*: of the matched difference only, where what decides (the lead) and what is observed beside it (margin over the
foil, length, frequency) are different quantities. bias: mean estimate less what was planted.

4,000 simulations tell a coverage of 0.95 to 0.0034 (a standard error). Slow estimators see 1 in 8 of them.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import expit, logit, ndtri

from retention import statistics as st
from retention.statistics import bootstrap, matching, survival
from retention.statistics.paired import compare_counts

EDITED, INTRINSIC, RELATIONS = 50, 100, 8  # facts a run
PART = 8  # the slow estimators see every so many of the simulations
RUNS = (1, 6, 8)  # quickstart and counterfact_tiny; objectives, adapters and mitigations_lora; mitigations
# Standard deviation between runs, log-odds of being kept. In results/*/summary.csv it is 0.19 to 0.28 (pooled over the
# cells of a study, sampling of facts taken off), and at most 0.35 to 0.6 in nine cells of ten.
SPREADS = (0.25, 0.5)
SPREAD = 0.35
CHECKPOINTS = {1: (1.0, 3.0, 10.0, 30.0, 60.0, 100.0)}  # by runs; else LATER
LATER = (10.0, 30.0, 100.0)
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(60)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


@dataclass(frozen=True, kw_only=True)
class Line:
    """One setting of one quantity."""

    what: str
    runs: int
    planted: str
    coverage: float | None = None
    rejected: float | None = None  # where nothing is planted: share of tests with p <= 0.05
    bias: float | None = None  # mean of the estimates less what was planted
    told: float = 1.0  # share of simulations that gave an interval; the rest said that no comparison is possible
    simulations: int = 0


def mean_share(at: float, spread: float) -> float:
    """Mean over runs of a share whose log-odds are normal."""
    return float((expit(at + spread * NODES) * WEIGHTS).sum())


def facts_of(right: np.ndarray, name: str, *, same: bool = False) -> st.Counts:
    """Counts from right [runs, facts]; same: the facts recur over the runs."""
    runs, n = right.shape
    run = np.repeat(np.arange(runs), n)
    fact = np.tile(np.arange(n), runs) if same else np.arange(runs * n)
    names = np.char.add(name, fact.astype(str)).astype(object)
    return st.Counts(runs=tuple(map(str, range(runs))), run=run, fact=names, right=right.ravel().astype(float))


def holds(found: st.Estimate | None, truth: float) -> bool:
    assert found is not None
    return found.low - 1e-12 <= truth <= found.high + 1e-12


def shares(rng: np.random.Generator, runs: int, times: int) -> Iterator[Line]:
    for p in (0.6, 0.85, 0.95):
        for spread in SPREADS if runs > 1 else SPREADS[:1]:
            hits = 0
            for _ in range(times):
                own = expit(logit(p) + spread * rng.standard_normal((runs, 1)))
                truth = float(own[0, 0]) if runs == 1 else mean_share(logit(p), spread)
                hits += holds(st.share(facts_of(rng.random((runs, EDITED)) < own, "e")), truth)
            between = f", runs +-{spread}" if runs > 1 else ""
            yield Line(what="share", runs=runs, planted=f"{p}{between}", coverage=hits / times, simulations=times)


def differences(rng: np.random.Generator, runs: int, times: int) -> Iterator[Line]:
    for p, q in ((0.6, 0.85), (0.85, 0.85), (0.85, 0.95)):
        for spread in SPREADS if runs > 1 else SPREADS[:1]:
            hits = rejected = 0
            for _ in range(times):
                common = rng.standard_normal((runs, 1))  # what is hard on edits is in part hard on the rest
                a, b = (
                    expit(logit(x) + spread * (0.7 * common + np.sqrt(1 - 0.49) * rng.standard_normal((runs, 1))))
                    for x in (p, q)
                )
                truth = mean_share(logit(p), spread) - mean_share(logit(q), spread)
                if runs == 1:
                    b = a if p == q else b
                    truth = float(a[0, 0] - b[0, 0])
                found = st.difference(
                    facts_of(rng.random((runs, EDITED)) < a, "e"), facts_of(rng.random((runs, INTRINSIC)) < b, "i")
                )
                hits += holds(found, truth)
                rejected += found is not None and found.p is not None and found.p <= 0.05
            between = f", runs +-{spread}" if runs > 1 else ""
            yield Line(
                what="edited - intrinsic", runs=runs, planted=f"{p} - {q}{between}", coverage=hits / times,
                simulations=times, rejected=rejected / times if p == q else None,
            )  # fmt: skip


def paired(rng: np.random.Generator, runs: int, times: int) -> Iterator[Line]:
    """An arm against its baseline over the same facts, which have their own strength; the seeds' test beside it."""
    for p, gain in ((0.85, 0.0), (0.8, 0.8)):
        hits = rejected = flipped = 0
        apart = np.hypot(np.hypot(SPREAD, SPREAD * np.sqrt(0.5)), 1.0)
        truth = mean_share(logit(p) + gain, apart) - mean_share(logit(p), apart)
        for _ in range(times):
            run, fact = SPREAD * rng.standard_normal((runs, 1)), rng.standard_normal((runs, EDITED))
            each = [SPREAD * np.sqrt(0.5) * rng.standard_normal((runs, 1)) * (runs > 1) for _ in range(2)]
            p1, p0 = (expit(logit(p) + run + fact + e + g) for e, g in zip(each, (gain, 0.0), strict=True))
            found = compare_counts(
                facts_of(rng.random((runs, EDITED)) < p1, "e"), facts_of(rng.random((runs, EDITED)) < p0, "e")
            )
            if runs == 1:  # of this run: facts are drawn anew
                at = logit(p) + float(run[0, 0])
                truth = float(((expit(at + gain + NODES) - expit(at + NODES)) * WEIGHTS).sum())
            hits += holds(found.difference, truth)
            test = found.p_facts if runs == 1 else found.p_t
            rejected += test is not None and test <= 0.05
            flipped += found.p_seeds is not None and found.p_seeds <= 0.05
        yield Line(
            what="arm - baseline", runs=runs, planted=f"{gain} log-odds", coverage=hits / times, simulations=times,
            rejected=rejected / times if gain == 0 else None,
        )  # fmt: skip
        if gain == 0 and runs > 1:
            yield Line(what="sign flips", runs=runs, planted="0", rejected=flipped / times, simulations=times)


def even(rng: np.random.Generator, half: float, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform from -half to half."""
    return half * (2 * rng.random(shape) - 1)


def simulated(rng: np.random.Generator, runs: int, planted: float, *, recurring: bool = False) -> pd.DataFrame:
    """One study as `matching.fact_table` gives it, and `foil`: the margin over the foil, nats. Estimators' code is not
    used.

    Whether a fact is kept is decided by its lead, a little by its relation, by its run and by chance; being edited adds
    `planted` to the probability, for every fact alike, so that the truth is one number whichever facts are compared.
    What is observed beside the lead is another matter: the margin over the foil exceeds the lead by 2 to 5 nats in
    edits (the old object was pushed down) and hardly in intrinsic facts; lengths decide nothing, frequencies follow the
    lead. Intrinsic facts are those of a half-normal that happen to be above zero, edits are pushed to 6 nats. With
    several runs, a run's level and what being edited does in it differ between runs. recurring: the same facts, with
    their own strength, in every run.
    """
    n = EDITED + INTRINSIC
    shape, edited = (runs, n), np.arange(n) < EDITED

    def own(draw: Callable[[tuple[int, ...]], np.ndarray]) -> np.ndarray:
        return np.broadcast_to(draw((1, n)), shape) if recurring else draw(shape)

    rank = own(lambda size: rng.random(size))
    start = np.where(edited, np.maximum(6.0 + 2.2 * ndtri(rank), 0.01), 5.0 * ndtri(0.5 + rank / 2))
    lead = start * np.exp(even(rng, 0.1, shape))
    relation = own(lambda size: rng.integers(0, RELATIONS, size))
    length = own(lambda size: rng.integers(1, 4, size)).astype(float)
    frequency = own(lambda size: rng.normal(3, 1, size)) + 0.1 * lead
    excess = np.abs(rng.standard_normal(shape))
    kept = 0.36 + 0.42 * expit((lead - 4) / 1.5) + 0.03 * np.sin(2.0 * relation)
    kept = kept + (own(lambda size: even(rng, 0.05, size)) if recurring else 0.0)
    between = float(runs > 1)  # of one run alone what is peculiar to it cannot be told from an effect
    kept = kept + between * even(rng, 0.05, (runs, 1)) + edited * (planted + between * even(rng, 0.08, (runs, 1)))
    assert kept.min() >= 0
    assert kept.max() <= 1
    fact = np.tile(np.arange(n), runs) if recurring else np.arange(runs * n)
    return pd.DataFrame(
        {
            "run_id": np.repeat(np.arange(runs), n).astype(str), "fact_id": fact.astype(str),
            "edited": np.tile(edited.astype(float), runs), "kept": (rng.random(shape) < kept).astype(float).ravel(),
            "lead": lead.ravel(), "foil": (lead + excess * np.where(edited, 1.2, 0.4) + 2.0 * edited).ravel(),
            "length": length.ravel(), "frequency": frequency.ravel(), "relation": relation.ravel().astype(str),
        }
    )  # fmt: skip


@dataclass(kw_only=True)
class Tally:
    """What one way of comparing says over many simulated studies with one planted difference."""

    planted: float
    values: list[float] = field(default_factory=list)
    hits: int = 0
    rejected: int = 0
    asked: int = 0

    def add(self, found: st.Estimate | None, p: float | None) -> None:
        self.asked += 1
        if found is None:
            return
        self.values.append(found.value)
        self.hits += holds(found, self.planted)
        self.rejected += p is not None and p <= 0.05

    def line(self, what: str, runs: int) -> Line:
        told = len(self.values)
        return Line(
            what=what, runs=runs, planted=f"{self.planted}", coverage=self.hits / max(told, 1),
            bias=float(np.mean(self.values)) - self.planted if told else None, told=told / self.asked,
            rejected=self.rejected / max(told, 1) if self.planted == 0 else None, simulations=self.asked,
        )  # fmt: skip


def matchings(rng: np.random.Generator, runs: int, times: int) -> Iterator[Line]:
    """Facts that start alike, without and with a difference: what matching, regression and neither of them say."""
    for recurring in (False, True) if runs > 1 else (False,):
        recur = ", facts recur" if recurring else ""
        for planted in (0.0, -0.15):
            on_lead, plain, on_foil, model = (Tally(planted=planted) for _ in range(4))
            for i in range(times):
                table = simulated(rng, runs, planted, recurring=recurring)
                found = matching.matched(table)
                on_lead.add(found.matched.difference, found.matched.p_facts if runs == 1 else found.matched.p_t)
                assert found.unmatched is not None
                plain.add(found.unmatched, found.unmatched.p)
                if i % PART == 0 and not recurring:
                    other = matching.matched(table.assign(lead=table["foil"])).matched
                    on_foil.add(other.difference, other.p_facts if runs == 1 else other.p_t)
                    regressed = matching.regression(table)
                    model.add(regressed.difference, regressed.p)
            yield on_lead.line(f"matched{recur}", runs)
            if not recurring:
                yield model.line("regression", runs)
            if planted == 0:
                yield plain.line(f"unmatched, as a warning{recur}", runs)
            if planted == 0 and not recurring:
                yield on_foil.line("matched on the foil margin, as a warning", runs)


def crossed(rng: np.random.Generator, runs: int, times: int) -> Iterator[Line]:
    """The same facts in all runs, each with its own strength: both new runs and new facts are meant."""
    if runs == 1:
        return
    hits = dict.fromkeys(("share", "difference", "arm", "naive"), 0)
    rejected = {"difference": 0, "arm": 0}
    truth = mean_share(logit(0.8), np.hypot(SPREAD, 1.0))
    for _ in range(times):
        run, strength = SPREAD * rng.standard_normal((runs, 1)), rng.standard_normal((2, 1, INTRINSIC))
        at = [logit(0.8) + run + 0.5 * SPREAD * rng.standard_normal((runs, 1)) + s for s in strength]
        edited, again = (rng.random((runs, EDITED)) < expit(at[0][:, :EDITED]) for _ in range(2))
        rest = rng.random((runs, INTRINSIC)) < expit(at[1])
        e, i = facts_of(edited, "e", same=True), facts_of(rest, "i", same=True)
        hits["share"] += holds(st.share(e), truth)
        hits["naive"] += holds(st.share(facts_of(edited, "e")), truth)
        found, arm = st.difference(e, i), compare_counts(facts_of(again, "e", same=True), e)
        hits["difference"] += holds(found, 0.0)
        rejected["difference"] += found is not None and found.p is not None and found.p <= 0.05
        hits["arm"] += holds(arm.difference, 0.0)
        rejected["arm"] += arm.p_t is not None and arm.p_t <= 0.05
    names = {"share": "share, facts recur", "difference": "edited - intrinsic, recur", "arm": "arm - baseline, recur"}
    for key, what in names.items():
        yield Line(
            what=what, runs=runs, planted="0.8" if key == "share" else "0", coverage=hits[key] / times,
            rejected=rejected[key] / times if key in rejected else None, simulations=times,
        )  # fmt: skip
    yield Line(
        what="as if they did not, as a warning", runs=runs, planted="0.8", coverage=hits["naive"] / times,
        simulations=times,
    )  # fmt: skip


def singles(rng: np.random.Generator, runs: int, times: int) -> Iterator[Line]:
    """Regime single: a run for each of 50 edits, beside the same 100 intrinsic facts in all runs."""
    if runs != RUNS[-1]:
        return
    runs, hits, rejected = EDITED, 0, 0
    for _ in range(times):
        run, strength = 0.25 * rng.standard_normal((runs, 1)), rng.standard_normal((1, INTRINSIC))
        edited = rng.random((runs, 1)) < expit(logit(0.8) + run + rng.standard_normal((runs, 1)))
        rest = rng.random((runs, INTRINSIC)) < expit(logit(0.8) + run + strength)
        found = st.difference(facts_of(edited, "e"), facts_of(rest, "i", same=True))
        hits += holds(found, 0.0)
        rejected += found is not None and found.p is not None and found.p <= 0.05
    yield Line(
        what="regime single", runs=runs, planted="0", coverage=hits / times, rejected=rejected / times,
        simulations=times,
    )  # fmt: skip


def censored(at: np.ndarray, runs: int, checkpoints: tuple[float, ...]) -> pd.DataFrame:
    """Times of loss [runs * facts] as `survival.lifetimes` gives them."""
    edges = np.concatenate([[0.0], checkpoints, [np.inf]])
    place = np.searchsorted(checkpoints, at)
    run = np.repeat(np.arange(runs), len(at) // runs).astype(str)
    names = {"run_id": run, "fact_id": np.arange(len(at)).astype(str)}
    found = pd.DataFrame(names | {"low": edges[place], "high": edges[place + 1]})
    return found


def half_lives(rng: np.random.Generator, runs: int, times: int) -> Iterator[Line]:
    """Weibull losses with half-lives that differ between runs by 30 %, seen at the checkpoints alone."""
    times = max(times // PART, 1)
    for half, shape in ((40.0, 0.8), (90.0, 1.2)):
        hits = told = 0

        def surviving(t: float, half: float = half, shape: float = shape) -> float:
            return float((0.5 ** ((t / (half * np.exp(0.3 * NODES))) ** shape) * WEIGHTS).sum()) - 0.5

        median = brentq(surviving, 1e-3, 1e5)
        for _ in range(times):
            own = half * np.exp(0.3 * rng.standard_normal(runs))
            at = np.repeat(own, EDITED) * (rng.exponential(size=runs * EDITED) / np.log(2)) ** (1 / shape)
            found = survival.half_life(censored(at, runs, CHECKPOINTS.get(runs, LATER)))
            if found.low is not None and found.high is not None:
                told += 1
                hits += found.low <= (own[0] if runs == 1 else median) <= found.high
        yield Line(
            what="half-life", runs=runs, planted=f"{half:.0f} steps, shape {shape}", coverage=hits / max(told, 1),
            told=told / times, simulations=times,
        )  # fmt: skip


def hazards(rng: np.random.Generator, runs: int, times: int) -> Iterator[Line]:
    """Losses that depend on the lead and the run only: how often the regression says that editing matters."""
    times, told, rejected = max(times // PART, 1), 0, 0
    checkpoints = CHECKPOINTS.get(runs, LATER)
    for _ in range(times):
        table = simulated(rng, runs, 0.0)
        own = 0.3 * rng.standard_normal(runs)[table["run_id"].astype(int)]
        at = 40 * np.exp(0.3 * (table["lead"].to_numpy() - 5) + own) * rng.exponential(size=len(table))
        lives = censored(at, runs, checkpoints).assign(edited=table["edited"], lead=table["lead"])
        found = survival.hazards(lives, ["edited", "lead"], checkpoints)
        if found.state == "ok":
            told += 1
            rejected += found.table["p"].iloc[0] <= 0.05
    yield Line(
        what="hazards", runs=runs, planted="0", rejected=rejected / max(told, 1), told=told / times, simulations=times
    )


def bootstraps(rng: np.random.Generator, runs: int, times: int) -> Iterator[Line]:
    """The two-level bootstrap of a share, BCa: why shares have another interval."""
    times, hits = max(times // (5 * PART), 1), 0
    for i in range(times):
        own = expit(logit(0.85) + SPREAD * rng.standard_normal((runs, 1)))
        c = facts_of(rng.random((runs, EDITED)) < own, "e")
        right, fact = c.right, np.arange(len(c.right))
        found = bootstrap.bootstrap(
            lambda at, r=right: r[at].mean() if len(at) else np.nan, c.run, fact, resamples=300, seed=i
        )
        hits += found.low <= (own[0, 0] if runs == 1 else mean_share(logit(0.85), SPREAD)) <= found.high
    yield Line(what="two-level BCa bootstrap", runs=runs, planted="0.85", coverage=hits / times, simulations=times)


PARTS: tuple[Callable[[np.random.Generator, int, int], Iterator[Line]], ...] = (
    shares, differences, paired, matchings, crossed, singles, half_lives, hazards, bootstraps,
)  # fmt: skip
# What the three figures hold. Beside them stand what is not used for shares, and what goes wrong without our care.
COVERED = (
    "share", "edited - intrinsic", "arm - baseline", "matched", "matched, facts recur", "regression",
    "share, facts recur",
    "edited - intrinsic, recur", "arm - baseline, recur", "regime single",
)  # fmt: skip
TESTED = (*COVERED, "hazards")
MATCHED = ("matched", "matched, facts recur")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--simulations", type=int, default=4000, help=f"of each setting; slow ones: 1/{PART}")
    parser.add_argument("--parts", nargs="+", choices=[p.__name__ for p in PARTS], help="only these [default: all]")
    parser.add_argument("--runs", type=int, nargs="+", default=list(RUNS), help="runs of a simulated study")
    parser.add_argument("--seed", type=int, default=0, help="of the simulations")
    args = parser.parse_args()
    start, lines = time.process_time(), []
    warnings.simplefilter("error")
    for number, part in enumerate(PARTS):
        if args.parts and part.__name__ not in args.parts:
            continue
        for runs in args.runs:
            for line in part(np.random.default_rng([args.seed, number, runs]), runs, args.simulations):
                lines.append(line)
                if not args.json:
                    told = [f"{line.what:32} {line.runs:2} runs  {line.planted:26}"]
                    told += [f"coverage {line.coverage:.3f}"] if line.coverage is not None else []
                    told += [f"rejects {line.rejected:.3f}"] if line.rejected is not None else []
                    told += [f"bias {line.bias:+.4f}"] if line.bias is not None else []
                    told += [f"told {line.told:.3f}"] if line.told < 1 else []
                    print("  ".join(told), flush=True)
    measured = {
        "coverage": [x.coverage for x in lines if x.what in COVERED],
        "false_positive": [x.rejected for x in lines if x.what in TESTED],
        "half_life_coverage": [x.coverage for x in lines if x.what == "half-life"],
        "matched_bias": [x.bias for x in lines if x.what in MATCHED],
        "matched_coverage": [x.coverage for x in lines if x.what in MATCHED],
        "matched_false_positive": [x.rejected for x in lines if x.what in MATCHED],
    }
    out: dict[str, object] = {}
    for name, values in measured.items():
        if found := [x for x in values if x is not None]:
            out |= {name: float(np.mean(found)), f"{name}_range": [min(found), max(found)]}
    out |= {"simulations": args.simulations, "cpu_seconds": round(time.process_time() - start, 1)}
    print(json.dumps(out | ({"lines": [vars(x) for x in lines]} if args.json else {}), indent=1))


if __name__ == "__main__":
    main()

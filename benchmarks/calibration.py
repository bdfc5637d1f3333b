"""Is the instrument true? Simulated studies with planted forgetting, at the sizes of the studies that we ship.

    python benchmarks/calibration.py [--json] [--simulations 1000] [--seed 0]

50 edited and 100 intrinsic facts, 1, 6 and 8 runs, runs that differ as ours do. The functions of retention/statistics
are called as analysis/ calls them. An interval of one run is asked for that run's own share, one of several for the
mean over all runs that there could be. coverage: of 95 % intervals that hold the planted value, over all intervals of
shares and differences, matched and unmatched. false_positive_rate: how often a test of no difference has p <= 0.05
where none is planted. half_life_coverage: likewise of half-lives, censored at the last checkpoint. Each with its range
over the settings; 1,000 simulations tell a coverage of 0.95 to 0.007 (a standard error).
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import expit, logit

from retention import statistics as st
from retention.statistics import bootstrap, matching, survival
from retention.statistics.paired import compare_counts

EDITED, INTRINSIC = 50, 100  # facts a run
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
    told: float = 1.0  # share of simulations that gave an interval
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


def planted_table(rng: np.random.Generator, runs: int, effect: float) -> pd.DataFrame:
    """Edits start two nats above what the model knew, and whether a fact is kept depends on where it starts, on its
    relation, its length, its run, and by `effect` (log-odds) on being edited. As `matching.fact_table`; at: log-odds.
    """
    n, size = EDITED + INTRINSIC, (EDITED + INTRINSIC) * runs
    edited = np.tile(np.repeat([1.0, 0.0], [EDITED, INTRINSIC]), runs)
    margin = np.where(edited == 1, 6.5 + 2.2 * rng.standard_normal(size), 4.5 + 1.8 * rng.standard_normal(size))
    run, relation, length = np.repeat(np.arange(runs), n), rng.integers(0, 8, size), rng.integers(1, 4, size)
    own = SPREAD * rng.standard_normal((runs, 2))
    # How edits fare beside the rest differs between runs too; of one run alone that cannot be told from an effect.
    apart = 0.35 * own[run, 1] * np.where(edited == 1, 1, -1) * (runs > 1)
    at = 0.4 * margin + 0.3 * np.sin(2.0 * relation) - 0.2 * length + own[run, 0] + apart
    return pd.DataFrame(
        {
            "run_id": run.astype(str), "fact_id": np.arange(size).astype(str), "edited": edited, "at": at,
            "kept": (rng.random(size) < expit(at + effect * edited)).astype(float), "margin": margin,
            "length": length.astype(float), "frequency": np.nan, "relation": relation.astype(str),
        }
    )  # fmt: skip


def effect_on(table: pd.DataFrame, effect: float, pairs: np.ndarray | None = None) -> float:
    """What being edited changes for all facts, or for the edited ones of the pairs, from what was planted."""
    at = table["at"].to_numpy() if pairs is None else table["at"].to_numpy()[pairs[:, 0]]
    return float((expit(at + effect) - expit(at)).mean())


def matchings(rng: np.random.Generator, runs: int, times: int) -> Iterator[Line]:
    """Facts that start alike, without and with a difference: what matching, regression and neither of them say."""
    for effect, count in ((0.0, times), (-0.7, times // 2)):
        rejected = {"matched": 0, "unmatched": 0, "regression": 0}
        told = {"matched": 0, "regression": 0}
        hits, half = {"matched": 0, "regression": 0}, count // 2
        many = [planted_table(rng, runs, effect) for _ in range(60 if effect and runs > 1 else 0)]
        truth = float(np.mean([effect_on(t, effect, matching.pairs(t)) for t in many] or [0.0]))
        every = float(np.mean([effect_on(t, effect) for t in many] or [0.0]))
        for i in range(count):
            table = planted_table(rng, runs, effect)
            found = matching.matched(table)
            p = found.matched.p_facts if runs == 1 else found.matched.p_t
            told["matched"] += p is not None
            rejected["matched"] += p is not None and p <= 0.05
            if runs == 1:  # of this run
                truth, every = effect_on(table, effect, found.pairs), effect_on(table, effect)
            hits["matched"] += holds(found.matched.difference, truth)
            rejected["unmatched"] += found.unmatched is not None and (found.unmatched.p or 1) <= 0.05
            if i < half:  # slower
                model = matching.regression(table)
                if model.difference is not None and model.p is not None:
                    told["regression"] += 1
                    rejected["regression"] += model.p <= 0.05
                    hits["regression"] += holds(model.difference, every)
        planted, none = f"{effect} log-odds", effect == 0
        yield Line(
            what="matched", runs=runs, planted=planted, coverage=hits["matched"] / count, told=told["matched"] / count,
            rejected=rejected["matched"] / count if none else None, simulations=count,
        )  # fmt: skip
        yield Line(
            what="regression", runs=runs, planted=planted, coverage=hits["regression"] / max(told["regression"], 1),
            rejected=rejected["regression"] / half if none else None, told=told["regression"] / half, simulations=half,
        )  # fmt: skip
        if none:
            yield Line(
                what="unmatched, as a warning", runs=runs, planted="0", rejected=rejected["unmatched"] / count,
                simulations=count,
            )  # fmt: skip


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
    """Losses that depend on the margin and the run alone: how often the regression says that editing matters."""
    times, told, rejected = times // 2, 0, 0
    checkpoints = CHECKPOINTS.get(runs, LATER)
    for _ in range(times):
        table = planted_table(rng, runs, 0.0)
        own = 0.3 * rng.standard_normal(runs)[table["run_id"].astype(int)]
        at = 40 * np.exp(0.3 * (table["margin"].to_numpy() - 5) + own) * rng.exponential(size=len(table))
        lives = censored(at, runs, checkpoints).assign(edited=table["edited"], margin=table["margin"])
        found = survival.hazards(lives, ["edited", "margin"], checkpoints)
        if found.state == "ok":
            told += 1
            rejected += found.table["p"].iloc[0] <= 0.05
    yield Line(
        what="hazards", runs=runs, planted="0", rejected=rejected / max(told, 1), told=told / times, simulations=times
    )


def bootstraps(rng: np.random.Generator, runs: int, times: int) -> Iterator[Line]:
    """The two-level bootstrap of a share, BCa: why shares have another interval."""
    times, hits = times // 5, 0
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
    "share", "edited - intrinsic", "arm - baseline", "matched", "regression", "share, facts recur",
    "edited - intrinsic, recur", "arm - baseline, recur", "regime single",
)  # fmt: skip
TESTED = (*COVERED, "hazards")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON alone")
    parser.add_argument("--simulations", type=int, default=1000, help="of each setting; the slow ones do a part of it")
    parser.add_argument("--runs", type=int, nargs="+", default=list(RUNS), help="runs of a simulated study")
    parser.add_argument("--seed", type=int, default=0, help="of the simulations")
    args = parser.parse_args()
    start, lines = time.process_time(), []
    warnings.simplefilter("error")
    for number, part in enumerate(PARTS):
        for runs in args.runs:
            for line in part(np.random.default_rng([args.seed, number, runs]), runs, args.simulations):
                lines.append(line)
                if not args.json:
                    told = [f"{line.what:32} {line.runs:2} runs  {line.planted:26}"]
                    told += [f"coverage {line.coverage:.3f}"] if line.coverage is not None else []
                    told += [f"rejects {line.rejected:.3f}"] if line.rejected is not None else []
                    told += [f"told {line.told:.3f}"] if line.told < 1 else []
                    print("  ".join(told), flush=True)
    covered = [x.coverage for x in lines if x.what in COVERED and x.coverage is not None]
    tested = [x.rejected for x in lines if x.what in TESTED and x.rejected is not None]
    lived = [x.coverage for x in lines if x.what == "half-life" and x.coverage is not None]
    out = {
        "coverage": float(np.mean(covered)), "coverage_range": [min(covered), max(covered)],
        "false_positive_rate": float(np.mean(tested)), "false_positive_range": [min(tested), max(tested)],
        "half_life_coverage": float(np.mean(lived)), "half_life_range": [min(lived), max(lived)],
        "simulations": args.simulations, "cpu_seconds": round(time.process_time() - start, 1),
    }  # fmt: skip
    print(json.dumps(out | ({"lines": [vars(x) for x in lines]} if args.json else {}), indent=1))


if __name__ == "__main__":
    main()

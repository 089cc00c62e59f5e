"""From arrays to results: figures and checks of every case, one folder of files, one line per failure.

`results.json` holds everything that a report shows. `flips.csv.gz` holds every choice of experts that differs from the
oracle's.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import pathlib
import sys
from typing import Any

from tests.parity.compare import compare_case, list_flips
from tests.parity.plan import Case, Plan, log
from tests.parity.verdict import Check, flip_bound, judge, uncaught

RESULTS, FLIPS = "results.json", "flips.csv.gz"


def evaluate(plan: Plan, case: Case) -> dict[str, Any]:
    """Figures, checks, missed faults and flips of one case whose arrays exist."""
    figures = compare_case(plan, case)
    compared = figures["experts"] and "transformers" in figures["runs"]
    limit, source = flip_bound(figures, case) if compared else (0.0, "")
    return {
        "figures": figures,
        "checks": [vars(check) | {"passed": check.passed} for check in judge(figures, case)],
        "faults": list(case.faults),
        "uncaught": uncaught(figures, case),
        "flip_bound": limit,
        "flip_bound_source": source,
        "flips": list(list_flips(plan, case)),
    }


def failures(result: dict[str, Any]) -> list[str]:
    """One line for each failed check of a case and each fault that was not caught; missed goals are not listed."""
    checks = [Check(**{k: v for k, v in c.items() if k != "passed"}) for c in result["checks"]]
    lines = [str(check) for check in checks if not check.passed and not check.goal]
    return lines + [f"FAILED: planted fault not caught: {fault}" for fault in result["uncaught"]]


def finish(plan: Plan, title: str, bisect: bool = True) -> int:
    """Evaluates every case, finds the cause of failures, writes results and report; returns 1 if something failed."""
    results, failed = [], False
    for case in plan.cases:
        result = evaluate(plan, case)
        lines = failures(result)
        missed = [c for c in result["checks"] if not c["passed"] and c["goal"]]
        log("parity", f"{case.name}: {len(result['checks'])} checks, {len(lines)} failed, {len(missed)} goals missed")
        for line in lines:
            log("parity", f"{case.name}: {line}")
        if lines and bisect:
            from tests.parity.bisection import explain

            result["bisection"] = explain(plan, case, result)
        failed |= bool(lines)
        results.append(result)
        write_results(plan, results)  # after each case, in case the run is stopped
    if importlib.util.find_spec("matplotlib") is None:
        # a machine with a GPU may lack it; the report can be made from the results elsewhere
        log(
            "parity", f"no matplotlib: python -m tests.parity.report {plan.folder / RESULTS} --out DIR makes the report"
        )
    else:
        from tests.parity.report import write_report

        log("parity", f"report: {write_report([plan.folder / RESULTS], plan.folder / 'report', title)}")
    return int(failed)


def write_results(plan: Plan, results: list[dict[str, Any]]) -> None:
    """Writes `results.json` and the list of flips into the plan's folder."""
    environments = {}
    for side in plan.sides:
        path = plan.folder / f"{side}.json"
        environments[side] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    cases = [{name: value for name, value in result.items() if name != "flips"} for result in results]
    content = {"command": plan.command, "device": plan.device, "environments": environments, "cases": cases}
    (plan.folder / RESULTS).write_text(json.dumps(content) + "\n", encoding="utf-8")
    write_flips(results, plan.folder / FLIPS)


def write_flips(results: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Every flip of every run, as rows of one table; the same flips give the same bytes."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(("case", "side", "run", "layer", "row", "token", "experts_lost", "experts_gained", "margin"))
    for result in results:
        for side, run, layer, flip in result["flips"]:
            lost, gained = (" ".join(map(str, experts)) for experts in (flip.lost, flip.gained))
            place = (layer, flip.row, flip.token, lost, gained, f"{flip.margin:.4e}")
            table.writerow((result["figures"]["case"], side, run, *place))
    path.write_bytes(gzip.compress(text.getvalue().encode(), mtime=0))


def main() -> int:
    """Prints the failures in existing results; returns 1 if there are any."""
    failed = 0
    for path in map(pathlib.Path, sys.argv[1:]):
        for result in json.loads(path.read_text(encoding="utf-8"))["cases"]:
            for line in failures(result):
                print(f"{path}: {result['figures']['case']}: {line}")
                failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main())

"""Writes results as a report: one self-contained HTML page, and the same in Markdown with its plots beside it.

    python -m tests.parity.report RESULTS.json [RESULTS.json ...] --out DIR [--title TEXT]

Nothing is computed here except shares and maxima of the results.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SIDES = ("transformers", "torch_ref", "jaxmoe")
_COLOURS = {"transformers": "#4c72b0", "torch_ref": "#dd8452", "jaxmoe": "#55a868"}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid #ddd; padding: .25rem .7rem; text-align: left; vertical-align: top }
th { border-bottom: 2px solid #888 } img { max-width: 100%; height: auto } code { background: #f4f4f4 }
summary { cursor: pointer; font-weight: 600; margin: .5rem 0 }
"""

Result = dict[str, Any]


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    summary: str = ""  # for long blocks: the line that is shown until the block is opened


@dataclass(frozen=True)
class Plot:
    name: str
    caption: str
    png: bytes


Block = Heading | Paragraph | Table | Plot


def report(runs: Sequence[dict[str, Any]], title: str) -> Iterator[Block]:
    """The blocks of a report over the results of one or several runs of the suite."""
    results = [result for run in runs for result in run["cases"]]
    yield Heading(1, title)
    yield from _verdict(results)
    yield from _headline(results)
    yield from _float32(results)
    yield from _gradients(results)
    yield from _faults(results)
    yield from _plots(results)
    yield Heading(2, "By layer")
    for result in results:
        yield from _layers(result)
    yield Heading(2, "Every check")
    for result in results:
        rows = [[c["side"], c["run"], c["what"], _e(c["found"]), _e(c["limit"]), _mark(c)] for c in result["checks"]]
        header = ("side", "run", "what", "found", "at most", "")
        yield Table(header, rows, f"{result['figures']['case']}: {len(rows)} checks")
    yield from _provenance(runs)


def _verdict(results: list[Result]) -> Iterator[Block]:
    checks = [check for result in results for check in result["checks"]]
    failed = [check for check in checks if not check["passed"] and not check["goal"]]
    missed = [check for check in checks if not check["passed"] and check["goal"]]
    uncaught = [fault for result in results for fault in result["uncaught"]]
    planted = sum(len(result["faults"]) for result in results)
    text = f"**{'FAILED' if failed or uncaught else 'Passed'}**: {len(checks)} checks over {len(results)} cases, "
    text += f"{len(failed)} failed; {planted} planted faults, {planted - len(uncaught)} caught; "
    yield Paragraph(text + f"{len(missed)} of the goals that are reported and not enforced were missed.")
    for result in results:
        for c in result["checks"]:
            if not c["passed"] and not c["goal"]:
                found = f"{c['what']}: {_e(c['found'])}, at most {_e(c['limit'])}"
                yield Paragraph(f"Failed: `{result['figures']['case']}`, {c['side']}, {c['run']}: {found}.")
        if cause := result.get("bisection"):
            at = f"layer {cause['layer']}, " + (
                f"operation `{cause['operation']}`"
                if cause["operation"]
                else "in which no single operation is off by more than rounding"
            )
            where = f"`{result['figures']['case']}`, {cause['side']}"
            yield Paragraph(f"First difference in {where}: {at} (error {_e(cause['error'])}).")
    rows = [
        [result["figures"]["case"], c["side"], c["run"], c["what"], _e(c["found"]), _e(c["limit"])]
        for result in results
        for c in result["checks"]
        if not c["passed"] and c["goal"]
    ]
    if rows:
        yield Table(("goal missed by", "side", "run", "what", "found", "goal"), rows)


def _headline(results: list[Result]) -> Iterator[Block]:
    chosen = [r for r in results if r["figures"]["dtype"] != "float32"]
    if not chosen:
        return
    yield Heading(2, "16 bit: three figures")
    yield Paragraph(
        "Against a float64 run of the same weights. Free: every router decides for itself, and near-ties fall either "
        "way. Pinned: all use the float64 run's experts with their own weights, so that only arithmetic differs. "
        "Flips: (token, layer) pairs in which the router of a pinned run would have chosen other experts; a flip is "
        "explained where the margin by which the float64 run chose is within what transformers' own router logits "
        "are off by (the bound)."
    )
    header = ("case", "side", "KL free", "KL pinned", "top-1 free", "flips free", "flips pinned", "widest", "bound")
    rows = []
    for result in chosen:
        figures = result["figures"]
        for side in SIDES:
            runs = figures["runs"].get(side, {})
            free, pinned = (runs.get(run, {}).get("exact", {}) for run in ("free", "pinned"))
            rows.append(
                [
                    figures["case"],
                    side,
                    _e(free.get("kl")),
                    _e(pinned.get("kl")),
                    _percent(free.get("top1")),
                    _percent(free.get("flip_share")),
                    _percent(pinned.get("flip_share")),
                    _e(pinned.get("largest_flip")),
                    _e(result["flip_bound"]),
                ]
            )
    yield Table(header, rows)
    yield Paragraph("Mean relative error over layers, pinned, against float64:")
    header = ("case", "side", "logits", "hidden states", "router logits", "routing weights", "load-balancing loss")
    rows = []
    for result in chosen:
        for side in SIDES:
            run = result["figures"]["runs"].get(side, {}).get("pinned", {}).get("exact")
            if run:
                means = [_e(np.mean(run[name])) for name in ("hidden", "router_logits", "weights") if name in run]
                rows.append(
                    [result["figures"]["case"], side, _e(run["logits_relative"]), *means, _e(run.get("aux_loss"))]
                )
    yield Table(header, rows)
    yield Paragraph(
        "Share of decisions that flip, by the float64 run's margin between the last expert in and the first out:"
    )
    yield _flip_table(chosen)


def _flip_table(results: list[Result]) -> Table:
    edges = [0, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, np.inf]
    labels = [f"{a:g} to {b:g}" if np.isfinite(b) else f"above {a:g}" for a, b in itertools.pairwise(edges)]
    rows = []
    for result in results:
        figures = result["figures"]
        if "margins" not in figures:
            continue
        for side in SIDES:
            run = figures["runs"].get(side, {}).get("pinned", {}).get("exact")
            if run:
                flipped, total = (_binned(h, edges) for h in (run["flip_margins"], figures["margins"]))
                shares = [_percent(f / t) if t else "-" for f, t in zip(flipped, total, strict=True)]
                rows.append([figures["case"], side, *shares])
    return Table(("case", "side, pinned", *labels), rows)


def _binned(histogram: dict[str, list[float]], edges: Sequence[float]) -> list[float]:
    """A fine histogram's counts summed into coarser bins, by the fine bins' lower ends."""
    lower, counts = np.asarray(histogram["edges"][:-1]), np.asarray(histogram["counts"])
    return [float(counts[(lower >= a * 0.999) & (lower < b * 0.999)].sum()) for a, b in itertools.pairwise(edges)]


def _float32(results: list[Result]) -> Iterator[Block]:
    rows = []
    for result in results:
        figures = result["figures"]
        for side in SIDES[1:]:
            for run, against in figures["runs"].get(side, {}).items():
                if figures["dtype"] == "float32" and "+" not in run and "transformers" in against:
                    x = against["transformers"]
                    worst = [_e(max(x[name])) if name in x else "-" for name in ("hidden", "router_logits", "weights")]
                    numbers = [_e(x["kl"]), _e(x["kl_max"]), _e(x["logits_max"]), _e(x["logits_relative"])]
                    flips = str(round(x.get("flip_share", 0.0) * figures["tokens"] * len(figures["sparse_layers"])))
                    rows.append([figures["case"], side, run, *numbers, *worst, _e(x.get("aux_loss")), flips])
    if rows:
        yield Heading(2, "Float32 against transformers")
        yield Paragraph("KL in nats per token; errors are relative L2, those by layer of the worst layer.")
        header = ("case", "side", "run", "KL", "largest KL", "largest logit error", "logits", "hidden states")
        yield Table((*header, "router logits", "routing weights", "load-balancing loss", "flips"), rows)


def _gradients(results: list[Result]) -> Iterator[Block]:
    rows = []
    for result in results:
        for side, others in result["figures"]["gradients"].items():
            for other, x in others.items():
                numbers = (_e(x["loss"]), _e(x["gradient_max"]), _e(x["gradient_all"]), _e(x.get("step")))
                compared = _percent(x.get("step_compared"))
                name = {"exact": "float64", "transformers": "transformers + PEFT"}[other]
                rows.append([result["figures"]["case"], side, name, *numbers, compared])
    if rows:
        yield Heading(2, "Training, from random adapters")
        yield Paragraph(
            "Relative errors of the loss and of the gradients (experts pinned): the worst adapter of a layer, and all "
            "together; in 16 bit the root mean square over several gradients, each of another part of the tokens. "
            "After one step of AdamW, a sign, the largest difference of an adapter's entries in learning rates, over "
            "the entries whose gradient stands above its own rounding."
        )
        header = ("case", "side", "against", "loss", "worst gradient", "all gradients", "after a step", "compared")
        yield Table(header, rows)


def _faults(results: list[Result]) -> Iterator[Block]:
    rows = []
    for result in results:
        for fault in result["faults"]:
            run = result["figures"]["runs"].get("jaxmoe", {}).get(f"free+{fault}", {}).get("transformers", {})
            caught = "**not caught**" if fault in result["uncaught"] else "caught"
            errors = (_e(run.get("kl")), _e(run.get("logits_relative")), _percent(run.get("top1")))
            rows.append([fault, result["figures"]["case"], *errors, caught])
    if rows:
        yield Heading(2, "Negative controls")
        yield Paragraph("Each fault was put into jaxmoe's own path; the same case without it passes.")
        yield Table(("fault", "case", "KL", "logits, relative", "top-1 agreement", ""), rows)


def _layers(result: Result) -> Iterator[Block]:
    """The table by layer: 16 bit pinned against float64, float32 free against transformers."""
    figures = result["figures"]
    run, other = ("free", "transformers") if figures["dtype"] == "float32" else ("pinned", "exact")
    sides = {s: figures["runs"].get(s, {}).get(run, {}).get(other) for s in SIDES}
    sides = {side: x for side, x in sides.items() if x}
    if not sides:
        return
    header = ["layer"]
    for side in sides:
        header += [f"{side}: hidden after", "router logits", "flips", "gap 99.9 %"]
    rows = []
    for layer in range(figures["layers"]):
        row = [str(layer)]
        slot = figures["sparse_layers"].index(layer) if layer in figures["sparse_layers"] else None
        for x in sides.values():
            row.append(_e(x["hidden"][layer + 1]))
            if slot is None:
                row += ["-", "-", "-"]
            else:
                row += [_e(x["router_logits"][slot]), _percent(x["flip_share_by_layer"][slot])]
                row.append(_e(x["gap_error_by_layer"][slot]))
        rows.append(row)
    against = "float64" if other == "exact" else "transformers"
    yield Table(header, rows, f"{figures['case']}: {run}, against {against}")


def _plots(results: list[Result]) -> Iterator[Block]:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    shown = [r["figures"] for r in results if any("pinned" in runs for runs in r["figures"]["runs"].values())]
    if shown:
        yield Heading(2, "Plots")
    for figures in shown:
        figure, (depth, margin, kl) = pyplot.subplots(1, 3, figsize=(15, 4), layout="constrained")
        for side in SIDES:
            run = figures["runs"].get(side, {}).get("pinned", {}).get("exact")
            if run is None:
                continue
            colour = _COLOURS[side]
            depth.semilogy(
                range(1, len(run["hidden"])), run["hidden"][1:], color=colour, label=f"{side}, hidden states"
            )
            if "router_logits" in run:
                layers = np.asarray(figures["sparse_layers"]) + 0.5
                depth.semilogy(layers, run["router_logits"], "--", color=colour, label=f"{side}, router logits")
                edges = np.asarray(run["flip_margins"]["edges"])
                flipped, total = (np.asarray(h["counts"], float) for h in (run["flip_margins"], figures["margins"]))
                share = np.divide(flipped, total, out=np.zeros_like(flipped), where=total > 0)
                margin.stairs(share, edges, color=colour, label=side)
            free = figures["runs"][side].get("free", {}).get("exact")
            kl.stairs(
                run["kl_histogram"]["counts"], run["kl_histogram"]["edges"], color=colour, label=f"{side}, pinned"
            )
            if free:
                edges = free["kl_histogram"]["edges"]
                kl.stairs(free["kl_histogram"]["counts"], edges, color=colour, ls="--", label=f"{side}, free")
        depth.set(xlabel="layer", ylabel="relative error against float64, pinned", title="error by depth")
        margin.set(
            xscale="log", xlabel="margin of the float64 run, router logits", ylabel="share of decisions that flip"
        )
        margin.set_title("flips by margin, pinned")
        kl.set(xscale="log", xlabel="KL against float64, nats", ylabel="tokens", title="KL by token")
        margin.set_xlim(1e-5, 1)
        kl.set_xlim(1e-8, 1) if figures["dtype"] != "float32" else kl.set_xlim(1e-16, 1e-8)
        for axes in (depth, margin, kl):
            axes.legend(fontsize="x-small")
        figure.suptitle(figures["case"])
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=80, metadata={"Software": None})
        pyplot.close(figure)
        yield Plot(
            figures["case"], f"{figures['case']}: error by depth, flips by margin, KL by token", buffer.getvalue()
        )


def _provenance(runs: Sequence[dict[str, Any]]) -> Iterator[Block]:
    yield Heading(2, "How it was made")
    for run in runs:
        yield Paragraph(f"`{run['command']}` (device: {run['device']})")
        packages = sorted({name for e in run["environments"].values() for name in e.get("versions", {})})
        rows = [
            [side, e.get("device", "-"), str(e.get("seconds", "-")), e.get("python", "-")]
            + [e.get("versions", {}).get(name, "-") for name in packages]
            for side, e in run["environments"].items()
        ]
        yield Table(("side", "device", "seconds", "python", *packages), rows)
    rows = []
    for result in (result for run in runs for result in run["cases"]):
        f = result["figures"]
        stds = (f"{f['logit_std']:.2f}", f"{f['router_logit_std']:.2f}" if "router_logit_std" in f else "-")
        experts = "of".join(f" {n} " for n in f["experts"]).strip() if f["experts"] else "none"
        form = f["quantized"] or "-"
        rows.append(
            [
                f["case"],
                f["dtype"],
                form,
                str(f["layers"]),
                experts,
                str(f["tokens"]),
                *stds,
                result["flip_bound_source"],
            ]
        )
    header = ("case", "dtype", "weights", "layers", "experts", "tokens", "std of logits", "of router logits")
    yield Table((*header, "the flips' bound is from"), rows)
    yield Paragraph(
        "Every flip (case, side, run, layer, row, token, experts lost and gained, margin) is in `flips.csv.gz`."
    )


def _e(value: float | None) -> str:
    return (
        "-" if value is None else "0" if value == 0 else f"{value:.2g}" if 0.01 <= abs(value) < 1000 else f"{value:.1e}"
    )


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _mark(check: dict[str, Any]) -> str:
    return "ok" if check["passed"] else "missed goal" if check["goal"] else "**failed**"


def to_markdown(blocks: Sequence[Block]) -> str:
    """The report in Markdown; plots are files beside it."""
    out = []
    for block in blocks:
        if isinstance(block, Heading):
            out.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Paragraph):
            out.append(block.text)
        elif isinstance(block, Plot):
            out.append(f"![{block.caption}]({block.name}.png)")
        else:
            rows = [block.header, ["---"] * len(block.header), *block.rows]
            table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
            wrapped = f"<details><summary>{block.summary}</summary>\n\n{table}\n\n</details>"
            out.append(wrapped if block.summary else table)
    return "\n\n".join(out) + "\n"


def to_html(blocks: Sequence[Block], title: str) -> str:
    """The report as one page that needs nothing else."""
    body = []
    for block in blocks:
        if isinstance(block, Heading):
            body.append(f"<h{block.level}>{html.escape(block.text)}</h{block.level}>")
        elif isinstance(block, Paragraph):
            body.append(f"<p>{_inline(block.text)}</p>")
        elif isinstance(block, Plot):
            source = base64.b64encode(block.png).decode()
            body.append(f'<img alt="{html.escape(block.caption)}" src="data:image/png;base64,{source}">')
        else:
            rows = ["".join(f"<th>{_inline(cell)}</th>" for cell in block.header)]
            rows += ["".join(f"<td>{_inline(cell)}</td>" for cell in row) for row in block.rows]
            table = "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"
            summary = f"<details><summary>{html.escape(block.summary)}</summary>{table}</details>"
            body.append(summary if block.summary else table)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def _inline(text: str) -> str:
    """Markdown's `code` and **bold** as HTML."""
    parts = html.escape(text).split("`")
    text = "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
    parts = text.split("**")
    return "".join(f"<b>{part}</b>" if i % 2 else part for i, part in enumerate(parts))


def write_report(results: Sequence[pathlib.Path], folder: pathlib.Path, title: str) -> pathlib.Path:
    """Writes `report.html`, `report.md` and the plots into `folder`; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    blocks = list(report([json.loads(path.read_text(encoding="utf-8")) for path in results], title))
    for block in blocks:
        if isinstance(block, Plot):
            (folder / f"{block.name}.png").write_bytes(block.png)
    (folder / "report.md").write_text(to_markdown(blocks), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(to_html(blocks, title), encoding="utf-8")
    return page


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="Writes a parity report from results.")
    parser.add_argument("results", type=pathlib.Path, nargs="+")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--title", default="Parity")
    args = parser.parse_args()
    print(write_report(args.results, args.out, args.title))


if __name__ == "__main__":
    main()

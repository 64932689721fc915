"""The report as one HTML file that needs nothing else: no script, no link, no font."""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hvpopt.lightning.spectrum.reading import estimate, number, reading
from hvpopt.lightning.spectrum.report import Eigenvalue, SpectrumReport

_MATRIX = {
    "hessian": "Hessian",
    "ggn": "generalised Gauss-Newton matrix",
    "fisher": "Fisher information matrix",
}
_STYLE = """
:root { color-scheme: light; --ink: #1d2129; --soft: #5b626d; --line: #dfe3e8; --blue: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f6f8; color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 0 0 4px; }
p { margin: 4px 0 12px; } .soft { color: var(--soft); }
section { background: white; border: 1px solid var(--line); border-radius: 10px;
  padding: 20px 24px; margin-top: 20px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin-top: 20px; }
.card { background: white; border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.card b { display: block; font-size: 18px; font-weight: 600; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  font-size: 14px; }
th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 9em; }
tr:last-child td { border-bottom: 0; }
ul { margin: 8px 0 4px; padding-left: 20px; } li { margin: 4px 0; }
img { display: block; max-width: 100%; height: auto; margin: 8px auto 12px; }
code { font: 13px ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
"""
_SECTIONS = {
    "density": (
        "Spectral density",
        "How many eigenvalues there are around each value, by stochastic Lanczos quadrature, "
        "smoothed by a Gaussian a hundredth of the range wide; the band is the standard error over "
        "the probes. Ticks mark the extreme eigenvalues. The scale is logarithmic: a lone "
        "eigenvalue is the height of one Gaussian.",
    ),
    "eigenvalues": (
        "Extreme eigenvalues",
        "By Lanczos iteration. An exact eigenvalue lies within the residual bound of each.",
    ),
    "layers": (
        "Trace by layer",
        "The trace of each layer's block on the diagonal, by Hutchinson's estimate; bars are one "
        "standard error.",
    ),
    "slices": (
        "Slices of the loss",
        "The loss along eigenvectors through the checkpoint, which lies at 0, beside the quadratic "
        "model made from its gradient and eigenvalue there (dashed). Where they part, the loss is "
        "no longer quadratic. Eigenvectors point to where the loss rises.",
    ),
    "plane": (
        "The plane of the two top eigenvectors",
        "The loss around the checkpoint (the cross); contours lie closer together where the loss "
        "is low.",
    ),
}


def page(reports: Sequence[SpectrumReport], figures: Mapping[str, Any], title: str) -> str:
    """The page of one report, or of several side by side.

    Args:
        reports: at least one.
        figures: of matplotlib, by the names that `hvpopt.lightning.spectrum.figures` gives them.
        title: the heading.
    """
    parts = [f"<h1>{_text(title)}</h1>", f'<p class="soft">{_text(_subtitle(reports))}</p>']
    if len(reports) == 1:
        parts += [_cards(reports[0]), _section("What it says", "", _list(reading(reports[0])))]
    else:
        parts.append(_overview(reports))
    for name, (heading, explanation) in _SECTIONS.items():
        if name not in figures:
            continue
        body = _picture(figures[name], heading)
        if name == "eigenvalues":
            body += _eigenvalues(reports)
        elif name == "layers":
            body += _layers(reports)
        parts.append(_section(heading, explanation, body))
    parts.append(_section("How it was measured", "", _origin(reports)))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _subtitle(reports: Sequence[SpectrumReport]) -> str:
    first = reports[0]
    if len(reports) > 1:
        kinds = {_MATRIX[r.curvature] for r in reports}
        return f"{len(reports)} checkpoints, side by side; {' and '.join(sorted(kinds))}"
    trained = f" trained with {first.optimizer}" if first.optimizer else ""
    return (
        f"{_MATRIX[first.curvature]} of {first.module}{trained}, after {first.step:,} steps, "
        f"{first.num_params:,} parameters, on the {first.data}"
    )


def _cards(report: SpectrumReport) -> str:
    cards = [
        ("loss", number(report.loss)),
        ("norm of the gradient", number(report.gradient_norm)),
        ("largest eigenvalue λ₁", number(report.top[0].value)),
        ("trace", estimate(report.trace)),
        ("2 / λ₁, largest stable learning rate", number(report.largest_stable_lr)),
    ]
    if report.bottom:
        cards.insert(3, ("smallest eigenvalue", number(report.bottom[0].value)))
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card"><b>{_text(value)}</b><span>{_text(name)}</span></div>'
            for name, value in cards
        )
        + "</div>"
    )


def _overview(reports: Sequence[SpectrumReport]) -> str:
    rows = [["checkpoint", *(r.name for r in reports)]]
    lines = {
        "optimizer": [r.optimizer or "–" for r in reports],
        "steps": [f"{r.step:,}" for r in reports],
        "parameters": [f"{r.num_params:,}" for r in reports],
        "loss": [number(r.loss) for r in reports],
        "norm of the gradient": [number(r.gradient_norm) for r in reports],
        "largest eigenvalue λ₁": [number(r.top[0].value) for r in reports],
        "smallest eigenvalue": [number(r.bottom[0].value) if r.bottom else "–" for r in reports],
        "trace": [estimate(r.trace) for r in reports],
        "share of negative eigenvalues": [f"{100 * r.negative_share.value:.1f} %" for r in reports],
        "2 / λ₁": [number(r.largest_stable_lr) for r in reports],
    }
    rows += [[name, *values] for name, values in lines.items()]
    return _section("At a glance", "", _table(rows))


def _eigenvalues(reports: Sequence[SpectrumReport]) -> str:
    tops = max(len(r.top) for r in reports)
    bottoms = max(len(r.bottom) for r in reports)
    names = [f"λ{_subscript(i + 1)}" for i in range(tops)] + [_lowest(i) for i in range(bottoms)]
    if len(reports) == 1:
        rows = [["eigenvalue", "value", "residual bound", "cosine with the gradient"]]
        for name, e in zip(names, (*reports[0].top, *reports[0].bottom), strict=True):
            rows.append([name, number(e.value), f"{e.residual_bound:.1g}", f"{e.cosine:.3f}"])
        return _table(rows)
    columns = [[*_cells(r.top), *["–"] * (tops - len(r.top)), *_cells(r.bottom)] for r in reports]
    rows = [["eigenvalue ± residual bound", *(r.name for r in reports)]]
    for i, name in enumerate(names):
        rows.append([name, *(column[i] if i < len(column) else "–" for column in columns)])
    return _table(rows)


def _cells(eigenvalues: Sequence[Eigenvalue]) -> list[str]:
    return [f"{number(e.value)} ± {e.residual_bound:.1g}" for e in eigenvalues]


def _layers(reports: Sequence[SpectrumReport]) -> str:
    if len(reports) == 1:
        total = reports[0].trace.value or math.nan
        rows = [["layer", "parameters", "trace", "share", "trace per parameter"]]
        for layer in reports[0].layers:
            value, share = layer.trace.value, 100 * layer.trace.value / total
            percent = f"{round(share)} %" if math.isfinite(share) else "–"
            size = f"{layer.num_params:,}"
            each = number(value / layer.num_params)
            rows.append([layer.name, size, estimate(layer.trace), percent, each])
        return _table(rows)
    rows = [["layer", *(r.name for r in reports)]]
    traces = [{layer.name: estimate(layer.trace) for layer in r.layers} for r in reports]
    for name in dict.fromkeys(name for found in traces for name in found):
        rows.append([name, *(found.get(name, "–") for found in traces)])
    return _table(rows)


def _origin(reports: Sequence[SpectrumReport]) -> str:
    rows = [["checkpoint", "matrix", "data", "mode", "products", "losses", "seconds"]]
    for r in reports:
        counts = [f"{r.num_products:,}", f"{r.num_evaluations:,}", f"{r.seconds:.1f}"]
        data = ", ".join(filter(None, (r.data, r.weights)))
        rows.append([r.checkpoint, _MATRIX[r.curvature], data, r.mode, *counts])
    return _table(rows) + (
        '<p class="soft">A product or a loss is one over all of these data, and all values are '
        "of the loss over them. The same numbers are in <code>spectrum.json</code> beside this "
        "page.</p>"
    )


def _lowest(i: int) -> str:
    return ("smallest", "second smallest", "third smallest")[i] if i < 3 else f"{i + 1}th smallest"


def _list(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(text)}</li>" for text in sentences) + "</ul>"


def _subscript(i: int) -> str:
    return "".join("₀₁₂₃₄₅₆₇₈₉"[int(digit)] for digit in str(i))


def _section(heading: str, explanation: str, body: str) -> str:
    text = f'<p class="soft">{_text(explanation)}</p>' if explanation else ""
    return f"<section><h2>{_text(heading)}</h2>{text}{body}</section>"


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:]
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _picture(figure: Any, alternative: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{_text(alternative)}" src="data:image/svg+xml;base64,{data}">'


def _text(text: str) -> str:
    return html.escape(text)

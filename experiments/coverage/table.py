"""Outcomes counted, and shown."""

from collections import Counter
from collections.abc import Iterable, Sequence

from .outcomes import Outcome

VERDICTS = ("correct", "wrong", "refused", "undecided", "no gradient")


def totals(outcomes: Iterable[Outcome]) -> dict[str, Counter[str]]:
    """By engine asked for, how many samples came to which verdict."""
    counts: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        counts.setdefault(outcome.engine, Counter())[outcome.verdict] += 1
    return counts


def table(outcomes: Sequence[Outcome]) -> str:
    """Markdown: totals by engine, then what is not simply correct by the first engine tried."""
    lines = ["| engine | " + " | ".join(VERDICTS) + " |", "|---|" + "---|" * len(VERDICTS)]
    for engine, counts in totals(outcomes).items():
        lines.append(f"| `{engine}` | " + " | ".join(str(counts[v]) for v in VERDICTS) + " |")
    lines += [
        "",
        "| module or operation | engine | outcome | samples | why |",
        "|---|---|---|---|---|",
    ]
    for (name, engine, outcome, why), count in _exceptions(outcomes).items():
        lines.append(f"| {name} | `{engine}` | {outcome} | {count} | {why} |")
    return "\n".join(lines)


def _exceptions(outcomes: Iterable[Outcome]) -> Counter[tuple[str, str, str, str]]:
    found: Counter[tuple[str, str, str, str]] = Counter()
    for o in outcomes:
        name = o.sample.split(" ")[0]
        if o.verdict == "correct" and o.engine in (o.served_by, "auto"):
            if o.engine == "auto" and o.served_by != "graph":
                found[name, o.engine, f"correct by {o.served_by}", ""] += 1
        elif o.verdict == "correct":
            found[name, o.engine, f"correct by {o.served_by}", ""] += 1
        elif o.verdict != "no gradient":
            why = o.message.replace("|", "\\|") or f"error {o.error:.0e}"
            found[name, o.engine, o.verdict, why] += 1
    return found

"""Other libraries' products, their measurements, and rows of tables made by hand."""

import importlib.util
from dataclasses import replace

import torch
from hvpopt.experiments.benchmarks.bounds import FlopBound
from hvpopt.experiments.benchmarks.measure import Measurement
from hvpopt.experiments.benchmarks.peers import peer_tasks
from hvpopt.experiments.benchmarks.report import Report, Row
from hvpopt.experiments.benchmarks.tasks import ONE_SHOT_HVP

CPU = torch.device("cpu")
BOUND = FlopBound(10, 20)
OPERATORS = {"curvlinops": "curvlinops", "hessian-eigenthings": "hessian_eigenthings"}


def installed(engine):
    return all(
        importlib.util.find_spec(module) for name, module in OPERATORS.items() if name in engine
    )


def report_of(problem, *entries, **options):
    options = {"repeats": 1, **options}
    return Measurement(problem, entries, BOUND, CPU, **options).report()


def plain(product=ONE_SHOT_HVP):
    """Double backward on the module, from the peers."""
    return next(t for t in peer_tasks(BOUND) if t.product == product)


def doubled(task):
    """The same with a product that is twice as large."""

    def prepare(problem, stack):
        run = task.prepare(problem, stack)
        return lambda: [2 * x for x in run()[2]]

    return replace(task, engine="doubled", prepare=prepare)


def row(**options):
    values = {
        "what": "one-shot",
        "engine": "graph",
        "curvature": "hessian",
        "count": 1,
        "library": "hvpopt",
        "is_exact": True,
        "flop_bound": 2.0,
    }
    return Row(**{**values, **options})


def report(*rows):
    return Report("MLP", 10, 0.001, 1.0, 100, list(rows))

"""Prints how many iterations, evaluations and products the classical functions take.

    python -m hvpopt.experiments.classical [--large]

Both methods of `hvpopt.minimization.minimize` at their defaults and, where SciPy is installed, its
Newton methods at the same tolerance on the gradient, with products by hvpopt.
"""

import argparse
import importlib.util
import warnings
from typing import Any

import torch

from hvpopt.minimization import minimize
from hvpopt.products import linearize

from .functions import TestFunction, all_functions

OURS = ("trust-ncg", "newton-cg")
SCIPYS = ("newton-cg", "trust-ncg", "trust-krylov")
GTOL = torch.finfo(torch.float64).eps ** 0.5


def cell(nit: int, nfev: int, nhev: int, fun: float, success: bool) -> str:
    """Iterations/evaluations/products and the value reached; a failure is marked."""
    return f"{nit}/{nfev}/{nhev} {fun:.1e}{'' if success else ' failed'}"


def of_ours(function: TestFunction, method: Any) -> str:
    """The cell of one of our methods."""
    found = minimize(function.f, function.x0(), method=method)
    return cell(found.nit, found.nfev, found.nhev, found.fun, found.success)


def of_scipy(function: TestFunction, method: str) -> str:
    """The cell of one of SciPy's."""
    import scipy.optimize

    num_products = 0
    last: tuple[bytes, Any] = (b"", None)

    def at(x: Any) -> Any:
        nonlocal last
        if last[0] != x.tobytes():
            last = (x.tobytes(), linearize(function.f, torch.tensor(x)))
        return last[1]

    def product(x: Any, p: Any) -> Any:
        nonlocal num_products
        num_products += 1
        return at(x).hvp(torch.tensor(p)).numpy()

    options: dict[str, float] = {"maxiter": 3000}
    options |= {"xtol": 1e-10} if method == "newton-cg" else {"gtol": GTOL}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it says of its own line search and of rounding
        found = scipy.optimize.minimize(
            lambda x: float(function.f(torch.tensor(x))),
            function.x0().numpy(),
            method=method,
            jac=lambda x: at(x).grad.numpy(),
            hessp=product,
            options=options,
        )
    return cell(found.nit, found.nfev, num_products, found.fun, found.success)


def main() -> None:
    """Runs all functions and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--large", action="store_true", help="n = 1000, too: some minutes")
    is_large = parser.parse_args().large
    scipys = SCIPYS if importlib.util.find_spec("scipy") else ()
    titles = ["function", *OURS, *(f"SciPy's {method}" for method in scipys)]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for function in all_functions():
        if function.n > 100 and not is_large:
            continue
        cells = [of_ours(function, method) for method in OURS]
        cells += [of_scipy(function, method) for method in scipys]
        print(f"| {' | '.join([function.name, *cells])} |", flush=True)


if __name__ == "__main__":
    main()

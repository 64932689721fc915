"""What a report's numbers say, in sentences."""

import math

from hvpopt.lightning.spectrum.report import Estimate, SpectrumReport


def number(value: float) -> str:
    """Four significant digits, with a minus sign that is one."""
    return f"{value:.4g}".replace("-", "−")


def estimate(found: Estimate) -> str:
    """The value and its standard error, to two digits of the latter.

    Examples:
        >>> estimate(Estimate(109.52, 16.31)), estimate(Estimate(-0.12345, 0.0021))
        ('110 ± 16', '−0.1235 ± 0.0021')
    """
    value, error = found.value, found.standard_error
    if not math.isfinite(error) or error <= 0 or not 1e-4 <= abs(value) < 1e6:
        return f"{number(value)} ± {error:.2g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f} ± {error:.{decimals}f}".replace("-", "−")


def reading(report: SpectrumReport) -> list[str]:
    """A few sentences, of what the numbers allow to be said."""
    sentences = [_stability(report)]
    if report.bottom:
        sentences.append(_negative(report))
    sentences += [*_flat(report), *_gradient(report), *_layers(report)]
    return sentences


def _stability(report: SpectrumReport) -> str:
    top = report.top[0].value
    if not top > 0:
        return "No positive eigenvalue was found: the loss is nowhere curved upwards."
    return (
        f"The largest eigenvalue is λ₁ = {number(top)}: plain gradient descent grows along its "
        f"vector at learning rates above 2/λ₁ = {number(report.largest_stable_lr)}, with momentum "
        "β above (2 + 2β)/λ₁."
    )


def _negative(report: SpectrumReport) -> str:
    least = report.bottom[0]
    if least.value + least.residual_bound >= 0:
        return "No negative eigenvalue was found outside the bounds of error."
    share = f"{100 * report.negative_share.value:.1f} %"
    return (
        f"The smallest eigenvalue is {number(least.value)}, and {share} of all lie clearly below "
        "zero: the checkpoint is no minimum of this loss, which falls along such a vector."
    )


def _flat(report: SpectrumReport) -> list[str]:
    density = report.density
    if not all(map(math.isfinite, density.mass)):
        return []
    width = density.edges[-1] - density.edges[0]
    pairs = zip(density.edges[:-1], density.edges[1:], density.mass, strict=True)
    flat = sum(mass for low, high, mass in pairs if abs(low + high) / 2 <= 0.01 * width)
    return [f"{100 * flat:.0f} % of the eigenvalues are within a hundredth of the range of zero."]


def _gradient(report: SpectrumReport) -> list[str]:
    cosines = [e.cosine for e in report.top]
    share = sum(c * c for c in cosines)
    if not math.isfinite(share):
        return []
    return [
        f"The {len(cosines)} top eigenvectors hold {100 * share:.0f} % of the gradient's squared "
        f"norm, among {report.num_params:,} directions."
    ]


def _layers(report: SpectrumReport) -> list[str]:
    total = report.trace.value
    if len(report.layers) < 2 or not total > 3 * report.trace.standard_error:
        return []
    largest = max(report.layers, key=lambda layer: layer.trace.value)
    return [
        f"The layer {largest.name} holds {100 * largest.trace.value / total:.0f} % of the trace, "
        f"with {100 * largest.num_params / report.num_params:.0f} % of the parameters."
    ]

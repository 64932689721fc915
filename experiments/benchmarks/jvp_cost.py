"""What J v costs through a deep network: ``python -m hvpopt.experiments.benchmarks.jvp_cost``.

Reverse mode alone has J v only by two VJPs: u ↦ Jᵀu is linear in u, and its own VJP with v is J v
(the double-backward trick). Forward mode takes it along with the forward pass. Both through an
AlexNet and a ResNet-18, by the inputs and by the weights, with time and peak memory as ratios to
one forward pass and to one gradient.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hvpopt.products import jvp

from . import image_networks
from .command import parse
from .timing import interleaved_times, peak_bytes

Tensors = tuple[Tensor, ...]
Function = Callable[..., Tensor]
WITH_RESPECT_TO = ("inputs", "weights")


@dataclass(frozen=True)
class Network:
    """A network and a batch of images."""

    name: str
    """How tables call it."""
    module: nn.Module
    """On the device, in training mode."""
    images: Tensor
    """(batch, 3, size, size)."""

    def as_function(self, of: str) -> tuple[Function, Tensors]:
        """The output as a function of the inputs or of the weights, and the point."""
        buffers = dict(self.module.named_buffers())
        weights = {name: p.detach() for name, p in self.module.named_parameters()}

        def output(weights: dict[str, Tensor], images: Tensor) -> Tensor:
            copies = {name: b.clone() for name, b in buffers.items()}
            return functional_call(self.module, (weights, copies), (images,))

        if of == "inputs":
            return lambda images: output(weights, images), (self.images,)
        names = list(weights)
        return (
            lambda *values: output(dict(zip(names, values, strict=True)), self.images),
            tuple(weights.values()),
        )


@dataclass(frozen=True)
class Row:
    """One way to J v; times and peak memories are ratios."""

    way: str
    time_in_forwards: float
    time_in_gradients: float
    memory_in_forwards: float
    memory_in_gradients: float


@dataclass(frozen=True)
class Report:
    """One network on one device, by its inputs or its weights.

    A forward pass runs without recording. A gradient is a recorded forward pass and one VJP.
    """

    network: str
    with_respect_to: str
    num_parameters: int
    forward_seconds: float
    gradient_seconds: float
    forward_peak_mib: float
    gradient_peak_mib: float
    rows: list[Row]


def networks(device: torch.device, *, quick: bool) -> list[Network]:
    """AlexNet and ResNet-18, on 8 images each on a CPU, 64 on a GPU."""
    torch.manual_seed(0)
    batch = 2 if quick else 8 if device.type == "cpu" else 64
    size = 63 if quick else 224
    width, classes = (4, 10) if quick else (64, 1000)
    images = torch.randn(batch, 3, size, size).to(device)
    modules = {
        "AlexNet": image_networks.alexnet(width=width, size=size, classes=classes),
        "ResNet-18": image_networks.resnet18(width=width, classes=classes),
    }
    return [
        Network(f"{name}, {batch}×3×{size}×{size}", module.to(device), images)
        for name, module in modules.items()
    ]


def ways(f: Function, at: Tensors, v: Tensors) -> dict[str, Callable[[], Tensor]]:
    """The ways to J v, by name."""

    def on_tuple(values: Tensors) -> Tensor:
        return f(*values)

    return {
        "hvpopt.products.jvp": lambda: jvp(on_tuple, at, v)[1],
        'hvpopt.products.jvp, "double_reverse"': lambda: jvp(
            on_tuple, at, v, mode="double_reverse"
        )[1],
        "two VJPs, torch.autograd.grad": partial(two_vjps, f, at, v),
        "torch.func.jvp": lambda: torch.func.jvp(f, at, v)[1],
        "torch.autograd.functional.jvp": lambda: torch.autograd.functional.jvp(f, at, v)[1],
    }


def forward(f: Function, at: Tensors) -> Tensor:
    """f's value, without recording."""
    with torch.no_grad():
        return f(*at)


def gradient(f: Function, at: Tensors, u: Tensor) -> Tensors:
    """Jᵀu, by one recorded run and one reverse pass."""
    leaves = [x.detach().requires_grad_() for x in at]
    return torch.autograd.grad(f(*leaves), leaves, u)


def two_vjps(f: Function, at: Tensors, v: Tensors) -> Tensor:
    """J v as the derivative of ⟨Jᵀu, v⟩ by u."""
    leaves = [x.detach().requires_grad_() for x in at]
    value = f(*leaves)
    u = torch.zeros_like(value, requires_grad=True)
    pullback = torch.autograd.grad(value, leaves, u, create_graph=True)
    return torch.autograd.grad(pullback, u, v)[0]


def measure(network: Network, of: str, device: torch.device, *, repeats: int) -> Report:
    """Times, in turns, and peak memories of all ways.

    Raises:
        RuntimeError: If two ways differ by more than rounding.
    """
    f, at = network.as_function(of)
    generator = torch.Generator().manual_seed(1)
    v = tuple(torch.randn(x.shape, generator=generator).to(x) for x in at)
    u = torch.randn(forward(f, at).shape, generator=generator).to(device)
    found = ways(f, at, v)
    results = {name: way() for name, way in found.items()}
    expected = results["two VJPs, torch.autograd.grad"]
    for name, result in results.items():
        error = float((result - expected).norm() / expected.norm())
        if not error < 1e-2:
            raise RuntimeError(f"{network.name}, by {of}: {name} is off by {error:.1e}.")
    del results, result, expected

    runs: dict[str, Callable[[], Any]] = {
        "forward": partial(forward, f, at),
        "gradient": partial(gradient, f, at, u),
        **found,
    }
    times = interleaved_times(runs, repeats=repeats, device=device, warmup=1)
    peaks = {name: peak_bytes(run, device) for name, run in runs.items()}
    return Report(
        network=network.name,
        with_respect_to=of,
        num_parameters=sum(p.numel() for p in network.module.parameters()),
        forward_seconds=times["forward"].median,
        gradient_seconds=times["gradient"].median,
        forward_peak_mib=peaks["forward"] / 2**20,
        gradient_peak_mib=peaks["gradient"] / 2**20,
        rows=[
            Row(
                name,
                times[name].ratios_to(times["forward"])[0],
                times[name].ratios_to(times["gradient"])[0],
                peaks[name] / peaks["forward"],
                peaks[name] / peaks["gradient"],
            )
            for name in found
        ],
    )


def table(report: Report) -> str:
    """The report as text."""
    lines = [
        f"{report.network}, {report.num_parameters:,} parameters, J v by its "
        f"{report.with_respect_to}: a forward pass takes {1e3 * report.forward_seconds:.1f} ms and "
        f"{report.forward_peak_mib:.1f} MiB,\na gradient {1e3 * report.gradient_seconds:.1f} ms "
        f"and {report.gradient_peak_mib:.1f} MiB",
        f"  {'':<40}{'time in':>19}{'memory in':>20}",
        f"  {'way':<40}{'forwards':>9}{'gradients':>10}{'forwards':>10}{'gradients':>10}",
    ]
    for row in report.rows:
        lines.append(
            f"    {row.way:<38}{row.time_in_forwards:>9.2f}{row.time_in_gradients:>10.2f}"
            f"{row.memory_in_forwards:>10.2f}{row.memory_in_gradients:>10.2f}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables and, with ``--json``, writes them to a file."""
    description = "Cost of Jacobian-vector products in forward passes and gradients."
    options = parse("jvp_cost", description, argv)
    print(
        f"{options.title()} Medians of {options.repeats} rounds; memory is the peak above the "
        "model's.",
        flush=True,
    )
    reports: dict[str, list[Report]] = {}
    for device in options.devices:
        reports[device.type] = []
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for network in networks(device, quick=options.quick):
                for of in WITH_RESPECT_TO:
                    report = measure(network, of, device, repeats=options.repeats)
                    reports[device.type].append(report)
                    print(f"\n{device.type}: {table(report)}", flush=True)
    options.write({name: [asdict(r) for r in found] for name, found in reports.items()})


if __name__ == "__main__":
    main()

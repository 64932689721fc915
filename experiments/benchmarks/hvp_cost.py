"""Cost of second-order products in gradients: ``python -m hvpopt.experiments.benchmarks.hvp_cost``.

For each network and each engine: the time of a product and its peak memory, as ratios to one
gradient measured in the same run, beside the bound from counted floating-point operations. With
``--peers`` other libraries too, several vectors at once, and the overhead of tiny products.
"""

import argparse
import json
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from . import jax_process, tiny
from .bounds import flop_bound
from .measure import Measurement
from .models import FULL, QUICK
from .peers import many_vector_peer_tasks, peer_tasks
from .report import Report, table, verdict
from .tasks import COUNTS, compiled_tasks, further_tasks, many_vector_tasks, tasks

PEERS = ("curvlinops-for-pytorch", "hessian-eigenthings", "jax")
SECONDS = 8.0
"""With ``--peers``, rounds of timing end after so long, so that all end within ten minutes."""
QUICK_SECONDS, QUICK_COUNTS = 0.2, (8,)


def measure(
    name: str,
    device: torch.device,
    *,
    repeats: int,
    quick: bool = False,
    peers: bool = False,
    compiled: bool = False,
    seconds: float = SECONDS,
) -> Report:
    """Times and memories of all products of one network of `models.FULL`, or of its quick form."""
    problem = (QUICK if quick else FULL)[name](device)
    bound = flop_bound(problem)
    entries = tasks(bound)
    if compiled:
        entries += compiled_tasks(bound)
    if not peers:
        return Measurement(problem, entries, bound, device, repeats=repeats).report()
    entries += [*further_tasks(bound), *peer_tasks(bound)]
    for count in QUICK_COUNTS if quick else COUNTS:
        entries += [*many_vector_tasks(bound, count), *many_vector_peer_tasks(bound, count)]
    seconds = QUICK_SECONDS if quick else seconds
    measurement = Measurement(problem, entries, bound, device, repeats=repeats, seconds=seconds)
    report = measurement.report()
    jax = jax_process.measure(
        name,
        problem,
        bound,
        measurement.expected,
        device,
        counts=() if quick else COUNTS,
        repeats=repeats,
        seconds=seconds / 4,  # of each way, of which there are a few to a product
        compile_seconds=2.0 if quick else 30.0,
    )
    return jax_process.joined(report, jax)


def machine(device: torch.device) -> str:
    """The accelerator's or the processor's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables and, with ``--json``, writes them to a file."""
    parser = argparse.ArgumentParser(
        prog="python -m hvpopt.experiments.benchmarks.hvp_cost",
        description="Cost of second-order products in gradients, with the bound from counted "
        "floating-point operations.",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--repeats", type=int, help="rounds of timing (default: 20; quick: 2)")
    parser.add_argument(
        "--models", nargs="+", choices=list(FULL), default=list(FULL), help="which networks"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers here")
    parser.add_argument("--quick", action="store_true", help="tiny networks: a check, no numbers")
    parser.add_argument(
        "--peers",
        action="store_true",
        help="other libraries beside hvpopt, products with 8 and 32 vectors, the overhead of "
        "tiny products, and a verdict (pip install 'hvpopt[bench]')",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        help=f"with --peers, for the timing of each product (default: {SECONDS:g})",
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile too, which takes minutes"
    )
    options = parser.parse_args(argv)
    repeats = options.repeats if options.repeats is not None else (2 if options.quick else 20)
    if repeats < 1:
        parser.error(f"--repeats must be at least 1, got {repeats}")
    if options.seconds <= 0:
        parser.error(f"--seconds must be positive, got {options.seconds:g}")
    device = _device(options.device, parser.error)
    if options.json is not None and not options.json.parent.is_dir():
        parser.error(f"--json: there is no folder {options.json.parent}")

    head = _head(device, repeats, quick=options.quick, peers=options.peers)
    print(_title(head), flush=True)
    reports = []
    content: dict[str, Any] = {}
    with _full_precision(device):
        for name in options.models:
            reports.append(
                measure(
                    name,
                    device,
                    repeats=repeats,
                    quick=options.quick,
                    peers=options.peers,
                    compiled=options.compile,
                    seconds=options.seconds,
                )
            )
            print("\n" + table(reports[-1], peers=options.peers), flush=True)
        content["models"] = [asdict(report) for report in reports]
        if options.peers:
            overheads = tiny.measure(device, quick=options.quick)
            print("\n" + tiny.table(overheads), flush=True)
            print("\n" + verdict(reports), flush=True)
            content["tiny"] = [asdict(overhead) for overhead in overheads]
    if options.json is not None:
        options.json.write_text(
            json.dumps({**head, **content}, indent=2, ensure_ascii=False) + "\n"
        )


def _head(device: torch.device, repeats: int, *, quick: bool, peers: bool) -> dict[str, Any]:
    """What the numbers were measured with."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hvpopt": version("hvpopt"),
    }
    if peers:
        versions |= {name: _version(name) for name in PEERS}
    return {
        "machine": machine(device),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "versions": versions,
        "repeats": repeats,
        "quick": quick,
    }


def _title(head: dict[str, Any]) -> str:
    threads = f", {head['threads']} threads" if head["device"] == "cpu" else ""
    peers = [f"{name} {head['versions'][name]}" for name in PEERS if name in head["versions"]]
    lines = [
        f"{head['machine']}{threads}, torch {head['versions']['torch']}, float32. Ratios to one "
        f"gradient in the same run:\nmedian, least and largest of {head['repeats']} rounds; "
        "memory is the peak above the model's."
    ]
    if peers:
        lines += [
            f"With {', '.join(peers)}. Fewer rounds where a product takes long, one where longer.",
            '"build": what a repeated product builds once took so many gradients. "error": against',
            'engine "graph", relative. Several vectors: each; one by one, 32 take what 8 took.',
            "JAX runs in a process of its own; its ratios are to its own compiled gradient.",
        ]
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """On CUDA, convolutions without TF32, which would blur the comparison of products."""
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _device(name: str, refuse: Callable[[str], Any]) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        refuse(f"--device {name}: choose cpu or cuda")
    if device.type not in ("cpu", "cuda"):
        refuse(f"--device {name}: choose cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        refuse(f"--device {name}: torch sees no CUDA device here; choose cpu")
    return device


if __name__ == "__main__":
    main()

"""What only TensorBoard shows of the curvature: histograms and pictures."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from hvpopt.curvature import SpectralDensity
from hvpopt.lightning.monitors import figures
from hvpopt.lightning.monitors.history import History
from hvpopt.lightning.monitors.look import Look, Slices

logger = logging.getLogger("hvpopt")

NO_MATPLOTLIB = (
    "matplotlib is not installed, so that TensorBoard gets no pictures of the curvature: "
    "pip install 'hvpopt[experiments]'."
)

Points = tuple[list[float], list[float]]


class Album:
    """Histograms and pictures of what was found, and what is kept for pictures over time.

    Pictures over time are worth drawing when they have four times as many columns as the last
    one, and at the end, so that drawing costs little beside measuring.

    Args:
        prefix: what the names begin with.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._spectra: History[Points] = History()
        self._layers: History[dict[str, float]] = History()
        self._density: SpectralDensity | None = None
        self._slices: tuple[int, Slices] | None = None
        self._has_warned = False

    def add(self, look: Look, step: int, writers: Sequence[SummaryWriter]) -> None:
        """Keeps what was found, and shows it."""
        if not writers:
            return
        if look.spectrum is not None:
            self._density = look.spectrum
            self._spectra.add(step, _points(look.spectrum))
            for writer in writers:
                _add_spectrum(writer, f"{self._prefix}/spectrum", look.spectrum, step)
        if look.layers is not None:
            self._layers.add(step, look.layers)
        if look.slices is not None:
            self._slices = step, look.slices

    def is_worth_drawing(self, *, at_end: bool = False) -> bool:
        """Whether there is much that the last pictures do not show; at the end, anything."""
        return self._slices is not None or any(
            history.is_worth_drawing(at_end=at_end) for history in (self._spectra, self._layers)
        )

    def draw(self, writers: Sequence[SummaryWriter], step: int, *, at_end: bool = False) -> None:
        """Draws what the last pictures do not show."""
        if not writers or not self._can_draw():
            return
        spectra, layers = self._spectra, self._layers
        has_density = self._density is not None  # not after a resumption
        if has_density and spectra.is_worth_drawing(at_end=at_end):
            self._show(writers, "spectrum_figure", self._spectrum_picture(), step)
            spectra.draw()
        if layers.is_worth_drawing(at_end=at_end):
            picture = figures.layers_figure(layers.steps, layers.found)
            self._show(writers, "layers_figure", picture, step)
            layers.draw()
        if self._slices is not None:
            (step, slices), self._slices = self._slices, None
            self._show(writers, "slices_figure", figures.slices_figure(step, slices), step)

    def _spectrum_picture(self) -> figures.Picture:
        density = self._density
        assert density is not None
        low, high = density.range
        margin = 0.05 * (high - low) + 3 * density.default_sigma
        grid = torch.linspace(low - margin, high + margin, 400, dtype=torch.float64)
        return figures.spectrum_figure(
            self._spectra.steps,
            self._spectra.found,
            grid.numpy(),
            density.evaluate(grid).numpy(),
            density.spread(grid).numpy(),
        )

    def _can_draw(self) -> bool:
        if figures.can_draw():
            return True
        if not self._has_warned:
            self._has_warned = True
            logger.warning(NO_MATPLOTLIB)
        return False

    def _show(
        self, writers: Sequence[SummaryWriter], name: str, picture: figures.Picture, step: int
    ) -> None:
        for writer in writers:
            writer.add_image(f"{self._prefix}/{name}", picture, step, dataformats="HWC")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: plain numbers."""
        return {"spectra": self._spectra.state_dict(), "layers": self._layers.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._spectra.load_state_dict(state["spectra"])
        self._layers.load_state_dict(state["layers"])


def _points(density: SpectralDensity) -> Points:
    """The nodes with their weights, averaged over the probes."""
    is_met = density.weights > 0  # rows are padded
    weights = density.weights[is_met] / len(density.weights)
    return density.nodes[is_met].tolist(), weights.tolist()


def _add_spectrum(writer: SummaryWriter, tag: str, density: SpectralDensity, step: int) -> None:
    """The spectrum as a histogram, in which each eigenvalue counts once."""
    mass, edges = density.histogram(64)
    nodes, weights = (torch.tensor(x, dtype=torch.float64) for x in _points(density))
    n = density.dimension
    writer.add_histogram_raw(
        tag,
        min=float(nodes.min()),
        max=float(nodes.max()),
        num=n,
        sum=n * float(weights @ nodes),
        sum_squares=n * float(weights @ nodes**2),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=(n * mass).tolist(),
        global_step=step,
    )

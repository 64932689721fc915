"""The picture of TensorBoard in the README: `python -m hvpopt.experiments.screenshots OUT.png`.

It trains the digits with Newton-CG and with SGD, unless it is given their logs, opens TensorBoard
on both in a headless Chromium, and puts what two of its pages show into one picture.
"""

import argparse
import io
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from selenium.webdriver.remote.webdriver import WebDriver

from .browser import Dashboard, browser, tensorboard

RUNS = {
    "newton_cg": ["optimizer=newton_cg"],
    "sgd": ["optimizer=sgd"],
}
COMMON = [
    "callbacks.curvature_monitor.every_n_steps=4",
    "callbacks.curvature_monitor.budget=null",
]


CHARTS, TOP, BOTTOM = 826, 64, 634
"""In pixels: how much of the first page is shown, and which rows of the second."""


def main() -> None:
    """Reads the command line, trains if need be, and writes the picture."""
    parser = argparse.ArgumentParser(description="A picture of TensorBoard on a run's curvature.")
    parser.add_argument("out", type=Path, help="where to write the picture")
    parser.add_argument("--logs", type=Path, help="logs to show, in place of a training's")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        logs = arguments.logs or train(Path(scratch))
        picture(logs).save(arguments.out, optimize=True)


def train(folder: Path) -> Path:
    """Runs `hvpopt` for each of `RUNS`; the folder with their logs."""
    for name, overrides in RUNS.items():
        where = f"hydra.run.dir={folder / 'runs' / name}"
        logger = f"logger.save_dir={folder / 'logs'}"
        command = [sys.executable, "-m", "hvpopt.cli", where, logger, f"logger.name={name}"]
        subprocess.run([*command, *overrides, *COMMON], check=True)
    return folder / "logs"


def picture(logs: Path) -> Image.Image:
    """The charts of the custom layout and, below them, the spectrum over time."""
    with tensorboard(logs) as address, browser(1500, 1180) as window:
        seen = Dashboard(window, address)
        seen.open("custom_scalars&_smoothingWeight=0")
        has_charts = seen.wait(lambda: seen.count(".render-area path") > 20)
        seen.tick("Ignore outliers")
        seen.settle()
        charts = shot(window)
        seen.open("images&tagFilter=spectrum_figure&regexInput=newton_cg")
        has_spectrum = seen.wait(lambda: seen.loaded_images() >= 1)
        seen.tick("Show actual image size")
        seen.settle()
        spectrum = shot(window)
    if not has_charts or not has_spectrum:
        raise SystemExit(f"{logs} shows no curvature of a run newton_cg in TensorBoard.")
    width = charts.width
    return stacked(charts.crop((0, 0, width, CHARTS)), spectrum.crop((0, TOP, width, BOTTOM)))


def shot(window: WebDriver) -> Image.Image:
    """What the window shows."""
    return Image.open(io.BytesIO(window.get_screenshot_as_png())).convert("RGB")


def stacked(first: Image.Image, second: Image.Image) -> Image.Image:
    """One picture above the other."""
    joined = Image.new("RGB", (first.width, first.height + second.height), "white")
    joined.paste(first, (0, 0))
    joined.paste(second, (0, first.height))
    return joined


if __name__ == "__main__":
    main()

"""Pictures of TensorBoard, taken in a headless browser."""

from .browser import Dashboard, browser, tensorboard

__all__ = ["Dashboard", "browser", "tensorboard"]

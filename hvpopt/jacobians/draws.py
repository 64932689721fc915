"""The same random numbers in every run of a function."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Generators:
    """The states of the random number generators that a function on some devices may use."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._devices = {x.device for x in tensors if x.device.type == "cuda"}
        self._states = self._read()

    def moved(self) -> bool:
        """Whether numbers have been drawn since."""
        pairs = zip(self._read(), self._states, strict=True)
        return not all(torch.equal(new, old) for new, old in pairs)

    def rewind(self) -> None:
        """Sets the states back to what they were."""
        torch.set_rng_state(self._states[0])
        for device, state in zip(self._devices, self._states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)

    def _read(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self._devices)]

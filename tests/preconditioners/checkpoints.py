"""An optimizer after a checkpoint."""

import io

import torch
from torch import Tensor, nn


def states_after_a_checkpoint(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """The states of SGD with copies of the parameters, loaded from the optimizer's."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    loaded = torch.optim.SGD([nn.Parameter(p.detach().clone()) for p in params], lr=0.1)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    return [loaded.state[p] for p in loaded.param_groups[0]["params"]]

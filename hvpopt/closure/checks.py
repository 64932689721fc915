"""Checks of what a closure's oracle is given."""

from collections.abc import Sequence

from torch import Tensor

from hvpopt.trees import TensorList


def checked_parameters(params: Sequence[Tensor]) -> TensorList:
    """The parameters as a list, if products by them can be computed.

    Raises:
        ValueError: for none, or one that requires no gradient.
        TypeError: for one that is no tensor.
    """
    params = list(params)
    if not params:
        raise ValueError(
            "ClosureOracle was given no parameters: give those to differentiate by, such as "
            "list(model.parameters())."
        )
    for i, p in enumerate(params):
        if not isinstance(p, Tensor):
            raise TypeError(
                f"Parameter number {i} is a {type(p).__name__}, where a tensor is expected: give a "
                "flat list of tensors, such as list(model.parameters())."
            )
        if not p.requires_grad:
            raise ValueError(
                f"Parameter number {i} (shape {tuple(p.shape)}) has requires_grad=False: leave it "
                "out, or unfreeze it with requires_grad_(True)."
            )
    return params

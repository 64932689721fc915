"""Dense Jacobians and Hessians of functions on pytrees: of inputs, weights and batches.

`jacobian` and `hessian` return the whole matrix in the nested form of ``torch.func.jacrev`` and
``torch.func.hessian``, by the way that is named or by the best; `jacobian_blocks` and
`hessian_blocks` give a matrix that is too large for memory in blocks. For products with it,
which never form it, see `hvpopt.products`.
"""

from hvpopt.jacobians.choice import ModeChoice
from hvpopt.jacobians.dense import HessianMode, JacobianMode, hessian, jacobian, which_mode
from hvpopt.jacobians.streams import Block, hessian_blocks, jacobian_blocks

__all__ = [
    "Block",
    "HessianMode",
    "JacobianMode",
    "ModeChoice",
    "hessian",
    "hessian_blocks",
    "jacobian",
    "jacobian_blocks",
    "which_mode",
]

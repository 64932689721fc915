import pytest
import torch
from torch import nn

from hvpopt.curvature import top_eigenpairs, trace


def twice(v):
    return [2 * x for x in v]


@pytest.mark.parametrize("estimate", [top_eigenpairs, trace])
@pytest.mark.parametrize(
    ("like", "message"),
    [
        (3, r"like is 3; expected a list of tensors.*Options come by name"),
        (nn.Linear(2, 2), r"like is a Linear; expected a list of tensors"),
        (nn.Linear(2, 2).parameters(), r"like is a generator; .*such as list\(net.parameters"),
        (torch.zeros(2), r"like is a Tensor; expected a list of tensors"),
    ],
)
def test_what_does_not_tell_the_shapes_of_vectors_is_named(estimate, like, message):
    with pytest.raises(TypeError, match=message):
        estimate(twice, like)

"""A Jacobian is of one draw of random numbers, and the generator goes on as after one run."""

import torch
import torch.nn.functional as F
from functional import normal
from jacobian_cases import close, every_way
from torch import Tensor

from hvpopt.jacobians import jacobian, jacobian_blocks, which_mode


@every_way
def test_f_draws_the_same_random_numbers_in_all_its_runs(mode):
    """A Jacobian is of one dropout mask, and the generator goes on as after one run."""
    x = normal(40)

    def f(x: Tensor) -> Tensor:
        return F.dropout(x, 0.5) * x.sum()

    for _ in range(2):  # the second time it is known that f draws
        torch.manual_seed(1)
        kept = (f(x) != 0).double() * 2
        after = torch.get_rng_state()
        torch.manual_seed(1)
        found = jacobian(f, x, mode=mode)
        close(found, torch.diag(kept * x.sum()) + torch.outer(kept * x, torch.ones_like(x)))
        assert torch.equal(torch.get_rng_state(), after)


def test_a_switch_to_random_numbers_is_noticed():
    x, state = normal(8), {"p": 0.0}

    def f(x: Tensor) -> Tensor:
        return F.dropout(x, 0.5) if state["p"] else 1.0 * x

    close(jacobian(f, x, mode="jvp_loop"), torch.eye(8, dtype=torch.float64))
    state["p"] = 0.5
    torch.manual_seed(1)
    expected = f(torch.ones_like(x))
    torch.manual_seed(1)
    close(jacobian(f, x, mode="jvp_loop"), torch.diag(expected))


def test_asking_for_the_mode_leaves_the_random_numbers():
    state = torch.get_rng_state()
    which_mode(lambda x: F.dropout(x, 0.5), normal(3))
    assert torch.equal(torch.get_rng_state(), state)


def test_random_numbers_of_the_caller_go_on_between_blocks():
    x = torch.ones(6, dtype=torch.float64)
    drawn = []
    for _ in jacobian_blocks(lambda x: F.dropout(x, 0.5), x, mode="vjp_loop", chunk_size=2):
        drawn.append(torch.rand(()).item())
    assert len(set(drawn)) == 3

"""Dense Jacobians and Hessians against torch.autograd.functional, closed forms and each other."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hvpopt.experiments.benchmarks.timing import peak_bytes
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from hvpopt.jacobians import (
    Block,
    hessian,
    hessian_blocks,
    jacobian,
    jacobian_blocks,
    which_mode,
)
from hvpopt.jacobians.functions import Problem

ROWS = ["vjp_loop", "vjp_vmap", "jacrev"]
COLUMNS = ["dual_loop", "jvp_loop", "jacfwd"]
SIX = [*ROWS, *COLUMNS]
HESSIANS = ["forward_over_reverse", "reverse_over_reverse", "hvp_loop"]

every_way = pytest.mark.parametrize("mode", [*SIX, "auto"])
every_hessian = pytest.mark.parametrize("mode", [*HESSIANS, "auto"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


class Attention(nn.Module):
    """One causal transformer block with its usual fast attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (2, 6)).transpose(1, 2).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "tanh": lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)),
    "convolution": lambda: nn.Sequential(
        nn.Conv1d(3, 2, 2), nn.GroupNorm(1, 2), nn.SiLU(), nn.Flatten(), nn.Linear(6, 2)
    ),
    "batch norm": lambda: nn.Sequential(nn.Conv1d(3, 2, 2), nn.BatchNorm1d(2), nn.Softplus()),
    "attention": Attention,
    "lstm": Recurrent,
}


def network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return NETWORKS[name]().double(), normal(3, 3, 4, seed=5)


def output_of(net: nn.Module, x: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    """The network's output as a function of its parameters; buffers stay as they are."""
    buffers = dict(net.named_buffers())

    def output(params: dict[str, Tensor]) -> Tensor:
        copies = {name: b.clone() for name, b in buffers.items()}
        return functional_call(net, (params, copies), (x,))

    return output


def params_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in net.named_parameters()}


def on_flat(f: Callable[[Any], Tensor], tree: Any) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """f as a function of one vector, and the vector."""
    leaves, spec = pytree.tree_flatten(tree)
    sizes = [x.numel() for x in leaves]

    def g(v: Tensor) -> Tensor:
        parts = [p.reshape(x.shape) for p, x in zip(v.split(sizes), leaves, strict=True)]
        return f(pytree.tree_unflatten(parts, spec))

    return g, torch.cat([x.reshape(-1) for x in leaves])


def matrix(blocks: Any, rows: int) -> Tensor:
    """A tree of blocks of one output as a matrix."""
    return torch.cat([b.reshape(rows, -1) for b in pytree.tree_leaves(blocks)], 1)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# ---- Jacobians


@every_way
def test_the_jacobian_of_a_linear_map_is_its_matrix(mode):
    a = normal(3, 5)
    close(jacobian(lambda x: a @ x, normal(5), mode=mode), a)


@every_way
def test_the_jacobian_of_softmax_is_its_covariance(mode):
    z = normal(6)
    p = z.softmax(0)
    close(jacobian(lambda z: z.softmax(0), z, mode=mode), torch.diag(p) - torch.outer(p, p))


@every_way
@pytest.mark.parametrize("name", NETWORKS)
def test_weights_jacobians_are_those_of_autograd_functional(name, mode):
    net, x = network(name)
    f, params = output_of(net, x), params_of(net)
    g, flat = on_flat(f, params)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.autograd.functional.jacobian(g, flat)
    found = jacobian(f, params, mode=mode)
    assert list(found) == list(params)
    shape = f(params).shape
    for key, p in params.items():
        assert found[key].shape == (*shape, *p.shape)
        assert not found[key].requires_grad
    close(matrix(found, shape.numel()), expected.reshape(shape.numel(), -1))


@every_way
@pytest.mark.parametrize("name", NETWORKS)
def test_inputs_jacobians_are_those_of_autograd_functional(name, mode):
    net, x = network(name)
    f = net.eval()
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.autograd.functional.jacobian(f, x)
    close(jacobian(f, x, mode=mode), expected)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("mode", SIX)
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_chunks_change_nothing(mode, chunk_size):
    w, x = normal(7, 5), normal(5, seed=1)

    def f(x: Tensor) -> dict[str, Tensor]:
        y = torch.tanh(w @ x)
        return {"first": y[:3].reshape(3, 1), "rest": y[3:].sum() * y}

    expected = torch.func.jacrev(f)(x)
    found = jacobian(f, x, mode=mode, chunk_size=chunk_size)
    close(found["first"], expected["first"])
    close(found["rest"], expected["rest"])


@every_way
def test_several_arguments_and_outputs_nest_as_in_torch_func(mode):
    tree, x, scale = {"a": normal(2), "b": [normal(2, 3, seed=1)]}, normal(3, seed=2), normal()

    def f(p: Any, n: int, x: Tensor, s: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = p["b"][0] @ x * n
        return y.sum(), {"y": torch.sin(y) * s + p["a"]}

    args = (tree, 2, x, scale)
    for argnums in (0, 2, -1, (2, 0), (3,)):
        found = jacobian(f, *args, argnums=argnums, mode=mode)
        positive = 3 if argnums == -1 else argnums
        expected = torch.func.jacrev(f, argnums=positive)(*args)
        assert pytree.tree_structure(found) == pytree.tree_structure(expected)
        for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
            assert a.shape == b.shape
            close(a, b)


@every_way
def test_what_f_does_not_depend_on_has_zeros(mode):
    x, y = normal(3), normal(2)
    constant = normal(4)
    found = jacobian(lambda x, y: (constant, x.exp()), x, y, argnums=(0, 1), mode=mode)
    expected = [[(4, 3), (4, 2)], [(3, 3), (3, 2)]]
    assert [[tuple(b.shape) for b in row] for row in found] == expected
    close(found[1][0], torch.diag(x.exp()))
    assert not any(b.any() for b in (found[0][0], found[0][1], found[1][1]))


@every_way
def test_the_identity_scalars_and_empty_tensors_have_jacobians(mode):
    close(jacobian(lambda x: x, normal(3), mode=mode), torch.eye(3, dtype=torch.float64))
    close(jacobian(torch.sin, normal(), mode=mode), normal().cos())
    assert jacobian(lambda x: x[:0], normal(3), mode=mode).shape == (0, 3)
    assert jacobian(torch.sum, normal(0, 2), mode=mode).shape == (0, 2)


@every_way
def test_the_result_has_the_dtype_of_the_input(mode):
    found = jacobian(lambda x: (2 * x).double(), torch.ones(2), mode=mode)
    torch.testing.assert_close(found, 2 * torch.eye(2))


@every_way
def test_neither_recording_nor_inference_mode_outside_matter(mode):
    net = nn.Linear(3, 2).double()
    x = normal(3)
    with torch.inference_mode():
        inside = jacobian(net, x.clone(), mode=mode)
    with torch.no_grad():
        close(jacobian(net, x, mode=mode), net.weight)
    close(inside, net.weight.detach())


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


# ---- batches


def examples_jacobians(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """One example at a time, by torch.autograd.functional."""
    with sdpa_kernel(SDPBackend.MATH):
        each = [torch.autograd.functional.jacobian(lambda e: f(e[None])[0], e) for e in x]
    return torch.stack(each)


@every_way
@pytest.mark.parametrize("name", NETWORKS)
def test_a_batch_has_each_examples_own_jacobian(name, mode):
    net, x = network(name)
    found = jacobian(net.eval(), x, mode=mode, batched=True)
    close(found, examples_jacobians(net, x))


@pytest.mark.parametrize("mode", SIX)
def test_a_batch_takes_one_examples_number_of_rows_or_columns(mode):
    """Counted in derivatives of sin that are computed, over the whole batch of 50."""
    num_examples, n, m = 50, 3, 2
    w = normal(m, n)
    x = normal(num_examples, n)
    worked = []

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(y: Tensor) -> Tensor:
            return y.sin()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(inputs[0])
            ctx.save_for_forward(inputs[0])

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            worked.append(grad.shape)
            return grad * ctx.saved_tensors[0].cos()

        @staticmethod
        def jvp(ctx: Any, tangent: Tensor) -> Tensor:
            worked.append(tangent.shape)
            return tangent * ctx.saved_tensors[0].cos()

        @staticmethod
        def vmap(info: Any, in_dims: Any, y: Tensor) -> tuple[Tensor, int]:
            return y.movedim(in_dims[0], 0).sin(), 0

    def f(x: Tensor) -> Tensor:
        return Counted.apply(x @ w.T)

    if mode in ("vjp_vmap", "jacrev", "jacfwd"):
        f_vmapped = lambda x: (x @ w.T).sin()  # noqa: E731
        found = jacobian(f_vmapped, x, mode=mode, batched=True)
        peak = peak_bytes(
            lambda: jacobian(f_vmapped, x, mode=mode, batched=True), torch.device("cpu")
        )
        assert peak < 8 * 20 * num_examples * (m * n + m + n)  # the square has 8·2500·6 bytes
    else:
        found = jacobian(f, x, mode=mode, batched=True)
        lines = m if mode == "vjp_loop" else n
        assert len(worked) == lines + 1  # and one for the check
    close(found, (x @ w.T).cos()[:, :, None] * w)


def test_a_batch_of_trees_has_trees_of_jacobians():
    x = {"a": normal(4, 2), "b": normal(4, 3, 2, seed=1)}

    def f(x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return x["a"].sin(), (x["b"] @ x["a"][:, :, None])[..., 0].sum(1)

    for mode in SIX:
        first, second = jacobian(f, x, mode=mode, batched=True)
        close(first["a"], torch.diag_embed(x["a"].cos()))
        assert not first["b"].any()
        close(second["a"], x["b"].sum(1))
        close(second["b"], x["a"][:, None].expand(4, 3, 2))
        assert second["b"].shape == (4, 3, 2)


@every_way
def test_examples_that_depend_on_each_other_are_refused(mode):
    net, x = network("batch norm")
    coupled = "f's value for one example depends on other examples .*BatchNorm in training mode"
    params, buffers = params_of(net), dict(net.named_buffers())

    def train(x: Tensor) -> Tensor:
        copies = {name: b.clone() for name, b in buffers.items()}
        return functional_call(net, (params, copies), (x,))

    with pytest.raises(ValueError, match=coupled):
        jacobian(train, x, mode=mode, batched=True)
    with pytest.raises(ValueError, match=coupled):
        jacobian(lambda x: x.cumsum(0), normal(2, 3), mode=mode, batched=True)
    with pytest.raises(ValueError, match=coupled):  # one pair of many
        jacobian(lambda x: x + (x[4] * torch.eye(9)[:, :1]), normal(9, 3), mode=mode, batched=True)


def test_batched_takes_and_gives_examples():
    with pytest.raises(ValueError, match=r"the input has a tensor of shape \(\)"):
        jacobian(torch.sin, normal(), batched=True)
    with pytest.raises(ValueError, match=r"shape \(2, 3\); expected the same first dimension"):
        jacobian(lambda x: x[0], [normal(4), normal(2, 3)], batched=True)
    with pytest.raises(ValueError, match=r"f's value has .* shape \(3,\); expected \(4, \.\.\.\)"):
        jacobian(lambda x: x.sum(0), normal(4, 3), batched=True)


# ---- Hessians


@every_hessian
def test_the_hessian_of_a_quadratic_is_its_matrix(mode):
    a = normal(5, 5)
    close(hessian(lambda x: 0.5 * x @ a @ x, normal(5, seed=1), mode=mode), (a + a.T) / 2)


@every_hessian
@pytest.mark.parametrize("name", NETWORKS)
def test_weights_hessians_are_those_of_autograd_functional(name, mode):
    net, x = network(name)
    f, params = output_of(net, x), params_of(net)

    def loss(params: dict[str, Tensor]) -> Tensor:
        return (f(params) + 1).square().mean()

    g, flat = on_flat(loss, params)
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.autograd.functional.hessian(g, flat)
    found = hessian(loss, params, mode=mode)
    assert list(found) == list(params)
    rows = [matrix(found[name], p.numel()) for name, p in params.items()]
    for name_, p in params.items():
        for other, q in params.items():
            assert found[name_][other].shape == (*p.shape, *q.shape)
    close(torch.cat(rows), expected)


@every_hessian
@pytest.mark.parametrize("argnums", [0, 1, (0, 1), (1,)])
def test_hessians_nest_as_in_torch_func(argnums, mode):
    x, y = normal(3), {"a": normal(2), "b": normal(2, 3, seed=1)}

    def f(x: Tensor, y: dict[str, Tensor]) -> Tensor:
        return (torch.tanh(y["b"] @ x) * y["a"].exp()).sum()

    found = hessian(f, x, y, argnums=argnums, mode=mode, chunk_size=2)
    expected = torch.func.hessian(f, argnums=argnums)(x, y)
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert a.shape == b.shape
        close(a, b)


@every_hessian
def test_functions_without_curvature_have_a_zero_hessian(mode):
    for f in (torch.sum, lambda x: torch.zeros((), dtype=torch.float64)):
        found = hessian(f, normal(2, 2), mode=mode)
        assert found.shape == (2, 2, 2, 2)
        assert not found.any()


# ---- blocks and memory


@pytest.mark.parametrize("mode", SIX)
def test_blocks_are_consecutive_parts_of_the_matrix(mode):
    w, tree = normal(7, 5), {"a": normal(2), "b": normal(3, 1)}

    def f(p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        y = torch.tanh(w @ torch.cat([p["a"], p["b"][:, 0]]))
        return y[:4].reshape(2, 2), y[4:]

    g, flat = on_flat(lambda p: torch.cat([y.flatten() for y in f(p)]), tree)
    whole = torch.autograd.functional.jacobian(g, flat)
    blocks = list(jacobian_blocks(f, tree, mode=mode, chunk_size=3))
    assert all(isinstance(b, Block) for b in blocks)
    axis = "rows" if mode in ROWS else "columns"
    assert {b.axis for b in blocks} == {axis}
    count = 7 if axis == "rows" else 5
    assert [b.start for b in blocks] == list(range(0, count, 3))
    assert [b.stop for b in blocks] == [min(b.start + 3, count) for b in blocks]
    close(torch.cat([b.value for b in blocks], 0 if axis == "rows" else 1), whole)


@every_hessian
def test_blocks_of_a_hessian_are_its_rows(mode):
    net, x = network("tanh")
    f, params = output_of(net, x), params_of(net)
    g, flat = on_flat(lambda p: f(p).square().sum(), params)
    blocks = list(hessian_blocks(lambda p: f(p).square().sum(), params, mode=mode, chunk_size=8))
    close(torch.cat([b.value for b in blocks]), torch.autograd.functional.hessian(g, flat))
    assert {b.axis for b in blocks} == {"rows"}


def test_blocks_are_computed_when_they_are_asked_for():
    runs = []

    def f(x: Tensor) -> Tensor:
        runs.append(1)
        return x.sin()

    blocks = jacobian_blocks(f, normal(100), mode="jvp_loop", chunk_size=10)
    before = len(runs)
    next(blocks)
    assert len(runs) == before + 10
    assert torch.is_grad_enabled()
    assert list(jacobian_blocks(torch.sin, normal(0))) == []


@pytest.mark.parametrize("function", [jacobian, hessian])
def test_a_result_larger_than_the_budget_is_refused_with_its_size(function):
    x = torch.zeros(1000)
    value = torch.sin if function is jacobian else (lambda x: x.sin().sum())
    name = function.__name__
    message = (
        rf"The {name.title()} of shape 1,000 × 1,000 needs 3\.8 MiB; the memory budget is "
        rf"976\.6 KiB\. .*{name}_blocks"
    )
    with pytest.raises(ValueError, match=message):
        function(value, x, memory_budget=10**6)


def test_the_default_budget_refuses_what_no_machine_holds():
    x = torch.zeros(10**7)
    with pytest.raises(ValueError, match=r"needs 363\.8 TiB; the memory budget is"):
        hessian(lambda x: x.square().sum(), x)
    assert next(iter(hessian_blocks(lambda x: x.square().sum(), x, chunk_size=2))).value.shape == (
        2,
        10**7,
    )


@pytest.mark.parametrize("mode", ["vjp_vmap", "jacrev", "jacfwd"])
@pytest.mark.parametrize("name", ["convolution", "attention"])
def test_a_vmapped_way_stays_within_the_budget(name, mode):
    net, x = network(name)
    f, params = output_of(net, x.repeat(40, 1, 1)), params_of(net)

    def task(budget: int | None) -> Any:
        return jacobian(f, params, mode=mode, memory_budget=budget)

    cpu = torch.device("cpu")
    expected = task(None)
    size = sum(b.nbytes for b in expected.values())
    unlimited = peak_bytes(lambda: task(None), cpu)
    budget = size + (unlimited - size) // 2
    assert size < 0.8 * unlimited
    for key, found in task(budget).items():
        close(found, expected[key])
    assert size < peak_bytes(lambda: task(budget), cpu) < budget


def test_blocks_stay_within_the_budget():
    w = normal(500, 500)
    budget = 2**19

    def task() -> None:
        for block in jacobian_blocks(
            lambda x: torch.tanh(w @ x), w[0], mode="vjp_vmap", memory_budget=budget
        ):
            assert 1 < block.value.shape[0] < 500

    assert peak_bytes(task, torch.device("cpu")) < budget


# ---- the automatic choice


def test_the_shapes_decide_between_rows_and_columns():
    wide, tall = normal(2, 400), normal(400, 2)
    assert which_mode(lambda x: torch.tanh(wide @ x), normal(400)).mode in ROWS
    chosen = which_mode(lambda x: torch.tanh(tall @ x), normal(2))
    assert chosen.mode in COLUMNS
    assert chosen.reason.startswith("400 × 2, fewer columns; ")
    assert which_mode(lambda x: x.sin().sum(), normal(50)).mode == "vjp_loop"
    assert which_mode(lambda x: x.sin().expand(50), normal()).mode == "dual_loop"
    # of one example: 3 × 40, not 150 × 2000
    w = normal(3, 40)
    batched = which_mode(lambda x: x @ w.T, normal(50, 40), batched=True)
    assert batched.reason.startswith("3 × 40, fewer rows; ")
    assert batched.mode in ROWS


def test_a_choice_is_measured_once_remembered_and_logged(caplog):
    caplog.set_level(logging.INFO, "hvpopt")
    calls = []
    w = normal(6, 5)

    def make() -> Callable[[Tensor], Tensor]:
        def f(x: Tensor) -> Tensor:
            calls.append(1)
            return torch.tanh(w @ x)

        return f

    jacobian(make(), normal(5))
    first = len(calls)
    jacobian(make(), normal(5, seed=1))  # the same code, made again
    assert len(calls) - first <= 5
    jacobian(make(), normal(5))
    chosen = which_mode(make(), normal(5))
    assert chosen.reason.startswith("6 × 5; ")
    assert " ms" in chosen.reason
    assert [r.getMessage() for r in caplog.records] == [
        f"Derivatives by {chosen.mode} ({chosen.reason})."
    ]
    which_mode(make(), normal(5).float().double()[None].squeeze(0))
    assert len(caplog.records) == 1


def test_asking_for_the_mode_leaves_the_random_numbers():
    state = torch.get_rng_state()
    which_mode(lambda x: F.dropout(x, 0.5), normal(3))
    assert torch.equal(torch.get_rng_state(), state)


def test_functions_are_remembered_whatever_they_capture():
    def g(x: Tensor, n: int = 2) -> Tensor:
        return x if n == 0 else g(x.sin(), n - 1)

    class Scaled:
        scale = 2.0

        def value(self, x: Tensor) -> Tensor:
            return later(x) if self.scale == 0 else self.scale * x

    partly = functools.partial(torch.mul, normal())
    for f in (g, Scaled().value, Scaled().value, partly, torch.sin, nn.Tanh(), lambda x: g(x)):
        x = normal(3, seed=1)
        close(jacobian(f, x), torch.diag(torch.func.vmap(torch.func.grad(f))(x)))
    later = torch.cos  # until here an empty cell


def test_hessians_are_chosen_too():
    chosen = which_mode(lambda x: x.sin().prod(), normal(4), of="hessian")
    assert chosen.mode in HESSIANS
    assert all(name in chosen.reason for name in HESSIANS)


class NoForward(torch.autograd.Function):
    """exp, of reverse mode alone, and without vmap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


@pytest.mark.parametrize("n", [1, 3])
def test_what_an_operation_does_not_support_is_not_chosen(n):
    w, x = normal(40, n), normal(n, seed=1)

    def f(x: Tensor) -> Tensor:
        return NoForward.apply(w @ x)

    close(jacobian(f, x), (w @ x).exp()[:, None] * w)
    chosen = which_mode(f, x)
    assert chosen.mode == "vjp_loop"
    assert "dual_loop failed: " in chosen.reason


def test_a_function_that_fails_in_every_way_raises_its_own_error():
    def f(x: Tensor) -> Tensor:
        raise RuntimeError("of my own")

    with pytest.raises(RuntimeError, match="of my own"):
        jacobian(f, normal(3))


def test_a_memory_of_another_function_does_no_harm():
    """The code is the same, and what it captures looks the same, but its value has grown."""
    sizes = {"m": 2}
    w = normal(400, 4)

    def f(x: Tensor) -> Tensor:
        return torch.tanh(w[: sizes["m"]] @ x)

    x = normal(4, seed=1)
    for m in (2, 400, 3):
        sizes["m"] = m
        for mode in ("auto", "jacfwd", "vjp_vmap"):
            assert jacobian(f, x, mode=mode).shape == (m, 4)
    assert which_mode(f, x).reason.startswith("3 × 4")


# ---- errors


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.arange(3), TypeError, r"args\[0\] is torch.int64; expected real floating point"),
        (torch.ones(3, dtype=torch.cfloat), TypeError, r"args\[0\] is complex"),
        ({"w": 1.5}, TypeError, r"args\[0\]\['w'\] is a float; expected a tensor"),
        ([], ValueError, r"args\[0\] hold no tensor"),
    ],
)
def test_what_is_differentiated_must_be_real_tensors(x, error, message):
    for function in (jacobian, hessian, jacobian_blocks, which_mode):
        with pytest.raises(error, match=message):
            function(lambda x: x, x)


@every_way
@pytest.mark.parametrize(
    ("f", "error", "message"),
    [
        (lambda x: x > 0, TypeError, "the value of f is torch.bool; expected real floating"),
        (lambda x: x.to(torch.cfloat), TypeError, "the value of f is complex"),
        (lambda x: (x, 3), TypeError, r"the value of f\[1\] is a int; expected a tensor"),
        (lambda x: [], ValueError, "the value of f hold no tensor"),
    ],
)
def test_the_value_must_be_real_tensors(f, error, message, mode):
    with pytest.raises(error, match=message):
        jacobian(f, normal(3), mode=mode)


@every_hessian
def test_hessians_are_of_scalars(mode):
    with pytest.raises(ValueError, match=r"f returned a tensor of shape \(3,\); expected a scalar"):
        hessian(torch.sin, normal(3), mode=mode)
    with pytest.raises(TypeError, match="f returned a float; expected a scalar tensor"):
        hessian(lambda x: 1.0, normal(3), mode=mode)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "jackrev"}, ValueError, "mode='jackrev' is unknown: choose one of 'auto', "),
        ({"chunk_size": 0}, ValueError, "chunk_size=0; expected a positive int, or None"),
        ({"chunk_size": -2}, ValueError, "chunk_size=-2; expected a positive int"),
        ({"chunk_size": 1.5}, ValueError, "chunk_size=1.5; expected a positive int"),
        ({"memory_budget": 0}, ValueError, "memory_budget=0; expected a positive int"),
        ({"argnums": 1}, ValueError, r"argnums=1, but f was given 1 argument"),
        ({"argnums": (0, -1)}, ValueError, r"argnums=\(0, -1\) name an argument twice"),
        ({"argnums": "x"}, TypeError, "argnums='x'; expected an int or a tuple of ints"),
        ({"argnums": [0]}, TypeError, r"argnums=\[0\]; expected an int or a tuple of ints"),
        ({"argnums": ()}, TypeError, r"argnums=\(\); expected an int or a tuple of ints"),
        ({"argnums": True}, TypeError, "argnums=True; expected an int or a tuple of ints"),
    ],
)
def test_options_out_of_range_are_named(options, error, message):
    for function in (jacobian, hessian, jacobian_blocks, hessian_blocks):
        with pytest.raises(error, match=message):
            function(torch.sum, normal(3), **options)


def test_which_mode_is_of_a_jacobian_or_a_hessian():
    with pytest.raises(ValueError, match="of='gradient'; expected 'jacobian' or 'hessian'"):
        which_mode(torch.sum, normal(3), of="gradient")


def test_transforms_around_are_refused():
    def penalty(x: Tensor) -> Tensor:
        return jacobian(torch.sin, x).square().sum()

    for transformed in (torch.func.grad(penalty), torch.vmap(penalty)):
        with pytest.raises(RuntimeError, match="cannot run inside vmap, grad or another transform"):
            transformed(normal(3, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NETWORKS)
def test_all_ways_agree_on_a_gpu(name):
    net, x = network(name)
    net, x = net.cuda().eval(), x.cuda()
    f, params = output_of(net, x), params_of(net)
    expected = jacobian(f, params, mode="vjp_loop")
    for mode in [*SIX[1:], "auto"]:
        found = jacobian(f, params, mode=mode)
        for key in params:
            assert found[key].device == x.device
            torch.testing.assert_close(found[key], expected[key], rtol=1e-8, atol=1e-9)
    jacobian(net, x, batched=True)


@pytest.mark.parametrize("mode", ["vjp_loop", "jacfwd"])
def test_independent_examples_pass_in_low_precision(mode):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(16, 8)
    exact = jacobian(net, x, mode=mode, batched=True)
    net, x = net.bfloat16(), x.bfloat16()
    found = jacobian(net, x, mode=mode, batched=True)
    assert (found - exact).norm() < 0.05 * exact.norm()
    with pytest.raises(ValueError, match="lower precision"):
        jacobian(lambda x: net(x - x.mean(0)), x[:2], mode=mode, batched=True)


@pytest.mark.parametrize("mode", ["vjp_loop", "jacfwd"])
def test_independent_examples_pass_under_autocast(mode):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    x = torch.randn(16, 8)
    exact = jacobian(net, x, mode=mode, batched=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = jacobian(net, x, mode=mode, batched=True)
    assert (found - exact).norm() < 0.05 * exact.norm()


def test_random_numbers_of_the_caller_go_on_between_blocks():
    x = torch.ones(6, dtype=torch.float64)
    drawn = []
    for _ in jacobian_blocks(lambda x: F.dropout(x, 0.5), x, mode="vjp_loop", chunk_size=2):
        drawn.append(torch.rand(()).item())
    assert len(set(drawn)) == 3


def test_functions_that_differ_in_options_are_told_apart():
    def made(power: int, default: str) -> Callable[[Tensor], Tensor]:
        return lambda x, kind=default: (x**power).sin() if kind == "sin" else x**power

    x = normal(3)
    keys = {Problem(made(*o), (x,), 0, scalar=False).key for o in [(2, "a"), (3, "a"), (2, "sin")]}
    assert len(keys) == 3
    same = Problem(made(2, "a"), (x,), 0, scalar=False).key
    assert same in keys

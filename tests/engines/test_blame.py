"""Where a model cannot be served, the error names the module, the operation and the remedy."""

import pytest
import torch
import torch.nn.functional as F
from blamed import SERVES, Call, Head, Recognizer, directions, product, task
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from hvpopt.closure import ClosureOracle
from hvpopt.engines.blame import UnsupportedOperationError


@pytest.mark.parametrize(
    ("engine", "lack", "remedy"),
    [
        ("graph", "double backward", f"engine='dual' or engine='finite_difference' {SERVES}"),
        ("dual", "forward mode", f"engine='graph' or engine='finite_difference' {SERVES}"),
    ],
)
def test_an_operation_without_derivatives_is_named_with_its_module(engine, lack, remedy):
    closure, params = task(Recognizer())
    message = (
        rf"^Module 'head\.ctc' \(CTCLoss\): torch has no {lack} of ctc_loss\. Choose {remedy}, or "
        r"replace the operation by differentiable ones\.$"
    )
    with pytest.raises(UnsupportedOperationError, match=message) as caught:
        product(closure, params, engine)
    assert "ctc_loss" in str(caught.value.__cause__)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_the_log_says_why_an_engine_failed_in_the_same_terms(caplog):
    caplog.set_level("INFO", "hvpopt")
    closure, params = task(Recognizer())
    product(closure, params, "auto")
    assert "graph failed: no double backward of ctc_loss in module 'head.ctc'" in caplog.text
    assert "no forward mode of ctc_loss in module 'head.ctc'" in caplog.text


def with_a_split(net, x):
    return net(x) + F.cross_entropy(net.encoder(x), torch.arange(8) % 3)


def test_the_ggn_that_no_engine_has_goes_by_differences_of_the_hessian():
    closure, params = task(Recognizer(), with_a_split)
    message = (
        r"products of the ggn for this closure \(graph: no double backward of ctc_loss in module "
        r"'head\.ctc' .*; dual: .*\)\. Choose curvature='hessian', which goes through finite "
        r"differences, or replace the operation"
    )
    with pytest.raises(UnsupportedOperationError, match=message):
        product(closure, params, "auto", "ggn")
    message = r"'head\.ctc'.*engine='dual', or engine='finite_difference' with curvature='hessian'"
    with pytest.raises(UnsupportedOperationError, match=message):
        product(closure, params, "graph", "ggn")


def test_an_operation_of_the_closure_itself_is_said_to_be():
    def call(net, x):
        return Head().ctc.forward(  # which is no call of a module
            net(x).reshape(4, 2, 3).log_softmax(-1),
            torch.tensor([1, 2, 1]),
            torch.tensor([4, 4]),
            torch.tensor([2, 1]),
        )

    closure, params = task(nn.Linear(5, 3), call)
    for engine, lack in (("graph", "double backward"), ("dual", "forward mode")):
        message = rf"^In the closure itself: torch has no {lack} of ctc_loss\. Choose"
        with pytest.raises(UnsupportedOperationError, match=message):
            product(closure, params, engine)


def sample(x: Tensor) -> Tensor:
    grid = torch.zeros(1, 2, 2, 2, dtype=x.dtype)
    return F.grid_sample(x.reshape(1, 1, 8, 5), grid, align_corners=True)


@pytest.mark.parametrize(
    ("function", "engine", "operation"),
    [
        (torch.pdist, "graph", "double backward of pdist"),
        (torch.pdist, "dual", "forward mode of pdist_forward"),
        (F.hardsigmoid, "graph", "double backward of hardsigmoid"),
        (F.hardsigmoid, "dual", "forward mode of hardsigmoid_backward"),
        (sample, "dual", "forward mode of grid_sampler_2d"),
    ],
)
def test_torchs_different_sentences_are_read(function, engine, operation):
    net = nn.Sequential(nn.Linear(5, 5), nn.Sequential(nn.Tanh(), Call(function)))
    closure, params = task(net)
    with pytest.raises(UnsupportedOperationError, match=rf"'1\.1' \(Call\): .* {operation}\."):
        product(closure, params, engine)


def test_further_modules_with_the_same_operation_are_counted():
    net = nn.Sequential(nn.Linear(5, 5), nn.Hardsigmoid(), nn.Hardsigmoid(), nn.Hardsigmoid())
    closure, params = task(net)
    with pytest.raises(
        UnsupportedOperationError, match=r"^Module '1' \(Hardsigmoid\) and 2 more: .*hardsigmoid\."
    ):
        product(closure, params, "graph")


class Outer(nn.Module):
    """Calls an operation itself, and hands the result to a module by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(input=F.hardsigmoid(x))


def test_what_a_module_hands_to_another_is_its_own():
    closure, params = task(nn.Sequential(nn.Linear(5, 5), Outer()))
    with pytest.raises(UnsupportedOperationError, match=r"^Module '1' \(Outer\): "):
        product(closure, params, "graph")


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(5, 5), Call(torch.pdist))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


@pytest.mark.parametrize("engine", ["graph", "dual"])
def test_a_module_in_a_checkpointed_layer_is_found(engine):
    closure, params = task(Checkpointed())
    with pytest.raises(UnsupportedOperationError, match=r"^Module 'layer\.1' \(Call\): .*pdist"):
        product(closure, params, engine)


def test_forward_mode_inside_the_closure_is_the_graph_engines():
    def slope(x: Tensor) -> Tensor:
        return torch.func.jvp(torch.sin, (x,), (torch.ones_like(x),))[1]

    closure, params = task(nn.Sequential(nn.Linear(5, 5), Call(slope)))
    message = r"^Module '1' .*no forward mode inside forward mode, .* Choose engine='graph'"
    with pytest.raises(UnsupportedOperationError, match=message):
        product(closure, params, "dual")


def test_the_names_that_compilation_and_data_parallelism_add_are_left_out():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        net = DistributedDataParallel(torch.compile(Recognizer().double(), backend="eager"))
        closure, params = task(net)
        for engine in ("graph", "dual"):
            with pytest.raises(UnsupportedOperationError, match=r"^Module 'head\.ctc' \(CTCLoss\)"):
                product(closure, params, engine)
    finally:
        torch.distributed.destroy_process_group()


def hooks() -> int:
    return sum(len(held) for name, held in vars(torch_module).items() if "_hooks" in name and held)


def test_finding_the_module_leaves_no_trace():
    def net() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Hardsigmoid())

    plain, ours = net(), net()
    task(plain)[0]()
    expected_random = torch.rand(3)
    closure, params = task(ours)
    num_hooks = hooks()
    with ClosureOracle(closure, params, engine="graph") as oracle:
        point = oracle.trace()
        for _ in range(2):
            with pytest.raises(UnsupportedOperationError, match="hardsigmoid"):
                point.product(directions(params))
    assert hooks() == num_hooks
    assert torch.equal(torch.rand(3), expected_random)
    for a, b in zip(ours.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(params, plain.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.grad, b.grad)

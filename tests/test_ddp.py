"""Two processes under DistributedDataParallel against one process on the joined batch."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from problems import flat, problem
from ranks import in_two_processes
from torch import nn

import hvpopt
from hvpopt.closure import ClosureOracle
from hvpopt.preconditioners import Nystrom
from hvpopt.solvers.stopping import ResidualNorm


def _loss_closure(net, x, y, params):
    def closure():
        for p in params:
            p.grad = None
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        return loss

    return closure


def _parallel(rank):
    task = problem("mlp")
    net = nn.parallel.DistributedDataParallel(task.net)
    rows = slice(3 * rank, 3 * rank + 3)
    return task, _loss_closure(net, task.x[rows], (torch.arange(6) % 3)[rows], task.params)


def _products(rank):
    results = {}
    for engine in ("dual", "graph", "finite_difference"):
        for curvature in ("hessian", "ggn"):
            if (engine, curvature) == ("finite_difference", "ggn"):
                continue
            task, closure = _parallel(rank)
            with ClosureOracle(closure, task.params, engine=engine) as oracle:
                loss, grad, product = oracle.trace_along(task.tangent(), curvature)
                evaluated = oracle.evaluate()
            closure()  # an ordinary step in between goes on working
            results[engine, curvature] = (loss, evaluated, flat(grad), flat(product))
    return results


def test_products_are_those_of_the_joined_batch(tmp_path):
    task = problem("mlp")
    dense = {"hessian": task.dense_hessian(), "ggn": task.dense_ggn()}
    task.closure()()
    expected_grad = flat([p.grad for p in task.params])
    for (engine, curvature), got in in_two_processes(_products, tmp_path).items():
        loss, evaluated, grad, product = got
        tolerance = 1e-6 if engine == "finite_difference" else 1e-10
        torch.testing.assert_close(loss, task.loss(task.net(task.x)).detach())
        torch.testing.assert_close(evaluated, loss)
        torch.testing.assert_close(grad, expected_grad)
        expected = dense[curvature] @ flat(task.tangent())
        torch.testing.assert_close(product, expected, rtol=tolerance, atol=tolerance)


def _train(make, closure, params):
    optimizer = make(params)
    for _ in range(5):
        optimizer.step(closure)
    return flat(params), optimizer.last_report.num_closure_runs


OPTIMIZERS = {
    "newton_cg": lambda p: hvpopt.NewtonCG(p, preconditioner=None),
    "newton_cg kronecker": hvpopt.NewtonCG,
    "newton_cg hessian": lambda p: hvpopt.NewtonCG(p, curvature="hessian"),
    "trust_region": hvpopt.TrustRegionNewtonCG,
    "newton_cg nystrom": lambda p: hvpopt.NewtonCG(
        p, damping=0.1, preconditioner=Nystrom(rank=4), cg_stop=ResidualNorm(rtol=1e-11)
    ),
    "adahessian": hvpopt.AdaHessian,
    "sophia_h": lambda p: hvpopt.SophiaH(p, update_every=3),
    "smd": hvpopt.SMD,
    "smd unguarded": lambda p: hvpopt.SMD(p, overshoot_guard=False),
}


def _all_train(rank):
    results = {}
    for name, make in OPTIMIZERS.items():
        task, closure = _parallel(rank)
        results[name] = _train(make, closure, task.params)
        others = [torch.zeros_like(results[name][0]) for _ in range(2)]
        dist.all_gather(others, results[name][0])
        assert torch.equal(*others)
    return results


def test_training_is_that_of_the_joined_batch(tmp_path):
    for name, (params, num_runs) in in_two_processes(_all_train, tmp_path).items():
        task = problem("mlp")
        alone, runs_alone = _train(OPTIMIZERS[name], task.closure(), task.params)
        if "kronecker" not in name:  # whose sampled labels are each rank's own
            torch.testing.assert_close(params, alone, rtol=1e-5, atol=1e-7)
            assert num_runs == runs_alone

"""Other libraries' ways to the same products, each written as its own users would."""

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad
from torch.func import functional_call, jvp, vjp
from torch.func import grad as func_grad

from .bounds import FlopBound
from .models import Params, Problem
from .tasks import (
    GGNS,
    HVPS,
    ONE_SHOT_GGN,
    ONE_SHOT_HVP,
    REPEATED_GGN,
    REPEATED_HVP,
    Layout,
    Prepare,
    Product,
    Task,
)

Run = Callable[[], object]

NO_GRADIENT = " (no gradient)"
"""After the name of what returns less than a one-shot product is asked for."""


def peer_tasks(bound: FlopBound) -> list[Task]:
    """Other libraries' ways to one product.

    The operators of curvlinops and hessian-eigenthings keep nothing from one product to the next.
    """
    one_shot_hvp = partial(_task, ONE_SHOT_HVP, bound.one_shot_hvp)
    repeated_hvp = partial(_task, REPEATED_HVP, bound.repeated_hvp)
    one_shot_ggn = partial(_task, ONE_SHOT_GGN, bound.one_shot_ggn)
    repeated_ggn = partial(_task, REPEATED_GGN, bound.repeated_ggn)
    return [
        one_shot_hvp("double backward", _double_backward),
        one_shot_hvp("torch.func jvp of grad", _jvp_of_grad),
        one_shot_hvp(f"autograd.functional.hvp{NO_GRADIENT}", partial(_functional, name="hvp")),
        one_shot_hvp(f"autograd.functional.vhp{NO_GRADIENT}", partial(_functional, name="vhp")),
        one_shot_hvp(f"curvlinops{NO_GRADIENT}", partial(_curvlinops, name=_HESSIAN)),
        one_shot_hvp(f"hessian-eigenthings{NO_GRADIENT}", _eigenthings_hessian),
        repeated_hvp("double backward, retained", _retained_hvps),
        repeated_hvp("torch.func.linearize", _linearized_grad),
        repeated_hvp("curvlinops", partial(_curvlinops, name=_HESSIAN)),
        repeated_hvp("hessian-eigenthings", _eigenthings_hessian),
        one_shot_ggn("double backward", _one_shot_ggn),
        one_shot_ggn("torch.func jvp, vjp", _jvp_and_vjp),
        one_shot_ggn("curvlinops", partial(_curvlinops, name=_GGN)),
        one_shot_ggn("hessian-eigenthings", _eigenthings_ggn),
        repeated_ggn("double backward, retained", _retained_ggns),
        repeated_ggn("torch.func.linearize, vjp", _linearized_model),
        repeated_ggn("curvlinops", partial(_curvlinops, name=_GGN)),
        repeated_ggn("hessian-eigenthings", _eigenthings_ggn),
    ]


def many_vector_peer_tasks(bound: FlopBound, count: int) -> list[Task]:
    """Other libraries' ways to products with ``count`` vectors at one point."""
    hvps = partial(_task, HVPS[count], bound.repeated_hvp)
    ggns = partial(_task, GGNS[count], bound.repeated_ggn)

    def of(prepare: Callable[..., Run], **options: Any) -> Prepare:
        return partial(prepare, count=count, **options)

    return [
        hvps("double backward, one by one", of(_retained_hvps), "list"),
        hvps("double backward, batched", of(_batched_hvps), "rows"),
        hvps("torch.func jvp of grad, vmap", of(_jvp_of_grad), "rows"),
        hvps("torch.func.linearize, vmap", of(_linearized_grad), "rows"),
        hvps("curvlinops, matrix", of(_curvlinops, name=_HESSIAN), "columns"),
        hvps("hessian-eigenthings, one by one", of(_eigenthings_hessian), "list"),
        ggns("double backward, one by one", of(_retained_ggns), "list"),
        ggns("torch.func jvp, vjp, vmap", of(_jvp_and_vjp), "rows"),
        ggns("curvlinops, matrix", of(_curvlinops, name=_GGN), "columns"),
        ggns("hessian-eigenthings, one by one", of(_eigenthings_ggn), "list"),
    ]


def _task(
    product: Product, bound: float, engine: str, prepare: Prepare, layout: Layout = "one"
) -> Task:
    return Task(product, engine, bound, prepare, layout, is_ours=False)


# Plain torch.autograd on the module's own parameters.


def _lists(problem: Problem, count: int) -> list[list[Tensor]]:
    return [list(problem.direction(i).values()) for i in range(count)]


def _gradient(problem: Problem, parameters: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    loss = problem.loss(problem.module(problem.inputs))
    return loss, grad(loss, parameters, create_graph=True)


def _double_backward(problem: Problem, stack: ExitStack) -> Run:
    parameters: list[Tensor] = list(problem.module.parameters())
    (v,) = _lists(problem, 1)

    def run() -> object:
        loss, grads = _gradient(problem, parameters)
        products = grad(grads, parameters, v)
        return loss.detach(), [g.detach() for g in grads], products

    return run


def _retained_hvps(problem: Problem, stack: ExitStack, count: int = 1) -> Run:
    parameters: list[Tensor] = list(problem.module.parameters())
    vs = _lists(problem, count)
    _, grads = _gradient(problem, parameters)

    def product(v: list[Tensor]) -> object:
        return grad(grads, parameters, v, retain_graph=True)

    return partial(product, vs[0]) if count == 1 else lambda: [product(v) for v in vs]


def _batched_hvps(problem: Problem, stack: ExitStack, count: int) -> Run:
    parameters: list[Tensor] = list(problem.module.parameters())
    vs = list(problem.directions(count).values())
    _, grads = _gradient(problem, parameters)
    return lambda: list(grad(grads, parameters, vs, retain_graph=True, is_grads_batched=True))


def _ggn_graph(problem: Problem, parameters: list[Tensor]) -> Callable[[list[Tensor]], object]:
    """v ↦ Jᵀ∇²ℓ J v by reverse mode alone, J v as the derivative of u ↦ Jᵀu along v."""
    z = problem.module(problem.inputs)
    u = torch.zeros_like(z, requires_grad=True)
    pulled = grad(z, parameters, u, create_graph=True)
    leaf = z.detach().requires_grad_()
    (slope,) = grad(problem.loss(leaf), leaf, create_graph=True)

    def product(v: list[Tensor]) -> object:
        along = grad(pulled, u, v, retain_graph=True)
        curved = grad(slope, leaf, along, retain_graph=True)
        return grad(z, parameters, curved, retain_graph=True)

    return product


def _one_shot_ggn(problem: Problem, stack: ExitStack) -> Run:
    parameters: list[Tensor] = list(problem.module.parameters())
    (v,) = _lists(problem, 1)
    return lambda: _ggn_graph(problem, parameters)(v)


def _retained_ggns(problem: Problem, stack: ExitStack, count: int = 1) -> Run:
    parameters: list[Tensor] = list(problem.module.parameters())
    vs = _lists(problem, count)
    product = _ggn_graph(problem, parameters)
    return partial(product, vs[0]) if count == 1 else lambda: [product(v) for v in vs]


# torch.func on a function of the parameters, which is given copies of the buffers.


def _mapped(product: Callable[[Params], object], problem: Problem, count: int) -> Run:
    """The product with one vector, or under ``vmap`` with several."""
    if count == 1:
        v = problem.direction()
        return lambda: product(v)
    vs = problem.directions(count)
    return lambda: torch.vmap(product)(vs)


def _jvp_of_grad(problem: Problem, stack: ExitStack, count: int = 1) -> Run:
    params = problem.params()
    gradient_and_loss = torch.func.grad_and_value(problem.value)

    def product(v: Params) -> object:
        (grads, loss), (product, _) = jvp(gradient_and_loss, (params,), (v,))[:2]
        return (loss, grads, product) if count == 1 else product

    return _mapped(product, problem, count)


def _linearize(f: Callable[[Any], Any], at: Any) -> Any:
    with warnings.catch_warnings():  # of torch.fx's own making
        warnings.filterwarnings("ignore", "Attempted to insert a get_attr Node")
        return torch.func.linearize(f, at)


def _linearized_grad(problem: Problem, stack: ExitStack, count: int = 1) -> Run:
    _, product = _linearize(func_grad(problem.value), problem.params())
    return _mapped(product, problem, count)


def _jvp_and_vjp(problem: Problem, stack: ExitStack, count: int = 1) -> Run:
    params = problem.params()

    def product(v: Params) -> object:
        z, along = jvp(problem.output, (params,), (v,))[:2]
        curved = jvp(func_grad(problem.loss), (z,), (along,))[1]
        return vjp(problem.output, params)[1](curved)[0]

    def run() -> object:
        with torch.no_grad():
            return mapped()

    mapped = _mapped(product, problem, count)
    return run


def _linearized_model(problem: Problem, stack: ExitStack) -> Run:
    params, v = problem.params(), problem.direction()
    z, push = _linearize(problem.output, params)
    pull = vjp(problem.output, params)[1]
    _, curve = _linearize(func_grad(problem.loss), z)
    return lambda: pull(curve(push(v)))[0]


def _functional(problem: Problem, stack: ExitStack, name: str) -> Run:
    """``torch.autograd.functional.hvp`` or ``vhp``, which return the loss too."""
    params = problem.params()
    (v,) = _lists(problem, 1)

    def value(*tensors: Tensor) -> Tensor:
        named = dict(zip(params, tensors, strict=True))
        return problem.loss(functional_call(problem.module, named, (problem.inputs,)))

    transform = getattr(torch.autograd.functional, name)
    inputs = tuple(params.values())
    return lambda: list(transform(value, inputs, tuple(v))[1])


# Libraries of linear operators.

_HESSIAN, _GGN = "HessianLinearOperator", "GGNLinearOperator"


def _curvlinops(problem: Problem, stack: ExitStack, name: str, count: int = 1) -> Run:
    import curvlinops

    parameters: list[Tensor] = list(problem.module.parameters())
    operator = getattr(curvlinops, name)(
        problem.module,
        problem.criterion,
        parameters,
        [(problem.inputs, problem.targets)],
        check_deterministic=False,
    )
    if count == 1:
        (v,) = _lists(problem, 1)
        return lambda: operator @ v
    columns = [v.movedim(0, -1).contiguous() for v in problem.directions(count).values()]
    return lambda: operator @ columns


def _eigenthings(operator: Any, problem: Problem, count: int) -> Run:
    vs = [torch.cat([x.reshape(-1) for x in v]) for v in _lists(problem, count)]
    if count == 1:
        return lambda: operator.matvec(vs[0])
    return lambda: [operator.matvec(v) for v in vs]


def _eigenthings_hessian(problem: Problem, stack: ExitStack, count: int = 1) -> Run:
    from hessian_eigenthings.loss_fns import supervised_loss
    from hessian_eigenthings.operators import HessianOperator

    batches = [(problem.inputs, problem.targets)]
    operator = HessianOperator(problem.module, batches, supervised_loss(problem.criterion))
    return _eigenthings(operator, problem, count)


def _eigenthings_ggn(problem: Problem, stack: ExitStack, count: int = 1) -> Run:
    from hessian_eigenthings.loss_fns import supervised_forward, supervised_loss_of_output
    from hessian_eigenthings.operators import GGNOperator

    operator = GGNOperator(
        problem.module,
        [(problem.inputs, problem.targets)],
        supervised_forward,
        supervised_loss_of_output(problem.criterion),
    )
    return _eigenthings(operator, problem, count)

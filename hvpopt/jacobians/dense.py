"""Dense Jacobians and Hessians, whole."""

from collections.abc import Callable
from typing import Any, Literal

import torch

from hvpopt.jacobians.choice import ModeChoice
from hvpopt.jacobians.functions import Argnums
from hvpopt.jacobians.tasks import Options, Task, solved, values_only
from hvpopt.pytrees import Tree

JacobianMode = Literal["auto", "vjp_loop", "vjp_vmap", "jacrev", "dual_loop", "jvp_loop", "jacfwd"]
HessianMode = Literal["auto", "forward_over_reverse", "reverse_over_reverse", "hvp_loop"]


def jacobian(
    f: Callable[..., Tree],
    *args: Any,
    argnums: Argnums = 0,
    mode: JacobianMode = "auto",
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    batched: bool = False,
) -> Tree:
    """The Jacobian ∂f/∂args[argnums], each entry of shape output.shape + input.shape.

    Rows come by reverse mode, columns by forward mode, each in three ways:

    - "vjp_loop": ``torch.autograd.grad``, row after row.
    - "vjp_vmap": the pullback of ``torch.func.vjp`` under ``vmap``.
    - "jacrev": ``torch.func.jacrev``.
    - "dual_loop": dual numbers of ``torch.autograd.forward_ad``, column after column.
    - "jvp_loop": ``torch.func.jvp``, column after column.
    - "jacfwd": ``torch.func.jacfwd``.

    "auto" looks at the shapes: where there are eight times fewer rows than columns, or the other
    way round, it takes the fewer, and a single one by its loop. What that leaves open (loop or
    vmap, and rows or columns where their numbers are close) it measures in the first call, and
    remembers by f's code and what f is given and captures. `which_mode` says what and why.

    For a module's parameters, pass them as a dict and call the module by ``functional_call``, as
    below. f is to be a function of its arguments: random numbers it draws are the same in all
    its runs (one dropout mask), buffers that it updates must be copies. It runs without
    recording, except in "vjp_loop": a derivative inside f is ``torch.func.grad``. Attention and
    recurrent layers run through kernels that have forward-mode derivatives. The result is not
    differentiable further.

    Args:
        f: ``f(*args)``, a pytree of real floating-point tensors.
        *args: Its arguments; those that are differentiated are pytrees of real floating-point
            tensors.
        argnums: Which argument to differentiate by, or several, as a tuple.
        mode: The way.
        chunk_size: How many rows, or columns, a vmapped way computes together; None: as many as
            fit into the budget. Loops do not look at it.
        memory_budget: Bytes for the result and what its computation takes, the latter estimated
            from one run of f, from above; one row or column is computed even so. None: half of
            the memory that is free (no limit where that cannot be known).
        batched: Whether f maps (B, ...) to (B, ...), example by example. The result then is
            each example's own Jacobian, of shape (B, *output, *input), at the cost of one
            example's rows or columns. One product more checks that examples do not depend on
            each other.

    Returns:
        f's structure, at each leaf that of ``args[argnums]`` (a tuple of them where argnums is
        one), at each of its leaves a tensor of the input's dtype; zeros where f does not depend
        on an input.

    Raises:
        TypeError: If f's value, or what is differentiated, holds anything but real
            floating-point tensors, or argnums are no ints.
        ValueError: If the Jacobian is larger than the budget, with its size; if examples depend
            on each other; for options out of range.
        RuntimeError: Inside a transform of ``torch.func``, which the result would not follow.

    Source: Griewank and Walther, Evaluating Derivatives (2nd ed., 2008), chapters 3 and 7.

    Examples:
        >>> jacobian(lambda x: x**2, torch.tensor([1.0, 3.0]))
        tensor([[2., 0.],
                [0., 6.]])
        >>> from torch.func import functional_call
        >>> net, x = torch.nn.Linear(3, 2), torch.randn(5, 3)
        >>> params = dict(net.named_parameters())
        >>> by_weight = jacobian(lambda p: functional_call(net, p, (x,)), params)
        >>> by_weight["weight"].shape, by_weight["bias"].shape
        (torch.Size([5, 2, 2, 3]), torch.Size([5, 2, 2]))
        >>> jacobian(net, x, batched=True).shape
        torch.Size([5, 2, 3])
    """
    options = Options(argnums, mode, chunk_size, memory_budget, batched=batched)
    task, blocks = solved(f, args, options)
    return task.problem.nested(blocks)


def hessian(
    f: Callable[..., torch.Tensor],
    *args: Any,
    argnums: Argnums = 0,
    mode: HessianMode = "auto",
    chunk_size: int | None = None,
    memory_budget: int | None = None,
) -> Tree:
    """The Hessian of a scalar function, each entry of shape input.shape + input.shape.

    Its rows are Hessian-vector products, in three ways:

    - "forward_over_reverse": forward mode over the gradient, under ``vmap``.
    - "reverse_over_reverse": the gradient's pullback, under ``vmap``; its graph is kept.
    - "hvp_loop": `hvpopt.products.linearize`, row after row; its graph is kept.

    "auto" measures the three in the first call and remembers, as in `jacobian`, whose other
    arguments, notes and errors are the same.

    Args:
        f: ``f(*args)``, a real floating-point tensor without dimensions.
        *args: Its arguments.
        argnums: Which argument to differentiate by, or several, as a tuple.
        mode: The way.
        chunk_size: As in `jacobian`.
        memory_budget: As in `jacobian`.

    Returns:
        The structure of ``args[argnums]``, at each leaf that structure again, as
        ``torch.func.hessian`` has it; in f's own scale (of the mean, where f is a mean).

    Raises:
        TypeError, ValueError, RuntimeError: As in `jacobian`, and for a value that is no scalar.

    Source: Pearlmutter, Fast exact multiplication by the Hessian (Neural Computation, 1994).

    Examples:
        >>> hessian(lambda p: p[0] ** 2 * p[1], torch.tensor([3.0, 5.0]))
        tensor([[10.,  6.],
                [ 6.,  0.]])
    """
    options = Options(argnums, mode, chunk_size, memory_budget, hessian=True)
    task, blocks = solved(f, args, options)
    return task.problem.nested_hessian(blocks)


def which_mode(
    f: Callable[..., Tree],
    *args: Any,
    argnums: Argnums = 0,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    batched: bool = False,
    of: Literal["jacobian", "hessian"] = "jacobian",
) -> ModeChoice:
    """What ``mode="auto"`` takes for this function and these arguments, and why.

    Where it was not decided before, it is now, and remembered. Random numbers that f draws count
    as not drawn. Arguments and errors are those of `jacobian` and `hessian`.

    Examples:
        >>> which_mode(lambda x: (x**2).sum(), torch.ones(9))  # doctest: +ELLIPSIS
        ModeChoice(mode='vjp_loop', reason='1 × 9, fewer rows; vjp_loop ... ms')
    """
    if of not in ("jacobian", "hessian"):
        raise ValueError(f"of={of!r}; expected 'jacobian' or 'hessian'.")
    options = Options(
        argnums, "auto", chunk_size, memory_budget, hessian=of == "hessian", batched=batched
    )
    with values_only():
        task = Task(f, args, options, recall=True)
        choice = task.choice()
        task.generators.rewind()
        return choice

"""Checks on pytrees of tensors, with errors that name the leaf."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

Tree = Any
"""A tensor, or nested dicts, lists and tuples of tensors."""


def check_params(
    tree: Any, what: str, *, remedy: str = "pass what is not differentiated among *args"
) -> None:
    """Lets real floating-point tensors pass.

    Args:
        tree: Any pytree.
        what: Its name.
        remedy: What to do with integers, which have no derivative.

    Raises:
        ValueError: If there is no tensor.
        TypeError: If a leaf is not a tensor, or its dtype is an integer's or complex.
    """
    leaves = pytree.tree_leaves_with_path(tree)
    if not leaves:
        raise ValueError(f"{what} hold no tensor; expected a pytree of tensors.")
    for path, leaf in leaves:
        name = what + pytree.keystr(path)
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name} is a {type(leaf).__name__}; expected a tensor.")
        if leaf.is_complex():
            raise TypeError(
                f"{name} is complex ({leaf.dtype}); expected real floating point: pass "
                "torch.view_as_real of it and let f put it together."
            )
        if not leaf.is_floating_point():
            raise TypeError(f"{name} is {leaf.dtype}; expected real floating point: {remedy}.")


def check_like(tree: Any, like: Any, what: str, what_like: str) -> None:
    """Lets a tree pass that has the structure, shapes, dtypes and devices of ``like``.

    Raises:
        ValueError: If it differs, naming the first leaf that does.
    """
    _check_structure(tree, like, what, what_like)
    _check_leaves(tree, like, what, what_like, leading=())


def num_directions(tree: Any, like: Any, what: str, what_like: str) -> int | None:
    """How many directions a tree holds, each of the structure, shapes, dtypes of ``like``.

    Returns:
        None for one direction of the very shapes of ``like``; k where every leaf has one more
        dimension, its first, of size k.

    Raises:
        ValueError: If it is neither, naming the first leaf that does not fit; if the leaves hold
            different numbers of directions, or none.
    """
    _check_structure(tree, like, what, what_like)
    leaves, expected = pytree.tree_leaves_with_path(tree), pytree.tree_leaves(like)
    are_stacked = [
        isinstance(x, Tensor) and x.dim() == y.dim() + 1 and x.shape[1:] == y.shape
        for (_, x), y in zip(leaves, expected, strict=True)
    ]
    if not all(are_stacked):
        _check_leaves(tree, like, what, what_like, leading=(), or_stacked=True)
        return None
    k = leaves[0][1].shape[0]
    for path, x in leaves:
        if x.shape[0] != k:
            raise ValueError(
                f"{what}{pytree.keystr(path)} holds {x.shape[0]} directions in its first "
                f"dimension, {what}{pytree.keystr(leaves[0][0])} {k}; expected the same number "
                "in every leaf."
            )
    if k == 0:
        raise ValueError(f"{what} holds no direction: its leaves' first dimension has size 0.")
    _check_leaves(tree, like, what, what_like, leading=(k,))
    return k


def _check_structure(tree: Any, like: Any, what: str, what_like: str) -> None:
    if pytree.tree_structure(tree) != pytree.tree_structure(like):
        leaves, expected = map(pytree.tree_leaves_with_path, (tree, like))
        if {path for path, _ in leaves} == {path for path, _ in expected}:
            difference = _difference(tree, like, what, what_like)
            raise ValueError(difference or f"{what} and {what_like} differ in their containers.")
        raise ValueError(
            f"{what} has the leaves {_names(leaves)}, but {what_like} {_names(expected)}; "
            "expected the same structure."
        )


def _difference(tree: Any, like: Any, what: str, what_like: str) -> str | None:
    """What the first containers that differ are, where their leaves have the same places."""
    if isinstance(tree, Tensor) or isinstance(like, Tensor):
        return None
    if type(tree) is not type(like):
        kinds = [type(x).__name__ for x in (tree, like)]
        return (
            f"{what} is a {kinds[0]}, but {what_like} is a {kinds[1]}; expected the same "
            "containers."
        )
    if isinstance(tree, dict):
        if list(tree) != list(like) and set(tree) == set(like):
            return (
                f"{what} has the same keys in another order than {what_like}: {list(tree)} and "
                f"{list(like)}; expected the same order."
            )
        places: Any = [k for k in tree if k in like]
    else:
        places = range(len(tree)) if isinstance(tree, (list, tuple)) else ()
    for i in places:
        name, name_like = f"{what}[{i!r}]", f"{what_like}[{i!r}]"
        found = _difference(tree[i], like[i], name, name_like)
        if found:
            return found
    return None


def _check_leaves(
    tree: Any,
    like: Any,
    what: str,
    what_like: str,
    *,
    leading: tuple[int, ...],
    or_stacked: bool = False,
) -> None:
    leaves, expected = pytree.tree_leaves_with_path(tree), pytree.tree_leaves(like)
    for (path, x), y in zip(leaves, expected, strict=True):
        name = what + pytree.keystr(path)
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} is a {type(x).__name__}; expected a tensor.")
        if x.shape != (*leading, *y.shape):
            k_more = ", ".join(["k", *map(str, y.shape)]) + ("" if y.shape else ",")
            stacked = f", or ({k_more}) in every leaf for k directions" if or_stacked else ""
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; expected {(*leading, *y.shape)} as in "
                f"{what_like}{stacked}."
            )
        for kind in ("dtype", "device"):
            given, wanted = getattr(x, kind), getattr(y, kind)
            if given != wanted:
                raise ValueError(f"{name} has {kind} {given}; expected {wanted} as in {what_like}.")


def scalar_valued(f: Callable[..., Any], what: str) -> Callable[..., Tensor]:
    """``f`` with its value checked to be a real floating-point tensor without dimensions.

    The function returned raises:
        TypeError: If the value is not such a tensor.
        ValueError: If it has dimensions.
    """

    def checked(*args: Any) -> Tensor:
        value = f(*args)
        if not isinstance(value, Tensor):
            raise TypeError(f"{what} returned a {type(value).__name__}; expected a scalar tensor.")
        if not value.is_floating_point():
            raise TypeError(
                f"{what} returned a tensor of dtype {value.dtype}; expected a real "
                "floating-point scalar."
            )
        if value.dim() != 0:
            raise ValueError(
                f"{what} returned a tensor of shape {tuple(value.shape)}; expected a scalar: "
                "reduce it with mean() or sum()."
            )
        return value

    return checked


def _names(leaves: list[tuple[Any, Any]]) -> str:
    """The leaves' places, as one sees them in an error."""
    shown = [pytree.keystr(path) or "(itself)" for path, _ in leaves]
    return "[" + ", ".join(shown[:8]) + (", …]" if len(shown) > 8 else "]")

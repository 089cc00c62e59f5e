"""Frozen operands: asking for a gradient that is not computed is an error, never a silent zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


def define_vjp(
    function: Any,
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    frozen: Mapping[int, str] | Callable[..., Mapping[int, str]],
) -> None:
    """Like `function.defvjp(forward, backward)`, for a `jax.custom_vjp` some of whose arguments are frozen.

    Args:
        function: the `jax.custom_vjp`.
        forward: its forward rule, for plain values.
        backward: its backward rule, for plain cotangents; it returns None for a frozen argument.
        frozen: positions of frozen arguments and what to call them, or a function of the arguments that returns these.

    Raises:
        ValueError: while differentiating, a gradient of a frozen argument is asked for.
    """

    def checked_forward(*arguments: Any) -> Any:
        values = values_of(arguments)
        names = frozen(*values) if callable(frozen) else frozen
        for position, name in names.items():
            if is_perturbed(arguments[position]):
                raise ValueError(f"{name}: frozen, but its gradient was asked for")
        return forward(*values)

    def plain_backward(*arguments: Any) -> Any:
        *rest, cotangents = arguments
        return backward(*rest, instantiated(cotangents))

    function.defvjp(checked_forward, plain_backward, symbolic_zeros=True)


def values_of(tree: Any) -> Any:
    """The arguments of a forward rule with symbolic zeros, as plain values."""
    return jax.tree.map(lambda leaf: leaf.value if _is_primal(leaf) else leaf, tree, is_leaf=_is_primal)


def is_perturbed(tree: Any) -> bool:
    """Whether a gradient of some array in such an argument is asked for."""
    return any(_is_primal(leaf) and leaf.perturbed for leaf in jax.tree.leaves(tree, is_leaf=_is_primal))


def instantiated(tree: Any) -> Any:
    """The cotangents of a backward rule with symbolic zeros, as plain arrays."""
    is_zero = lambda leaf: isinstance(leaf, SymbolicZero)
    return jax.tree.map(lambda ct: jnp.zeros(ct.shape, ct.dtype) if is_zero(ct) else ct, tree, is_leaf=is_zero)


def _is_primal(leaf: Any) -> bool:
    return hasattr(leaf, "perturbed")

"""Chooses an op's implementation: the one named, or the best for the platform compiled for."""

from collections.abc import Callable
from typing import Any

import jax

from gemma_grpo.errors import UserError


def dispatch(
    implementation: str | None,
    *operands: Any,
    pallas: Callable[..., Any],
    xla: Callable[..., Any],
    obstacle: str | None,
) -> Any:
    """`pallas(*operands)` or `xla(*operands)`.

    None takes the kernel where the program is compiled for a TPU and there is no obstacle.

    Args:
        operands: arrays, or trees of them.
        obstacle: why the kernel cannot run on a TPU either; None if it can.

    Raises:
        UserError: the name is unknown, or the kernel named cannot run here.
    """
    if implementation not in (None, "xla", "pallas"):
        raise UserError(f'implementation="{implementation}": must be None, "xla" or "pallas"')
    if implementation == "pallas":
        if jax.default_backend() != "tpu":
            raise UserError(
                f'implementation="pallas": needs a TPU, this is {jax.default_backend()}; '
                "None takes the kernel where the program is compiled for one"
            )
        if obstacle:
            raise UserError(f'implementation="pallas": {obstacle}; use None or "xla"')
        return pallas(*operands)
    if implementation == "xla" or obstacle:
        return xla(*operands)
    return jax.lax.platform_dependent(*operands, tpu=pallas, default=xla)

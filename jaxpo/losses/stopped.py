"""Holds still what a function stops the gradient of, so that finite differences see what its gradient sees."""

from collections.abc import Callable

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun


def held_still(function: Callable, at: jax.Array) -> Callable:
    """`function` (of a vector, a scalar), with whatever it stops the gradient of held at its values at `at`."""
    program = jax.make_jaxpr(function)(at)
    stops = [equation for equation in program.jaxpr.eqns if equation.primitive.name == 'stop_gradient']
    others = [equation for equation in program.jaxpr.eqns if equation.primitive.name != 'stop_gradient']
    outputs = [equation.outvars[0] for equation in stops]

    def run(**changes):
        unnamed = program.jaxpr.debug_info._replace(arg_names=None, result_paths=None)  # there are other arguments now
        return jaxpr_as_fun(ClosedJaxpr(program.jaxpr.replace(debug_info=unnamed, **changes), program.consts))

    held = run(outvars=outputs)(at)
    still = run(eqns=others, invars=[*program.jaxpr.invars, *outputs])
    return lambda vector: still(vector, *held)[0]

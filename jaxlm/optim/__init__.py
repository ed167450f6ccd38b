"""Optimizers: `build(spec, steps, axes)`, and where their state lies, `state_shardings`."""

from jaxlm.optim.build import OptimizerSpec, build
from jaxlm.optim.state import state_axes, state_shardings

__all__ = ["OptimizerSpec", "build", "state_axes", "state_shardings"]

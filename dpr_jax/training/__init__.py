"""The train step, the loop and what they keep."""

from dpr_jax.training.steps import TrainState, make_train_step

__all__ = ["TrainState", "make_train_step"]

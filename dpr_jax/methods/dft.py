"""Dynamic fine-tuning: SFT whose tokens are weighted by their own probability.

    loss = - sum_t m_t stop_gradient(pi(y_t | s_t)) log pi(y_t | s_t)

Source: arXiv 2508.05629, "On the Generalization of SFT: A Reinforcement Learning Perspective
with Reward Rectification". The gradient of SFT is a policy gradient with the reward 1 / pi of the
demonstrated token; the weight pi takes that factor back. The gradient is minus that of
sum_t m_t pi(y_t | s_t).
"""

import dataclasses

import jax
import jax.numpy as jnp

from dpr_jax.methods.on_demos import DemoMethod
from dpr_jax.models import token_logprobs


@dataclasses.dataclass(frozen=True, kw_only=True)
class DFT(DemoMethod):
  """See the module docstring."""

  kind = "dft"
  title = "DFT"

  def loss(self, model):
    """loss_sum: nats, weighted as above and summed over trained tokens; weight: their number, not
    the sum of the probabilities. Metric `nll`: the plain mean negative log-likelihood, nats."""

    def loss_fn(variables, batch, rng):
      rngs = None if rng is None else {"dropout": rng}
      out = token_logprobs(model, variables, batch.tokens, batch.segment_ids, rngs=rngs)
      on = batch.loss_mask > 0
      logp = jnp.where(on, out.logp, 0.0)
      probability = jax.lax.stop_gradient(jnp.exp(logp))
      loss_sum = -jnp.sum(jnp.where(on, probability * logp, 0.0))
      tokens = jnp.sum(on.astype(jnp.float32))
      return loss_sum, tokens, {"tokens": tokens, "nll": (-jnp.sum(logp), tokens)}

    return loss_fn


DEFAULTS = {"dft": DFT()}

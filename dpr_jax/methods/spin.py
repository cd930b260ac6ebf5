"""SPIN: self-play fine-tuning, a logistic loss between demonstrations and own samples.

    loss = log(1 + exp(-beta [(log pi(y) - log pi_k(y)) - (log pi(y') - log pi_k(y'))]))

y is the demonstration, y' ~ pi_k the sample of the previous iterate, log-probs summed over
response tokens. Source: arXiv 2401.01335, section 4, with the logistic loss; beta is its lambda.
After a round of training the iterate becomes pi_k and samples anew; where pi_k is the distribution
of the demonstrations, the gradient vanishes on average.
"""

import dataclasses

import jax

from dpr_jax.config.fields import setting
from dpr_jax.methods.on_pairs import PairMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class SPIN(PairMethod):
  """See the module docstring."""

  kind = "spin"
  title = "SPIN"
  beta: float = setting(0.1, "factor of the log-ratio of a response, per nat", low=1e-6)

  def pair_losses(self, demo_B, generated_B):
    # softplus: the loss is linear in a margin of thousands of nats, where exp would overflow.
    return jax.nn.softplus(-self.beta * (demo_B - generated_B))


DEFAULTS = {"spin": SPIN()}

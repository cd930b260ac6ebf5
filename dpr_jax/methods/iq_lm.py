"""IQ-LM: SFT with the chi-square regularizer of IQ-Learn on the reward that the logits imply.

    loss = - sum_t m_t log pi(y_t | s_t) + 1 / (4 lambda) sum_t m_t (Q(s_t, y_t) - V(s_{t+1}))^2

with Q the logits, V(s) = logsumexp_a Q(s, a) and V = 0 after a response. Source: IQ-Learn, arXiv
2106.12142 (chi-square divergence, on demonstrations only), at gamma = 1; Wulfmeier et al. (arXiv
2409.01369) fine-tune language models with it. SFT alone
does not see a constant added to the logits of a state; this pins it, so that the endogenous
reward Q - V' stays small and comparable between tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dpr_jax.config.fields import setting
from dpr_jax.methods.on_demos import DemoMethod
from dpr_jax.models import token_logprobs


@dataclasses.dataclass(frozen=True, kw_only=True)
class IQLM(DemoMethod):
  """See the module docstring."""

  kind = "iq_lm"
  title = "IQ-LM"
  lam: float = setting(1.0, "lambda, nats; the regularizer is weaker the larger it is", low=1e-6)

  def loss(self, model):
    """loss_sum: nats summed over trained tokens; weight: their number. The gradient flows through
    both Q and the next V. Metrics, means over tokens: `nll` in nats, `endogenous_reward` Q - V' in
    nats and its `endogenous_reward_sq`."""

    def loss_fn(variables, batch, rng):
      rngs = None if rng is None else {"dropout": rng}
      out = token_logprobs(model, variables, batch.tokens, batch.segment_ids, rngs=rngs)
      on = batch.loss_mask > 0
      logp = jnp.where(on, out.logp, 0.0)
      after = next_values(out.logsumexp, batch.loss_mask, batch.segment_ids)
      reward = jnp.where(on, out.logp + out.logsumexp - after, 0.0)
      nll, square = -jnp.sum(logp), jnp.sum(jnp.square(reward))
      tokens = jnp.sum(on.astype(jnp.float32))
      metrics = {
          "tokens": tokens,
          "nll": (nll, tokens),
          "endogenous_reward": (jnp.sum(reward), tokens),
          "endogenous_reward_sq": (square, tokens),
      }
      return nll + square / (4.0 * self.lam), tokens, metrics

    return loss_fn


def next_values(values_BxT: jax.Array, mask_BxT: jax.Array, segments_BxT: jax.Array) -> jax.Array:
  """V(s_{t+1}) [B, T]: the value of the next column where it belongs to the same response.

  0 at the last token of a response: at EOS, before the next turn or packed demonstration, and
  where a demonstration was cut.
  """
  following = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
  goes_on = (following(mask_BxT) > 0) & (following(segments_BxT) == segments_BxT)
  return jnp.where(goes_on, following(values_BxT), 0.0)


DEFAULTS = {"iq_lm": IQLM()}

"""Dense-Path REINFORCE with the exact gradient: expectations over the vocabulary, not samples.

With the return of each token alone (`returns="per_token"`), DPR maximises in each state s that the
policy visits

    J(s) = E_{a ~ pi} r(s, a) - beta KL(pi || sft) - beta_ref KL(pi || ref)

and REINFORCE estimates its gradient from the one token that was sampled there. Nothing has to be
sampled: r is a function of log pi_sft(a | s) and log pi_ref(a | s), which one pass of each model
gives for all a. With b = beta + beta_ref, where it is above 0,

    tau(. | s) = softmax((r + beta log pi_sft + beta_ref log pi_ref) / b)
    reverse_kl   loss = -J(s) = b KL(pi || tau) - b logsumexp((r + ...) / b)
    forward_kl   loss = b KL(tau || pi)

For r = log pi_sft - log pi_ref, tau is proportional to pi_sft^((1 + beta) / b) pi_ref^((beta_ref -
1) / b): at beta_ref = 0 the softmax of (1 + 1 / beta) Q_sft - (1 / beta) Q_ref.

The gradient of `reverse_kl` is the expected one of the sampled loss with that return, in scale too;
a baseline of the state would not change it. `forward_kl` has the same optimum and other ways to it:
it covers all of tau, where the reverse one seeks its modes. In both, states come from the policy's
own samples, and the gradient does not flow through which states it visits (as with gamma = 0).

This is on-policy distillation from a teacher that nobody trained, extrapolated from two
checkpoints: G-OPD / ExOPD (arXiv 2602.12125) writes the reverse form with lambda = 1 + 1 / beta, so
that its lambda = 1.25 is beta = 4. That maximum likelihood is a case of inverse reinforcement
learning, so that a reward of each token can be read off a language model, is also in Wulfmeier et
al. (arXiv 2409.01369), whose regularised form is `methods/iq_lm.py`.

Dims: B rows, S columns of a row, the N last of which are the response, C columns of a chunk, V
vocabulary, D hidden.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dpr_jax.data.batches import Shared
from dpr_jax.losses.reinforce import (
    check_aggregation,
    loss_weight,
    sampling_metrics,
    trained_mask,
)
from dpr_jax.models.logprobs import (
    chunk_columns,
    chunk_log_softmax,
    chunk_logprobs,
    in_chunks,
    per_token,
)
from dpr_jax.references.base import Reference, combine_logps
from dpr_jax.rewards.base import RewardFn, check_pointwise, needs
from dpr_jax.rewards.baseline_relative import BASELINE_RELATIVE
from dpr_jax.rewards.transforms import RewardContext, Transform

DIVERGENCES = ("reverse_kl", "forward_kl")


@struct.dataclass
class FullVocabularyBatch:
  """Rollouts, and what gives the logits of sft and ref in each of their states."""

  tokens: Any  # int32 [B, S], prompt right-aligned in the first S - N columns.
  segment_ids: Any  # int32 [B, S], 1 on prompt and response, 0 elsewhere.
  mask: Any  # float32 [B, N], 1 on the response tokens that are trained; any other weight counts.
  behaviour_logp: Any  # float32 [B, N], log-probs of the policy that sampled.
  beta: Shared  # float32 [], weight of the KL to sft.
  # What `attach` adds:
  states: Any = None  # hidden states [B, N, D] of sft and of each member of ref, a tuple.
  models: Shared | None = None  # (variables of sft, a Reference); of them the heads are used.


def full_vocabulary_batch(
    rollout, *, beta: float | jax.Array, truncated: str = "keep"
) -> tuple[FullVocabularyBatch, dict[str, jax.Array]]:
  """Rollouts -> batch without what `attach` adds, and scalar metrics. Jittable.

  Args:
    rollout: a `rollout.Rollout`.
    beta: weight of the KL to SFT; a number, or a scalar array where it is steered.
    truncated: see `reinforce.trained_mask`.
  """
  mask = trained_mask(rollout, truncated)
  batch = FullVocabularyBatch(
      tokens=rollout.tokens,
      segment_ids=rollout.segment_ids,
      mask=mask,
      behaviour_logp=rollout.policy_logp,
      beta=Shared(jnp.asarray(beta, jnp.float32)),
  )
  return batch, {"trained_share": jnp.sum(mask) / jnp.maximum(jnp.sum(rollout.mask), 1.0)}


def attach(batch: FullVocabularyBatch, rollout, sft: Any, ref: Any) -> FullVocabularyBatch:
  """The batch with the frozen models and their hidden states, all by reference.

  Not part of `full_vocabulary_batch`, because a jit copies what it returns.

  Args:
    rollout: with its `states`.
    ref: variables of one model, or a `Reference`.
  """
  return batch.replace(states=rollout.states, models=Shared((sft, Reference.of(ref))))


def make_full_vocabulary_loss(
    model,
    *,
    reward: RewardFn = BASELINE_RELATIVE,
    transform: Transform | None = None,
    divergence: str = "reverse_kl",
    beta_ref: float = 0.0,
    has_target: bool = True,
    loss_aggregation: str = "tokens",
):
  """Returns loss_fn(variables, batch, rng) -> (loss_sum, weight, metrics) over attached batches.

  Metrics: those of REINFORCE, and with a target `kl_to_target`, KL(pi || tau) in nats per token.

  Args:
    reward: a pointwise reward.
    transform: of it, pointwise as well (see `transforms.check_pointwise`).
    divergence: one of DIVERGENCES.
    beta_ref: weight of the KL to ref.
    has_target: b is above 0. Without it there is no tau, and the policy maximises r alone.
    loss_aggregation: see `make_reinforce_loss`.

  Raises:
    ValueError: unknown names, a reward that is not pointwise, or forward_kl without a target.
  """
  check_aggregation(loss_aggregation)
  check_pointwise(reward)
  if divergence not in DIVERGENCES:
    raise ValueError(f"divergence={divergence!r} is not one of {DIVERGENCES}")
  if divergence == "forward_kl" and not has_target:
    raise ValueError("divergence=forward_kl needs a target: beta or beta_ref above 0")

  def of_states(log_pi_BxCxV, log_sft_BxCxV, log_ref_BxCxV, beta, mask_BxCx1):
    """(loss, KL to the target or 0), float32 [B, C], from log-probs of the whole vocabulary."""
    known = {"sft_logp": log_sft_BxCxV, "ref_logp": log_ref_BxCxV}
    reward_BxCxV = reward(**{name: known[name] for name in needs(reward)})
    if transform is not None:
      reward_BxCxV = transform(reward_BxCxV, RewardContext(mask_BxCx1))
    prior_BxCxV = beta * log_sft_BxCxV + beta_ref * log_ref_BxCxV
    score_BxCxV = jax.lax.stop_gradient(reward_BxCxV + prior_BxCxV)
    b = beta + beta_ref
    pi_BxCxV, fixed_BxCxV = jnp.exp(log_pi_BxCxV), jax.lax.stop_gradient(log_pi_BxCxV)
    kl_BxC = jnp.zeros(log_pi_BxCxV.shape[:2])
    if has_target:
      log_tau_BxCxV = jax.nn.log_softmax(score_BxCxV / b, axis=-1)
      gap_BxCxV = fixed_BxCxV - log_tau_BxCxV
      kl_BxC = jnp.sum(jax.lax.stop_gradient(pi_BxCxV) * gap_BxCxV, axis=-1)
    if divergence == "forward_kl":
      terms_BxCxV = jnp.exp(log_tau_BxCxV) * (log_tau_BxCxV - log_pi_BxCxV)
      return b * jnp.sum(terms_BxCxV, axis=-1), kl_BxC
    # The derivative of log pi inside has expectation 0 under pi: held fixed, the gradient is still
    # exact, and its backward pass that of a softmax alone.
    advantage_BxCxV = score_BxCxV - b * fixed_BxCxV
    return -jnp.sum(pi_BxCxV * advantage_BxCxV, axis=-1), kl_BxC

  def loss_fn(variables, batch: FullVocabularyBatch, rng):
    rngs = None if rng is None else {"dropout": rng}
    (sft, ref), beta = batch.models.value, batch.beta.value
    members = (variables, sft, *ref.members)
    start = batch.tokens.shape[1] - batch.mask.shape[1]
    hidden_BxSxD, _ = model.apply(variables, batch.tokens, None, batch.segment_ids, rngs=rngs)

    # Only chunks of hidden states are kept for the backward pass, which makes all logits again.
    @jax.checkpoint
    def chunk(y_BxC, mask_BxC, *hidden_BxCxD):
      logits = [
          model.apply(v, h, method="unembed") for v, h in zip(members, hidden_BxCxD, strict=True)
      ]
      log_pi_BxCxV, log_sft_BxCxV, *log_refs = map(chunk_log_softmax, logits)
      log_ref_BxCxV = combine_logps(jnp.stack(log_refs), ref.combine)
      loss_BxC, kl_BxC = of_states(
          log_pi_BxCxV, log_sft_BxCxV, log_ref_BxCxV, beta, mask_BxC[:, :, None]
      )
      return loss_BxC, kl_BxC, chunk_logprobs(logits[0], y_BxC, False)[0]

    columns = chunk_columns(model.cfg, batch.tokens.shape[0], models=len(members))
    loss_BxN, kl_BxN, logp_BxN = per_token(
        lambda states, chosen: in_chunks(
            chunk, columns, batch.tokens[:, chosen], batch.mask, hidden_BxSxD[:, states],
            *batch.states,
        ),
        batch.segment_ids, start,
    )
    # where, not a product alone: values outside of the mask must not turn into a NaN.
    total = lambda x: jnp.sum(jnp.where(batch.mask > 0, batch.mask * x, 0.0))
    metrics = sampling_metrics(logp_BxN, batch.behaviour_logp, batch.mask)
    if has_target:
      metrics["kl_to_target"] = (total(kl_BxN), metrics["tokens"])
    return total(loss_BxN), loss_weight(batch.mask, loss_aggregation), metrics

  return loss_fn

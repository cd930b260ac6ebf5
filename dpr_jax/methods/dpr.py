"""Dense-Path REINFORCE from the last SFT checkpoint; and its variants, which are values.

An ablation is DPR with another return (`reward_to_go` as the paper has it, `sentence_level`) or
another reward (`log_likelihood`: no reference; `endogenous`, with the return that it needs).
`exact` has the objective of DPR with the return of each token, without the noise of sampled tokens
in its gradient.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dpr_jax import sharding
from dpr_jax.config.fields import kind_of, setting, slot
from dpr_jax.data.loader import Batches, prompt_batches
from dpr_jax.errors import naming
from dpr_jax.evaluation.judging import open_rewards
from dpr_jax.evaluation.metrics import checked_scores
from dpr_jax.evaluation.responses import response_text
from dpr_jax.losses import full_vocabulary as exact
from dpr_jax.losses import make_reinforce_loss, reinforce_batch
from dpr_jax.losses.reinforce import LOSS_AGGREGATIONS
from dpr_jax.methods.base import TrainedMethod, make_step, make_training
from dpr_jax.methods.programs import Program, RolloutWork, TrainWork, device_bytes
from dpr_jax.models.variables import head_of
from dpr_jax.references.base import Reference
from dpr_jax.rewards import Endogenous, LogLikelihood, transforms
from dpr_jax.rewards.base import check_pointwise
from dpr_jax.rewards.control import KLControl
from dpr_jax.rewards.returns import RETURNS, VARIANCE_BASELINES
from dpr_jax.rollout import Rollout, Sampling, make_rollout_step
from dpr_jax.training.dpr_step import DPRStep


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPR(TrainedMethod):
  """REINFORCE on a dense reward that includes a KL penalty to SFT."""

  kind = "dpr"
  title = "DPR"
  subject = reads_reference = True

  start: str = setting(
      "", "method whose result is sft, and its early checkpoint ref; '': SFT, and the run's ref"
  )
  reward: Any = slot("dpr_jax.rewards", "baseline_relative", "reward of each token")
  transforms: tuple[str, ...] = setting(
      (), "of the reward, applied from first to last: scale:FACTOR, clip:NATS, clip:LOW:HIGH, "
      "zscore, mask_unsure:NATS, center"
  )
  returns: str = setting(
      "per_token", "return of a token: its own reward, the sum of the rewards from it on (as in "
      "the paper), or the sum over the response", choices=RETURNS,
  )
  gamma: float = setting(1.0, "discount factor of returns=reward_to_go", low=0, high=1)
  gradient: str = setting(
      "sampled", "the gradient in a state: of the token that was sampled, or its expectation over "
      "the whole vocabulary, for the return of each token", choices=("sampled", "full_vocabulary"),
  )
  divergence: str = setting(
      "reverse_kl", "what gradient=full_vocabulary minimises: KL(policy || target), whose gradient "
      "is the expected one of DPR, or KL(target || policy)", choices=exact.DIVERGENCES,
  )
  variance_baseline: str = setting(
      "position_mean", "what is subtracted from the returns", choices=VARIANCE_BASELINES
  )
  beta: float = setting(
      1.0, "weight of the KL to SFT; 1 / beta is the strength of the extrapolation", low=0
  )
  beta_ref: float = setting(0.0, "weight of an additional KL to ref", low=0)
  target_kl: float = setting(
      0.0, "KL to SFT, nats per response, towards which beta is adapted; 0 keeps beta fixed", low=0
  )
  beta_gain: float = setting(
      0.1, "gain g of that adaptation; a step changes beta by at most 20% of g", low=0, high=1
  )
  kl_budget: float = setting(
      0.0, "KL to SFT, nats per response, beyond which the stage ends; 0: no limit", low=0
  )
  loss_aggregation: str = setting(
      "tokens", "what the sum of the loss is divided by", choices=LOSS_AGGREGATIONS
  )
  truncated: str = setting(
      "keep", "what to do with rollouts that end without EOS", choices=("keep", "mask")
  )
  verifier: Any = slot(
      "dpr_jax.evaluation.judges", None, "a judge that gives each response a score; None: the "
      "benchmark, by its accuracy",
  )
  verifier_weight: float = setting(
      0.0, "share of the verifier's score in the reward; on the last token", low=0, high=1
  )
  verifier_transforms: tuple[str, ...] = setting(
      (), "of these scores, as of the reward: scale, clip, or zscore over the rollouts of a step"
  )
  samples_per_prompt: int = setting(
      1, "rollouts per prompt, adjacent in the batch; they share its prefill", low=1
  )
  temperature: float = setting(
      1.0, "sampling temperature of rollouts; other than 1, the gradient is biased", above=0
  )
  top_k: int = setting(0, "number of likeliest tokens that are sampled from; 0 keeps all", low=0)
  top_p: float = setting(1.0, "probability mass that is sampled from; 1 keeps all", above=0, high=1)
  slots: int = setting(
      0, "rollouts decoded at a time, replaced as they end; 0 decodes all at once", low=0,
      resumable=True,
  )
  refill: float = setting(
      0.125, "share of the slots that must be free before they are refilled", low=0, high=1,
      resumable=True,
  )

  def refers(self):
    return (self.start,) if self.start else ()

  def check(self, config):
    budget = self.budget(config)
    if self.start:
      other = config.methods.get(self.start)
      order = [n for n in config.compare if n == self.start or config.methods[n] is self]
      if other is None or not other.reference_step(config) or order[:1] != [self.start]:
        raise ValueError(f"start={self.start!r} must be a method that keeps an early checkpoint, "
                         "such as cleaned_sft with a reference_fraction above 0, and that "
                         "config.compare lists before this one")
    if budget.batch_size % self.samples_per_prompt:
      raise ValueError(f"batch_size={budget.batch_size} is not a multiple of samples_per_prompt="
                       f"{self.samples_per_prompt}")
    if self.variance_baseline == "leave_one_out" and self.samples_per_prompt < 2:
      raise ValueError("variance_baseline=leave_one_out needs samples_per_prompt of at least 2")
    if "expected_rewards" in transforms.needs(self.transforms):
      try:
        check_pointwise(self.reward)
      except ValueError as e:
        raise ValueError(f"transforms: center has no meaning here: {e}") from None
    if self.verifier is not None and not self.verifier.rewards:
      raise ValueError(f"verifier={kind_of(self.verifier)} answers in words; take a judge that "
                       "gives rewards, such as reward_model")
    if (self.verifier is not None or self.verifier_transforms) and not self.verifier_weight:
      raise ValueError("verifier_weight=0 takes nothing of the verifier; set its share, above 0")
    with naming("verifier_transforms"):
      if found := transforms.needs(self.verifier_transforms):
        raise ValueError(f"a score has no {', '.join(sorted(found))}; use scale, clip or zscore")
    if not self.reward.per_token and (self.returns == "per_token" or self.gamma == 0):
      # A constant added to the logits of a state moves reward from one token to the one before.
      raise ValueError(f"reward={kind_of(self.reward)} does not determine the reward of a single "
                       "token; set returns=reward_to_go and a gamma above 0")
    if self.gamma != 1 and self.returns != "reward_to_go":
      raise ValueError(f"gamma={self.gamma} discounts a reward-to-go, not returns={self.returns}; "
                       "set reward_to_go")
    if self.target_kl and not self.beta:
      raise ValueError(f"target_kl={self.target_kl} multiplies beta, which must be above 0")
    self._check_gradient()

  @property
  def _is_exact(self):
    return self.gradient == "full_vocabulary"

  def _check_gradient(self):
    """Raises ValueError, naming the field, for what has no meaning with this gradient."""
    if not self._is_exact:
      if self.divergence != "reverse_kl":
        raise ValueError(f"divergence={self.divergence} needs gradient=full_vocabulary: a token "
                         "sampled from the policy estimates the gradient of reverse_kl")
      return
    with naming("gradient=full_vocabulary"):
      check_pointwise(self.reward)
      transforms.check_pointwise(self.transforms)
      if self.returns != "per_token" and self.gamma != 0:
        raise ValueError(f"returns={self.returns} counts rewards of later tokens, which depend on "
                         "what is sampled; set returns=per_token")
      default = type(self).variance_baseline
      if self.variance_baseline != default:
        raise ValueError(f"variance_baseline={self.variance_baseline} has no sampling noise to "
                         f"reduce; leave it at {default}")
      if self.verifier_weight:
        raise ValueError(f"verifier_weight={self.verifier_weight} mixes in a score that only the "
                         "sampled response has; set 0")
    if self.divergence == "forward_kl" and not self._has_target:
      raise ValueError("divergence=forward_kl needs a target: set beta or beta_ref above 0")

  @property
  def _has_target(self):
    return self.beta + self.beta_ref > 0

  def check_mesh(self, mesh, config):
    super().check_mesh(mesh, config)
    rows, samples = self.budget(config).batch_size, self.samples_per_prompt
    sharding.check_rows(mesh, "batch_size / samples_per_prompt", rows // samples)
    if 0 < self.slots < rows:
      sharding.check_rows(mesh, "slots", self.slots)

  @property
  def control(self) -> KLControl:
    return KLControl(self.beta, self.target_kl, self.beta_gain, self.kl_budget)

  @property
  def reads_benchmark(self):
    return self.verifier_weight > 0 and self.verifier is None

  def optimum_strength(self, config, name, lines=()):
    """(1 - beta_ref) / (beta + beta_ref), for the plain reward.

    Negative where beta_ref > 1 pulls from sft back to ref. With `target_kl`, beta is that of the
    last step.

    Raises:
      ValueError: that step is never made.
    """
    if self.target_kl and name not in config.compare:
      raise ValueError(f"config.methods.{name}.target_kl adapts beta in training, and {name} is "
                       "not in config.compare; add it, or set strength")
    if self.start:
      return None  # Its optimum extrapolates from other models than the run's sft and ref.
    beta = lines[-1]["beta"] if self.target_kl and lines else self.beta
    return (1.0 - self.beta_ref) / (beta + self.beta_ref) if beta + self.beta_ref else None

  def _steps(self, context):
    """(rollout step, train step, what makes a batch of rollouts) of a run, or of its shapes."""
    budget = self.budget(context.config)
    rollout_step = make_rollout_step(
        context.model, max_new_tokens=budget.max_new_tokens, stop_ids=context.stop_ids,
        sampling=Sampling(self.temperature, self.top_k, self.top_p), reward=self.reward,
        extras={*transforms.needs(self.transforms), *(["states"] if self._is_exact else ())},
        samples_per_prompt=self.samples_per_prompt, slots=self.slots, refill=self.refill,
    )
    if self._is_exact:
      loss = exact.make_full_vocabulary_loss(
          context.model, reward=self.reward, transform=transforms.parse(self.transforms),
          divergence=self.divergence, beta_ref=self.beta_ref, has_target=self._has_target,
          loss_aggregation=self.loss_aggregation,
      )
      make_batch = functools.partial(exact.full_vocabulary_batch, truncated=self.truncated)
      return rollout_step, make_step(loss, budget), make_batch
    loss = make_reinforce_loss(context.model, loss_aggregation=self.loss_aggregation)
    train_step = make_step(loss, budget)
    make_batch = functools.partial(
        reinforce_batch, beta_ref=self.beta_ref, gamma=self.gamma, returns=self.returns,
        variance_baseline=self.variance_baseline, group_size=self.samples_per_prompt,
        truncated=self.truncated, transform=transforms.parse(self.transforms),
        external_weight=self.verifier_weight,
        external_transform=transforms.parse(self.verifier_transforms),
    )
    return rollout_step, train_step, make_batch

  def _prompts(self, config, prompts):
    rows = self.budget(config).batch_size // self.samples_per_prompt
    return prompt_batches(prompts, rows, config.data.prompt_length, config.seed)

  def _models(self, run):
    """(sft, ref, what makes sft in float32)."""
    start = self.start
    if not start:
      return run.sft(), run.reference(), run.sft_float32
    step = run.config.methods[start].reference_step(run.config)
    early = run.hold(f"{start} ref", lambda: run.checkpoint(start, step, run.dtype))
    return (run.hold(start, lambda: run.result(start)), Reference.of(early),
            lambda: run.result(start, "float32"))

  def build(self, run, name):
    rollout_step, train_step, make_batch = self._steps(run)
    sft, ref, sft_float32 = self._models(run)
    batches = self._prompts(run.config, run.data.prompts.tokens)
    step = DPRStep(
        rollout_step=rollout_step,
        train_step=train_step,
        make_batch=make_batch,
        control=self.control,
        sft=sft,
        ref=ref,
        rng=run.rng(f"{name}/rollouts"),
        verify=self._verifier(run, name, batches) if self.verifier_weight else None,
        attach=exact.attach if self._is_exact else None,
    )
    return make_training(run, name, step, train_step.optimizer, batches, sft_float32)

  def _verifier(
      self, run, name: str, batches: Batches
  ) -> Callable[[int, Rollout], jax.Array]:
    """verify(step, rollout) -> the verifier's score of each response, float32 [B]; NaN for none.

    Runs on the host. Every process reads the whole batch and comes to the same scores.
    """
    demos, benchmark = run.data.prompts.demos, run.benchmark
    if self.verifier is not None:
      with naming(f"config.methods.{name}.verifier"):
        rewards = open_rewards(
            self.verifier, mesh=run.mesh, dtype=run.dtype, batch_size=run.config.eval.batch_size,
            tokenizer=run.tokenizer,
        )

    def accuracy(i: int, text: str) -> float:
      found, where = benchmark.score(demos[i], text), f"prompt {i + 1}: {text[:40]!r}"
      return checked_scores(found, benchmark.scores, where)["accuracy"]

    def verify(step: int, rollout: Rollout) -> jax.Array:
      tokens_BxN, lengths_B, hit_eos_B = sharding.to_host(
          (rollout.response_tokens, rollout.lengths, rollout.hit_eos)
      )
      # Prompts of the batch, each for as many adjacent rows as it has samples.
      items = np.repeat(batches.item_indices(step), self.samples_per_prompt)
      responses = [row_N[:n] for row_N, n in zip(tokens_BxN, lengths_B, strict=True)]
      texts = [
          response_text(run.tokenizer, tokens, bool(hit_eos), run.stop_ids)
          for tokens, hit_eos in zip(responses, hit_eos_B, strict=True)
      ]
      if self.verifier is None:
        scores = [accuracy(i, text) for i, text in zip(items, texts, strict=True)]
      else:
        with naming(f"config.methods.{name}.verifier"):
          scores = rewards([demos[i].prompt for i in items], texts, responses)
          if all(score is None for score in scores):
            raise ValueError(f"it can score none of the rollouts of step {step + 1}; its model "
                             "must take longer conversations")
      return sharding.place(np.asarray(scores, np.float32), run.mesh)  # None becomes NaN.

    return verify

  def programs(self, shapes, name):
    budget, prompt = self.budget(shapes.config), shapes.config.data.prompt_length
    rollout_step, train_step, make_batch = self._steps(shapes)
    state = shapes.state(train_step)
    longest = [np.zeros((prompt,), np.int32)]  # The widest that a run compiles for.
    prompts = shapes.rows(next(iter(self._prompts(shapes.config, longest))))
    ref = shapes.reference
    arguments = (state.variables, shapes.held, ref, prompts, shapes.abstract_key)

    def lower_update():
      rollouts = jax.eval_shape(rollout_step, *arguments)
      batch = jax.eval_shape(lambda r: make_batch(r, beta=1.0)[0], rollouts)
      if self._is_exact:
        batch = exact.attach(batch, rollouts, shapes.held, ref)
      return train_step.lower(state, shapes.rows(batch))

    scorer = self.verifier.held(shapes.mesh, shapes.model.cfg.dtype) if self.verifier else ()
    verifier = device_bytes(scorer)
    # Under LoRA policy, sft and ref share one base, which is an argument of every program.
    others = 1 + len(ref.members)
    adapted, bases = shapes.held_bytes(others)
    expected = "expected_rewards" in transforms.needs(self.transforms)
    rollouts = RolloutWork(
        rows=budget.batch_size, prompt=prompt, new=budget.max_new_tokens,
        scored=others + expected, samples=self.samples_per_prompt, slots=self.slots,
        held=others, logits_models=others + 1 if expected else 1,
        kept_states=others if self._is_exact else 0,
    )
    update = TrainWork(
        budget.batch_size, prompt + budget.max_new_tokens, budget.max_new_tokens,
        budget.accumulation, held=others, teachers=others if self._is_exact else 0,
    )
    # Of what an exact step reads of sft and ref, their heads are arguments.
    heads = others * device_bytes(head_of(shapes.model.cfg, shapes.held)) if self._is_exact else 0.0
    return [
        Program(f"{name}/rollout_step", lambda: rollout_step.lower(*arguments), rollouts,
                device_bytes(state.opt_state) - bases + verifier),
        Program(f"{name}/train_step", lower_update, update, adapted - heads + verifier,
                tokens=budget.batch_size * budget.max_new_tokens),
    ]


DEFAULTS = {
    "dpr": DPR(),
    "reward_to_go": DPR(returns="reward_to_go", label="DPR, reward-to-go"),
    "sentence_level": DPR(returns="full_return", label="Sentence-level REINFORCE"),
    "cleaned_dpr": DPR(start="cleaned_sft", label="DPR after cleaning"),
    "exact": DPR(gradient="full_vocabulary", label="DPR, exact gradient"),
    # One token's endogenous reward means nothing: a gauge of the logits changes it. What follows
    # settles it.
    "endogenous": DPR(
        reward=Endogenous(), returns="reward_to_go", label="DPR, endogenous reward"
    ),
    "log_likelihood": DPR(reward=LogLikelihood(), label="DPR, no reference"),
}

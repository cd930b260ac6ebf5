"""Methods that need no training: what a trained one has to beat."""

import dataclasses

from dpr_jax.config.fields import setting
from dpr_jax.evaluation.systems import System
from dpr_jax.methods.base import Method


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowTemperature(Method):
  """SFT, sampled at another temperature."""

  kind = "low_temperature"
  title = "SFT, low temperature"
  temperature: float = setting(0.5, "sampling temperature", above=0)

  def system(self, run, name):
    # Its greedy mode would be that of sft.
    return System(
        name, load=lambda: (run.sft(),), temperature=self.temperature, modes=("sampled",)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Extrapolation(Method):
  """Extrapolates from ref through sft, by default as far as the optimum of a DPR method does."""

  strength: float = setting(
      0.0, "strength of the extrapolation; 0 takes 1 / beta, that of the optimum of `optimum_of`",
      low=0
  )
  optimum_of: str = setting("dpr", "name of the DPR method whose optimum is meant")

  reads_reference = True

  def refers(self):
    return () if self.strength else (self.optimum_of,)

  def check(self, config):
    name = self.optimum_of
    if not self.strength and (
        name not in config.methods or config.methods[name].optimum_strength(config, name) is None
    ):
      raise ValueError(f"optimum_of={name!r} is not a DPR method of config.methods with beta + "
                       "beta_ref above 0; set strength")

  def alpha(self, run) -> float:
    """The strength in a run."""
    name = self.optimum_of
    return self.strength or run.config.methods[name].optimum_strength(
        run.config, name, run.metrics(name)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contrastive(Extrapolation):
  """Decodes with logits (1 + alpha) sft - alpha ref: the optimum of DPR with returns per token.

  Of a reference of several models it takes the geometric mean.
  """

  kind = "contrastive"
  title = "Contrastive decoding"

  def system(self, run, name):
    alpha, refs = self.alpha(run), run.config.reference.num_members
    return System(
        name, load=lambda: (run.sft(), *run.reference().members),
        weights=(1.0 + alpha, *[-alpha / refs] * refs),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightExtrapolation(Extrapolation):
  """Weights sft + alpha (sft - ref); of a reference of several models, from their mean."""

  kind = "weight_extrapolation"
  title = "Weight extrapolation"

  def system(self, run, name):
    from dpr_jax.models.variables import cast, extrapolate, mean

    def load():
      # In float32: the difference of two nearby checkpoints is about as small as bfloat16's steps.
      ref = mean(run.config.reference(run, "float32").members)
      return (cast(extrapolate(run.sft_float32(), ref, self.alpha(run)), run.dtype),)

    return System(name, load=load)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resampled(Extrapolation):
  """One of n responses of SFT, by (pi_sft / pi_ref)^alpha; see `evaluation.resampling`.

  As n grows, the optimum over whole responses, which DPR with `returns=reward_to_go` heads for.
  """

  kind = "resampled"
  title = "SFT, resampled by weight"
  candidates: int = setting(16, "responses of SFT that each answer is chosen from", low=2)

  def system(self, run, name):
    from dpr_jax.evaluation.resampling import ResampledSystem

    return ResampledSystem(
        name, load=lambda: (run.sft(),), modes=("sampled",),
        reference=run.reference, candidates=self.candidates, alpha=self.alpha(run),
    )


DEFAULTS = {
    "low_temperature": LowTemperature(),
    "contrastive": Contrastive(),
    "weight_extrapolation": WeightExtrapolation(),
    "resampled": Resampled(),
}

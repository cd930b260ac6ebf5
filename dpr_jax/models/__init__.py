"""The decoder, its KV cache and the log-probabilities of tokens."""

from dpr_jax.models.cache import Cache, init_cache
from dpr_jax.models.config import ModelConfig, Rope
from dpr_jax.models.logprobs import TokenLogProbs, token_logprobs
from dpr_jax.models.transformer import Transformer, init_variables

__all__ = [
    "Cache", "ModelConfig", "Rope", "TokenLogProbs", "Transformer", "init_cache", "init_variables",
    "token_logprobs",
]

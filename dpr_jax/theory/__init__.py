"""The tabular token MDP with exact values: what the method does, without noise or a network.

    mdp.py         states, responses, log-probs
    values.py      values, visits, KL and total variation of policies
    objectives.py  rewards; SFT as inverse soft-Q learning
    optimum.py     the optimum of DPR by recursion and in closed form; reward-error bounds
    gradients.py   estimators of the policy gradient and of the KL, with exact moments
    cleaning.py    what a negative reward of a held-out demonstration means: SFT on tables, cuts
    exact.py       the package's own loss and train step on a table, under exact expectation
"""

from dpr_jax.theory.mdp import TokenMDP

__all__ = ["TokenMDP"]

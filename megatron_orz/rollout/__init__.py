"""Rollout generation: inference servers, the client that talks to them, and the weights they receive."""

INITIAL_VERSION = -1
"""The policy version of rollouts drawn before the first update, from the weights of the model directory."""

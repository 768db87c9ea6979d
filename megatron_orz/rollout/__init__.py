"""Rollout generation: inference servers, the client that talks to them, and the weights they receive."""

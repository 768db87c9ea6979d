"""Reinforcement learning of reasoning language models: PPO on Megatron-core, rollouts from an inference server."""

__version__ = "0.1.0"

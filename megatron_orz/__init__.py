"""Reinforcement learning of reasoning language models: PPO on Megatron-core, rollouts from an inference server."""

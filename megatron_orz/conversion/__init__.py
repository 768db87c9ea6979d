"""Checkpoints between Hugging Face's form and Megatron's, in one process and little memory, without megatron-core."""

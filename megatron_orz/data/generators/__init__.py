"""Reasoning problems made to order, in levels: arithmetic, countdown, logic, and those of reasoning-gym."""

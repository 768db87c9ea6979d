"""Runs of a recipe that differ in one thing, with several seeds each, and what the difference makes."""

"""Convolutions and dense layers that stay fast in loops and under vmap; JAX only."""

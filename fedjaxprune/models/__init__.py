"""Networks, and layers that stay fast in loops and under vmap."""

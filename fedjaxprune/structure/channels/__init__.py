"""Which channels of which leaves are one and the same, found by walking the jaxpr of a network."""

"""How labels of channels pass through the operations of a jaxpr."""

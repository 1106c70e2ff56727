"""Take dead channels out of a network for good, whatever the network is."""

"""Benchmarks: scripts that warm up, block until ready and report compile and run time apart."""

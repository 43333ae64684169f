"""Benchmarks that anyone can run. Each compares with a limit or a peer in the same run and prints the ratio."""

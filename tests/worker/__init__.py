"""Tests of the two ends of a hand-over over a real engine."""

"""Tests of the hand-over machine."""

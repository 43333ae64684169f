"""Tests of the engine, from the scheduler to whole models."""

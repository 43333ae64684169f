"""Tests of the KV blocks: layout, keys, memory, and the account of slots."""

"""The engine: takes requests plus whatever prefix of KV blocks exists, computes the rest. Knows no roles."""

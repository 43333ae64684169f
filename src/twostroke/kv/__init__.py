"""KV blocks: their layout, keys, slots and leases. Imports nothing else of twostroke but errors."""

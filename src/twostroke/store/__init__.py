"""Places below the device where KV blocks outlive the pool: tiers, and the store that is made of them."""

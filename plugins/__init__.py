"""`causal_forcing::KVCacheAttention`: its contract, and the bodies that carry it out."""

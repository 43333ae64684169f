"""A whole cluster in one thread under a virtual clock: the real router and workers, and a network that fails.

What is real: the router with its registry, policy and relay; the workers' API, internal endpoints, producer and
consumer; engine, scheduler, pool and hand-over machine. What is not: time (``clock.py``), the network
(``network.py``), and the model (``model.py``), whose next token is a function of all the KV that attention reads.
"""

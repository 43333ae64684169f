"""twostroke: prefill and decode on different workers, over one streamed KV cache."""

__version__ = "0.1.0"

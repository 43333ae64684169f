"""The hand-over of one request from a producer (prefill) to a consumer (decode): a pure state machine."""

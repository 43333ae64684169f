"""What clients see: the OpenAI and SGLang HTTP dialects, and metrics."""

"""Language models, speech LLMs and their processors."""

SAMPLE_RATE = 16_000  # Hz, of all audio: what Whisper encoders take. Here, where it costs no import of torch

"""Language models, speech LLMs and their processors."""

SAMPLE_RATE = 16_000  # Hz, of all audio: what Whisper encoders take. Here, where it costs no import of torch
# What every option that takes a model takes, for --help; docs/models.md has the table.
MODEL = "A causal LM, PEFT adapter, speech LLM or audio LLM: embedded: name, folder or hub name (docs/models.md)."

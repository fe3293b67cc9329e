"""Base model, tokenizer, chat rendering, adapter, dropout. The door to transformers and peft."""

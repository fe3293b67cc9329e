"""Base model, tokenizer, chat rendering, adapter, dropout, loss. The door to transformers and peft."""

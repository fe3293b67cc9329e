"""Base model, tokenizer, chat rendering, adapter, dropout. The door to transformers and peft."""

import logging

# PEFT imports bitsandbytes wherever it is installed, which then complains that a kernel cannot be fetched from a hub.
# This has to stand before the first import of PEFT.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

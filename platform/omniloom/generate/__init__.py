"""Trained models write.

The story, in call order: `prompt` reads a prompt's files and text into a document; `engine.Engine` lets many requests
take turns, prompts chunk by chunk and one token at a time; `kv_cache.KVCache` keeps of each token what its layers need
again (`storage`: as it is, or in int8), all positions, those that sparse attention may still see, or the heavy and the
recent ones; `sampling` draws the next token; `speculative` lets the model's own prediction modules, or a smaller model,
guess several ahead; `beam` searches; `session` keeps a conversation on disk.
For the command line `writer` counts what answers take, `prompts` reads many from a file and writes their answers to
another, `chat` lays a conversation out as training does and `terminal` is where one sits at it.
"""

"""The decoder: one token sequence in, logits out.

The story, in call order: `config.ModelConfig` says what is built; `position.find_places` reads each token's place off
the packed rows; `embedding.MediaEncoders` writes pictures, sounds and videos into the sequence of text embeddings;
`decoder.Decoder` runs the layers, each `mla.LatentAttention` or `attention.GroupedAttention`, in a pattern full, sparse
(`sparse_attention`) or linear, then `layers.SwiGLU`, `layers.MLP` or `moe.MixtureOfExperts`, and the
multi-token-prediction modules (`mtp`). `load.load_model` reads a trained one back, ours or, through the tables of `hf`
and `hf_config`, Hugging Face's; `exchange` writes one as the other, tensor by tensor (`weights`).
"""

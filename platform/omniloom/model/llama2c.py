"""llama2.c's model.bin and tokenizer.bin: a Llama whose RoPE turns neighbouring pairs, and a BPE by scores."""

import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch import Tensor

from omniloom.errors import CheckpointError, ConfigError
from omniloom.model.config import ModelConfig

HEADER = struct.Struct("<7i")
UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"


class Llama2cWeights:
    """The float32 weights of a file, each kind of matrix for all layers in one, given as ours."""

    def __init__(self, path: Path) -> None:
        """Read the header; raises CheckpointError where the file is not of the size that it says."""
        with path.open("rb") as file:
            head = file.read(HEADER.size)
        if len(head) < HEADER.size:
            raise CheckpointError(f"{path} has {len(head)} bytes; the header of a file of llama2.c has {HEADER.size}")
        width, inner, layers, heads, kv_heads, vocab, context = HEADER.unpack(head)
        self.config = ModelConfig(
            vocab_size=abs(vocab),
            tie_word_embeddings=vocab > 0,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            max_position_embeddings=context,
            norm_eps=1e-5,
            initializer="normal",
            attention="grouped",
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            n_routed_experts=0,
            image_patch_pixels=None,
            video_patch_pixels=None,
            audio_mels=None,
        )
        try:
            self.config.check()
        except (ConfigError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"{path} is no .bin of llama2.c's, the one file that is read alone (a Hugging Face model is named by "
                f"its folder): {error}"
            ) from error
        arrays = list(self._arrays())
        size = HEADER.size + 4 * sum(math.prod(shape) for _, shape in arrays)
        if path.stat().st_size != size:
            raise CheckpointError(
                f"{path} has {path.stat().st_size:,} bytes and its header asks for {size:,}: it is cut short, or no "
                "model of llama2.c's first version"
            )
        self._places: dict[str, tuple[int, tuple[int, ...]]] = {}
        flat, start = np.memmap(path, dtype="<f4", mode="r", offset=HEADER.size), 0
        for name, shape in arrays:
            for layer in range(layers) if "{i}" in name else (0,):
                self._places[name.format(i=layer)] = (start, shape[1:] if "{i}" in name else shape)
                start += math.prod(shape) // (layers if "{i}" in name else 1)
        self._flat = flat

    def _arrays(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Ours and their shapes in the file's order; a name with {i} stands for all layers, one after the other."""
        config = self.config
        layers, width, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
        query, key = (heads * config.head_width for heads in (config.num_attention_heads, config.key_value_heads))
        layer = "layers.{i}."
        yield "embed_tokens.weight", (config.vocab_size, width)
        yield f"{layer}input_layernorm.weight", (layers, width)
        yield f"{layer}self_attn.q_proj.weight", (layers, query, width)
        yield f"{layer}self_attn.k_proj.weight", (layers, key, width)
        yield f"{layer}self_attn.v_proj.weight", (layers, key, width)
        yield f"{layer}self_attn.o_proj.weight", (layers, width, query)
        yield f"{layer}post_attention_layernorm.weight", (layers, width)
        yield f"{layer}mlp.gate_proj.weight", (layers, inner, width)
        yield f"{layer}mlp.down_proj.weight", (layers, width, inner)
        yield f"{layer}mlp.up_proj.weight", (layers, inner, width)
        yield "norm.weight", (width,)
        yield "tables of cosines and sines", (config.max_position_embeddings, config.head_width)
        if not config.tie_word_embeddings:
            yield "lm_head.weight", (config.vocab_size, width)

    def dtype(self, name: str) -> torch.dtype:
        """Always float32."""
        return torch.float32

    def fill(self, name: str, into: Tensor) -> None:
        """Write one of our tensors."""
        start, shape = self._places[name]
        into.copy_(torch.from_numpy(self._flat[start : start + math.prod(shape)].reshape(shape).copy()))


def convert_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """llama2.c's tokenizer.bin as a BPE with byte fallback whose ids are those of run.c's encode(bos=1, eos=0).

    run.c merges the neighbours whose whole has the best score, the leftmost of equals, as long as there are any. Here a
    merge is a pair: where two pairs of one whole overlap (a|aa and aa|a in a|aa|a) the shorter beginning comes first,
    wherever it stands. Raises CheckpointError where the file is none.
    """
    scored = _read_tokens(path, vocab_size)
    if len(scored) < 3 + 256:
        raise CheckpointError(f"{path} has {len(scored)} tokens; the unknown one, bos, eos and the bytes are {3 + 256}")
    pieces = [UNKNOWN, BOS, EOS, *(text for text, _ in scored[3:])]
    vocab = {text: number for number, text in reversed(list(enumerate(pieces)))}
    merges = [
        (-score, number, cut, (text[:cut], text[cut:]))
        for number, (text, score) in enumerate(scored)
        if number >= 3 + 256
        for cut in range(1, len(text))
        if text[:cut] in vocab and text[cut:] in vocab
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=[pair for *_, pair in sorted(merges)], unk_token=UNKNOWN, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (UNKNOWN, BOS, EOS)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, 1)]
    )
    return tokenizer


def _read_tokens(path: Path, vocab_size: int) -> list[tuple[str, float]]:
    tokens: list[tuple[str, float]] = []
    content, at = path.read_bytes(), 4  # after the longest one's length
    try:
        while at < len(content):
            score, length = struct.unpack_from("<fi", content, at)
            text = content[at + 8 : at + 8 + length]
            if length < 0 or len(text) < length:
                raise CheckpointError(f"{path} is cut short in token {len(tokens)}")
            tokens.append((text.decode(), score))
            at += 8 + length
    except (struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no tokenizer of llama2.c: {error}") from error
    if len(tokens) != vocab_size:
        raise CheckpointError(f"{path} has {len(tokens)} tokens and the model {vocab_size}: it is another model's")
    return tokens

"""Which of Hugging Face's tensors is made of which of ours: one table a kind, read in both directions.

Export reads the pieces of a tensor of theirs and lays them one after the other; import writes each part of it into the
pieces. The tables name what a kind may have; what a model has, its decoder's own names say.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from omniloom.errors import CheckpointError
from omniloom.model.config import ModelConfig
from omniloom.model.weights import Index, Weights

Shapes = Mapping[str, tuple[int, ...]]


class Rule(NamedTuple):
    """A tensor of theirs and those of ours that lie in it along its last dimension; in a layer, names within it."""

    theirs: str  # {p}: weight, bias; {e}: an expert
    ours: tuple[str, ...]
    transposed: bool = False  # they keep (in, out) where we keep (out, in), or the other way round
    half: int | None = None  # of an expert's gate and up, which we keep in one
    rotary: bool = False  # rows that RoPE turns: pairs lie side by side, or half a head apart
    is_copy: bool = False  # of a tensor that is there already


def same(*names: str) -> tuple[Rule, ...]:
    return tuple(Rule(name, (name,)) for name in names)


NORMS = same("input_layernorm.{p}", "post_attention_layernorm.{p}")
SWIGLU = same("mlp.gate_proj.{p}", "mlp.up_proj.{p}", "mlp.down_proj.{p}")
GROUPED = (
    Rule("self_attn.q_proj.{p}", ("self_attn.q_proj.{p}",), rotary=True),
    Rule("self_attn.k_proj.{p}", ("self_attn.k_proj.{p}",), rotary=True),
    *same("self_attn.v_proj.{p}", "self_attn.o_proj.{p}"),
)
LATENT = (
    Rule("self_attn.q_proj.weight", ("self_attn.q_proj.weight",), rotary=True),
    *same("self_attn.q_a_proj.weight", "self_attn.q_a_layernorm.weight"),
    Rule("self_attn.q_b_proj.weight", ("self_attn.q_b_proj.weight",), rotary=True),
    Rule("self_attn.kv_a_proj_with_mqa.weight", ("self_attn.kv_a_proj_with_mqa.weight",), rotary=True),
    *same("self_attn.kv_a_layernorm.weight", "self_attn.kv_b_proj.weight", "self_attn.o_proj.weight"),
)


def experts(block: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{block}.experts.{{e}}.{gate}.weight", ("mlp.experts.gate_up_EDF",), transposed=True, half=0),
        Rule(f"{block}.experts.{{e}}.{up}.weight", ("mlp.experts.gate_up_EDF",), transposed=True, half=1),
        Rule(f"{block}.experts.{{e}}.{down}.weight", ("mlp.experts.down_EFD",), transposed=True),
        Rule(f"{block}.gate.weight", ("mlp.router.weight_ED",)),
    )


@dataclass(frozen=True)
class Kind:
    """A class of theirs: what lies where in its files."""

    architecture: str
    prefix: str  # of all names but the head's
    layers: str
    model: tuple[Rule, ...]
    layer: tuple[Rule, ...]
    ahead: tuple[Rule, ...] = ()  # of a multi-token-prediction module, beside its layer
    interleave: bool = False  # how they keep the rows that RoPE turns, as `ModelConfig.rope_interleave`
    ignored: str = r"\.rotary_emb\.inv_freq$"  # tables that files may hold and that follow from the config


LLAMA = Kind(
    architecture="LlamaForCausalLM",
    prefix="model.",
    layers="model.layers.{i}.",
    model=(
        Rule("model.embed_tokens.weight", ("embed_tokens.weight",)),
        Rule("model.norm.weight", ("norm.weight",)),
        Rule("lm_head.weight", ("lm_head.weight",)),
    ),
    layer=(*NORMS, *GROUPED, *SWIGLU),
)
KINDS = {
    "gpt2": Kind(
        architecture="GPT2LMHeadModel",
        prefix="transformer.",
        layers="transformer.h.{i}.",
        model=(
            Rule("transformer.wte.weight", ("embed_tokens.weight",)),
            Rule("transformer.wpe.weight", ("embed_positions.weight",)),
            Rule("transformer.ln_f.{p}", ("norm.{p}",)),
            Rule("lm_head.weight", ("lm_head.weight",)),
        ),
        layer=(
            Rule("ln_1.{p}", ("input_layernorm.{p}",)),
            Rule(
                "attn.c_attn.{p}",
                ("self_attn.q_proj.{p}", "self_attn.k_proj.{p}", "self_attn.v_proj.{p}"),
                transposed=True,
            ),
            Rule("attn.c_proj.{p}", ("self_attn.o_proj.{p}",), transposed=True),
            Rule("ln_2.{p}", ("post_attention_layernorm.{p}",)),
            Rule("mlp.c_fc.{p}", ("mlp.up_proj.{p}",), transposed=True),
            Rule("mlp.c_proj.{p}", ("mlp.down_proj.{p}",), transposed=True),
        ),
        ignored=r"\.attn\.(masked_)?bias$",
    ),
    "llama": LLAMA,
    "mixtral": replace(
        LLAMA,
        architecture="MixtralForCausalLM",
        layer=(*NORMS, *GROUPED, *experts("block_sparse_moe", gate="w1", up="w3", down="w2")),
    ),
    "deepseek_v3": replace(
        LLAMA,
        architecture="DeepseekV3ForCausalLM",
        layer=(
            *NORMS,
            *LATENT,
            *SWIGLU,
            *experts("mlp", "gate_proj", "up_proj", "down_proj"),
            Rule("mlp.gate.e_score_correction_bias", ("mlp.router.bias_E",)),
            *same(*(f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down"))),
        ),
        interleave=True,
        ahead=(
            Rule("enorm.weight", ("junction.enorm.weight",)),
            Rule("hnorm.weight", ("junction.hnorm.weight",)),
            Rule("eh_proj.weight", ("junction.eh_proj.weight",)),
            Rule("shared_head.norm.weight", ("norm.weight",)),
        ),
    ),
}
# Published multi-token-prediction modules repeat what they share with the model, and servers read it there.
SHARED = (
    Rule("embed_tokens.weight", ("embed_tokens.weight",), is_copy=True),
    Rule("shared_head.head.weight", ("lm_head.weight",), is_copy=True),
)


@dataclass(frozen=True)
class Piece:
    """A part of one of our tensors as it lies in one of theirs."""

    ours: str
    index: Index  # of the part
    shape: tuple[int, ...]  # there
    transposed: bool
    order: Tensor | None  # their row i is our row order[i]; None: the same

    def there(self, part: Tensor) -> Tensor:
        """Our part as they keep it."""
        part = part if self.order is None else part[self.order]
        return part.T if self.transposed else part

    def put(self, there: Tensor, into: Tensor) -> None:
        """Write their part into our tensor; an import keeps the order of rows, and its config says which it is."""
        into[self.index or (...,)].copy_(there.T if self.transposed else there)


@dataclass(frozen=True)
class Theirs:
    """One tensor of a file of theirs: pieces of ours, one after the other along the last dimension."""

    name: str
    pieces: tuple[Piece, ...]
    is_copy: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return (*self.pieces[0].shape[:-1], sum(piece.shape[-1] for piece in self.pieces))

    def parts(self) -> Iterator[tuple[Piece, Index]]:
        """Each piece and where in this tensor it lies."""
        start = 0
        for piece in self.pieces:
            whole = len(self.pieces) == 1
            yield piece, () if whole else (..., slice(start, start + piece.shape[-1]))
            start += piece.shape[-1]


def tensors(kind: Kind, config: ModelConfig, shapes: Shapes, interleave: bool) -> list[Theirs]:
    """What a file of theirs holds of a model of ours with these names and shapes.

    `interleave` is how the file keeps the rows that RoPE turns. What the kind has no place for (media encoders,
    multi-token prediction but DeepSeek's) is in no piece.
    """
    depth = config.num_hidden_layers
    places = [("", "", kind.model)]
    places += [(kind.layers.format(i=i), f"layers.{i}.", kind.layer) for i in range(depth)]
    if kind.ahead and config.n_routed_experts:  # theirs are mixtures of experts
        for k in range(config.num_nextn_predict_layers):
            there = kind.layers.format(i=depth + k)
            places += [(there, f"mtp.{k}.", kind.ahead), (there, f"mtp.{k}.layer.", kind.layer), (there, "", SHARED)]
    found = []
    for there, here, rules in places:
        for rule in rules:
            for p in ("weight", "bias") if "{p}" in rule.theirs else ("",):
                for e in range(config.n_routed_experts) if "{e}" in rule.theirs else (0,):
                    names = [here + name.format(p=p) for name in rule.ours]
                    if rule.is_copy and names == ["lm_head.weight"] and config.tie_word_embeddings:
                        names = ["embed_tokens.weight"]
                    if all(name in shapes for name in names):
                        pieces = (_piece(rule, name, shapes[name], e, config, interleave) for name in names)
                        found.append(Theirs(there + rule.theirs.format(p=p, e=e), tuple(pieces), rule.is_copy))
    return found


def _piece(rule: Rule, name: str, shape: tuple[int, ...], expert: int, config: ModelConfig, interleave: bool) -> Piece:
    index: Index = ()
    if "{e}" in rule.theirs:
        index, shape = (expert,), shape[1:]
        if rule.half is not None:
            width = shape[-1] // 2
            index, shape = (
                (expert, slice(None), slice(rule.half * width, (rule.half + 1) * width)),
                (*shape[:-1], width),
            )
    transposed = rule.transposed and len(shape) == 2
    differs = rule.rotary and config.position == "rope" and interleave != config.rope_interleave
    order = rotary_order(shape[0], name, config, interleave) if differs else None
    return Piece(name, index, shape[::-1] if transposed else shape, transposed, order)


def rotary_order(rows: int, name: str, config: ModelConfig, interleave: bool) -> Tensor:
    """Which of our rows is each of theirs, where one side keeps RoPE's pairs side by side and the other apart."""
    if config.attention == "grouped":
        head = config.head_width
    else:  # one head of nope and rope after the other; the compressed keys and values: one, the latent before
        head = rows if "kv_a_proj" in name else config.qk_nope_head_dim + config.qk_rope_head_dim
    order = torch.arange(rows).view(-1, head).clone()
    first = 0 if config.attention == "grouped" else head - config.rotary_width
    turned = order[:, first : first + config.rotary_width]
    apart = (2, -1) if interleave else (-1, 2)
    order[:, first : first + config.rotary_width] = turned.unflatten(1, apart).transpose(1, 2).flatten(1)
    return order.flatten()


class HuggingFaceWeights:
    """The weights of a folder of theirs, given as ours."""

    def __init__(self, folder: Path, kind: Kind, config: ModelConfig, shapes: Shapes) -> None:
        """Open the files; raises CheckpointError where their tensors are not those of the config."""
        self._weights = Weights(folder)
        self._weights.rename(_names_of(kind, self._weights))
        expected = tensors(kind, config, shapes, interleave=config.rope_interleave)
        tied = [Rule("lm_head.weight", ("embed_tokens.weight",), is_copy=True)] if config.tie_word_embeddings else []
        for rule in tied:  # some files hold it twice
            whole = Piece("embed_tokens.weight", (), shapes["embed_tokens.weight"], False, None)
            expected.append(Theirs(rule.theirs, (whole,), is_copy=True))
        self._weights.check(
            {tensor.name: tensor.shape for tensor in expected}, optional={t.name for t in expected if t.is_copy}
        )
        self._parts: dict[str, list[tuple[str, Index, Piece]]] = {}
        for tensor in expected:
            if not tensor.is_copy:
                for piece, index in tensor.parts():
                    self._parts.setdefault(piece.ours, []).append((tensor.name, index, piece))
        self._refuse_other_copies([tensor for tensor in expected if tensor.is_copy])

    def dtype(self, name: str) -> torch.dtype:
        """Of one of our tensors, as it is kept there."""
        return self._weights.dtype(self._parts[name][0][0])

    def fill(self, name: str, into: Tensor) -> None:
        """Write one of our tensors, part by part as it is read."""
        for theirs, index, piece in self._parts[name]:
            piece.put(self._weights.read(theirs, index), into)

    def _refuse_other_copies(self, copies: list[Theirs]) -> None:
        for copy in copies:
            if copy.name not in self._weights.names:
                continue
            [(source, _, _)] = self._parts[copy.pieces[0].ours]
            for start in range(0, copy.shape[0], 4_096):
                rows = (slice(start, start + 4_096),)
                if not torch.equal(self._weights.read(copy.name, rows), self._weights.read(source, rows)):
                    raise CheckpointError(
                        f"{self._weights.folder}: {copy.name} is shared with {source} and differs from it"
                    )


def _names_of(kind: Kind, weights: Weights) -> Callable[[str], str | None]:
    """With the prefix that files of a bare model lack, without tables that follow from the config and empty tensors."""
    bare = not any(name.startswith(kind.prefix) for name in weights.names)
    left_out = {name for name in weights.names if re.search(kind.ignored, name) or 0 in weights.shape(name)}

    def name_of(name: str) -> str | None:
        if name in left_out:
            return None
        return kind.prefix + name if bare and name != "lm_head.weight" else name

    return name_of

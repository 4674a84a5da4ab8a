"""Seconds that one rank computes for one micro batch, forward and backward, by part.

N tokens of the micro batch on this rank, T of a document, E experts, K a token, C tokens of a chunk.
"""

from collections import defaultdict
from collections.abc import Iterable

from omniloom.plan.activations import Numerics
from omniloom.plan.config import Workload
from omniloom.plan.flops import attention_flops_per_key, attention_flops_per_token
from omniloom.plan.params import Matrix, Sizes, encoder_matrices, layer_matrices
from omniloom.plan.sharding import stages
from omniloom.plan.speeds import PRODUCTS_IN, Speeds
from omniloom.plan.traffic import (
    CHUNK_TOKENS,
    Traffic,
    embedding_traffic,
    head_traffic,
    junction_traffic,
    layer_traffic,
)

BACKWARD = 2  # products of each forward one: the input's gradient and the weight's
ATTENTION_BACKWARD = 2.5  # of the forward FLOPs: the kernel takes the scores again, then four products
DENSE_OPERATIONS, SPARSE_OPERATIONS = 120, 300  # of one layer, forward and backward
# ZeRO 3 fetches and lets go each module's weights, forward and backward, in Python: 0.48 ms a module where the smallest
# operation took 1.1 µs (model of 93 modules too small for anything else to count).
HOOK_OPERATIONS = 430
NORMS = 2  # of a layer


class MicroBatch:
    """Adds up `seconds` by part, and the `operations` that are started.

    Activation checkpointing runs each layer's forward pass twice; sparse attention always runs twice.
    """

    def __init__(self, workload: Workload, speeds: Speeds) -> None:
        self._workload, self._sizes, self._speeds = workload, workload.sizes, speeds
        self._tokens = workload.micro_batch_size * workload.seq_len / workload.sequence
        self._numerics = Numerics(workload.precision, speeds.on_cpu)
        self._forwards = 2 if workload.activation_checkpointing else 1
        self._precision = PRODUCTS_IN[workload.precision]
        self._unscaled = "bf16" if self._precision == "fp8" else self._precision  # attention, head, junctions
        self.seconds: dict[str, float] = defaultdict(float)
        self.operations = 0.0
        ahead = [self._sizes.num_hidden_layers] * self._sizes.num_nextn_predict_layers
        for layer in (*stages(workload)[-1].layers, *ahead):
            self._layer(layer)
        self._ends()

    @property
    def total(self) -> float:
        """Seconds of all parts."""
        return sum(self.seconds.values())

    def _layer(self, layer: int) -> None:
        workload, sizes = self._workload, self._sizes
        always, router, chosen = layer_matrices(sizes, layer)
        for matrix in always:
            self._product("projections", self._tokens, self._shared(matrix), self._precision, self._forwards)
        for matrix in router:
            self._product("projections", self._tokens, matrix, "fp32", self._forwards)
        if chosen:
            local = sizes.n_routed_experts / workload.expert
            rows = self._tokens * sizes.num_experts_per_tok / local
            for matrix in chosen:
                self._product("experts", rows, self._shared(matrix), self._precision, self._forwards, local)
        self._attention()
        self._move(layer_traffic(sizes, layer, self._numerics, workload.tensor), self._forwards)
        self.operations += SPARSE_OPERATIONS if chosen else DENSE_OPERATIONS
        if workload.zero_stage == 3:
            experts = 1 if chosen else 0  # all of a layer's are one module
            self.operations += HOOK_OPERATIONS * (len(always) + len(router) + experts + NORMS)

    def _attention(self) -> None:
        workload, sizes = self._workload, self._sizes
        tokens, documents = self._tokens / workload.tensor, workload.seq_len
        if sizes.attention_pattern == "linear":
            inside = sizes.num_attention_heads * CHUNK_TOKENS * 2 * (_key_width(sizes) + _value_width(sizes))
            flops = tokens * (attention_flops_per_token(sizes, documents) + inside)
            times = self._forwards + BACKWARD
            self.seconds["attention"] += times * self._speeds.flops("attention", flops, "fp32")
        elif sizes.attention_pattern == "sparse" and documents > sizes.window_tokens:
            # Each block of a window's queries is handed the keys that any of them sees.
            seen = 2 * sizes.window_tokens + min(sizes.max_global_tokens, documents / sizes.global_stride) / 2
            flops = tokens * seen * attention_flops_per_key(sizes)
            passes = self._forwards + 1 + ATTENTION_BACKWARD
            self.seconds["attention"] += passes * self._speeds.block_attention("attention", flops, self._unscaled)
        else:
            flops = tokens * attention_flops_per_token(sizes, documents)
            # The narrower of keys and values is padded to the wider.
            width = max(_key_width(sizes), _value_width(sizes))
            flops *= 2 * width / (_key_width(sizes) + _value_width(sizes))
            forward, backward = self._forwards * flops, ATTENTION_BACKWARD * flops
            for work, is_backward in ((forward, False), (backward, True)):
                took = self._speeds.attention("attention", work, documents, width, self._unscaled, is_backward)
                self.seconds["attention"] += took

    def _ends(self) -> None:
        """Embedding, media encoders, prediction modules' junctions, heads."""
        workload, sizes, numerics = self._workload, self._sizes, self._numerics
        heads = 1 + sizes.num_nextn_predict_layers
        asked = self._tokens * workload.target_share
        head = Matrix(sizes.hidden_size, sizes.vocab_size // workload.tensor)
        self._product("head", asked, head, self._unscaled, 1, heads)
        for _ in range(heads):
            self._move(head_traffic(sizes, numerics, workload.target_share, workload.tensor), 1, "head")
        for _ in range(sizes.num_nextn_predict_layers):
            self._product(
                "projections", self._tokens, Matrix(2 * sizes.hidden_size, sizes.hidden_size), self._unscaled, 1
            )
            self._move(junction_traffic(sizes, numerics), 1)
        for medium, matrices in encoder_matrices(sizes).items():
            tokens = self._tokens * workload.share_by_modality.get(medium, 0.0)
            for matrix, a_token in matrices:
                self._product("encoders", tokens * a_token, matrix, self._unscaled, 1)
        self._move(embedding_traffic(sizes, numerics), 1)

    def _product(self, part: str, rows: float, matrix: Matrix, precision: str, forwards: int, count: float = 1) -> None:
        took = self._speeds.product(part, rows, matrix, precision)
        self.seconds[part] += (forwards + BACKWARD) * count * took

    def _shared(self, matrix: Matrix) -> Matrix:
        """A tensor-parallel rank's share."""
        return Matrix(matrix.inputs, -(-matrix.outputs // self._workload.tensor))

    def _move(self, moved: Iterable[Traffic], forwards: int, part: str = "elementwise") -> None:
        for each in moved:
            work = self._tokens * (forwards * each.forward + each.backward)
            self.seconds[part] += self._speeds.traffic(part, work, self._tokens * each.tensor)


def _key_width(sizes: Sizes) -> int:
    return sizes.head_width if sizes.attention == "grouped" else sizes.qk_nope_head_dim + sizes.qk_rope_head_dim


def _value_width(sizes: Sizes) -> int:
    return sizes.head_width if sizes.attention == "grouped" else sizes.v_head_dim
